"""Redis clients: made from a URL or derived from the user's, one set of connections for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import redis
import redis.asyncio as aioredis
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.sentinel import SentinelConnectionPool

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import options, sentinel, urls
from langgraph_tiered_saver.hot.async_cluster import AsyncClusterClient
from langgraph_tiered_saver.hot.cluster import ClusterClient, Site, is_cluster
from langgraph_tiered_saver.hot.guard import (
    ConnectFunction,
    ConnectionGuard,
    async_connect_function,
    connect_function,
)
from langgraph_tiered_saver.hot.slots import SlotMap

SyncRedis = Any  # redis.Redis or ClusterClient; redis-py's stubs share no base with the calls we make
AsyncRedis = Any
_Holder = AsyncGenerator[None, None]


def from_url(
    url: str, config: TieredConfig, guard: ConnectionGuard | None = None, *, like: SyncRedis | None = None
) -> tuple[SyncRedis, Callable[[], AsyncRedis]]:
    """Make a synchronous client, and a maker of asynchronous ones, without connecting.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py documents it; for a Cluster
            `redis+cluster://user:password@host:port,host:port/?option=value`, for a master that Sentinel watches
            `redis+sentinel://user:password@host:port,host:port/service/database?option=value` with the sentinels' own
            `sentinel_username` and `sentinel_password` among the options; `rediss+...` for TLS.
        config: Time-outs, retries and pool size. What the URL's query says wins.
        guard: Is told the run id of the server that each new connection reaches.
        like: A client made from the same URL, with which these share what is known of a Cluster's masters: the servers
            that the URL names may be gone by now.

    Raises:
        ConfigurationError: the URL cannot be read. Its password is not repeated.
    """
    place = urls.parse(url, config)
    if place.connection.get("decode_responses"):
        _refuse_decoding()
    counterpart = options.COUNTERPARTS[place.connection_class]
    connect, connect_async = connect_function(guard), async_connect_function(guard)
    for_async = options.accepted_by(counterpart, place.connection, "max_connections", "timeout")
    if place.kind == "cluster":
        slots = like.site.slots if isinstance(like, ClusterClient) else SlotMap(place.addresses)
        site = Site(slots, place.connection_class, place.connection, connect, config)
        async_site = Site(slots, counterpart, for_async, connect_async, config)
        return ClusterClient(site), lambda: AsyncClusterClient(async_site)
    if place.kind == "sentinel":
        return (
            sentinel.master(place, connect, config),
            lambda: sentinel.async_master(place, connect_async, config),
        )
    client = _client(place.connection_class, place.connection, connect, config)
    return client, lambda: _async_client(counterpart, for_async, connect_async, config)


def guarded(client: SyncRedis, config: TieredConfig, guard: ConnectionGuard | None) -> SyncRedis:
    """Make a twin of the user's synchronous client, with connections of its own; the user's stays untouched.

    The twin has the same servers, database, credentials and TLS settings, and the user's time-outs where they set
    one. Pool size and retries are ours: redis-py's would repeat a command ten times. A Cluster's is a `ClusterClient`.
    """
    if isinstance(client, redis.RedisCluster):
        return ClusterClient(_site_of(client, config, guard))
    pool = _pool_of(client)
    connection = options.taken_over(pool.connection_kwargs, config)
    connect = connect_function(guard, pool.connection_kwargs.get("redis_connect_func"))
    if isinstance(pool, SentinelConnectionPool):
        return sentinel.twin(pool, connection, connect, config)
    return _client(pool.connection_class, connection, connect, config)


def aguarded(client: AsyncRedis, config: TieredConfig, guard: ConnectionGuard | None) -> Callable[[], AsyncRedis]:
    """Give a maker of twins of the user's asynchronous client, one for each event loop; see `guarded`."""
    if isinstance(client, aioredis.RedisCluster):
        site = _site_of_async(client, config, guard)
        return lambda: AsyncClusterClient(site)
    pool = _pool_of(client)
    connection = options.taken_over(pool.connection_kwargs, config)
    connect = async_connect_function(guard, pool.connection_kwargs.get("redis_connect_func"))
    if isinstance(pool, AsyncSentinelConnectionPool):
        return lambda: sentinel.async_twin(pool, connection, connect, config)
    return lambda: _async_client(pool.connection_class, connection, connect, config)


def derive_async(
    client: SyncRedis, config: TieredConfig, guard: ConnectionGuard | None = None
) -> Callable[[], AsyncRedis]:
    """Give a maker of asynchronous clients that reach the same server as the user's synchronous one.

    Raises:
        ConfigurationError: the client's kind has no known asynchronous counterpart; pass `async_redis=`.
    """
    connect = async_connect_function(guard)
    if isinstance(client, redis.RedisCluster):
        site, given = _site_of(client, config, None), client.user_on_connect_func
        kind = site.kind
    else:
        pool = _pool_of(client)
        kind, given = pool.connection_class, pool.connection_kwargs.get("redis_connect_func")
    counterpart = options.COUNTERPARTS.get(kind)
    if counterpart is None or given is not None:
        raise ConfigurationError(
            f"No asynchronous client can be derived from {type(client).__name__} with connections of "
            f"{kind.__name__}{' and a redis_connect_func' if given is not None else ''}. Pass one as async_redis=..."
        )
    if isinstance(client, redis.RedisCluster):
        connection = options.accepted_by(counterpart, site.connection)
        async_site = Site(site.slots, counterpart, connection, connect, config)
        return lambda: AsyncClusterClient(async_site)
    connection = options.accepted_by(counterpart, options.taken_over(pool.connection_kwargs, config))
    if isinstance(pool, SentinelConnectionPool):
        return lambda: sentinel.derived(pool, connection, connect, config)
    return lambda: _async_client(counterpart, connection, connect, config)


def instances(client: SyncRedis) -> frozenset[str]:
    """Ask for the run ids of all masters: one, or one for each shard of a Cluster; "" where a server does not tell.

    Raises:
        redis.RedisError, OSError: a master could not be asked, or the guard refused it.
        ConfigurationError: the servers are no Cluster.
    """
    found = client.info("server")
    return frozenset(str(each.get("run_id", "")) for each in (found.values() if is_cluster(client) else (found,)))


def _pool_of(client: Any) -> Any:
    if (pool := getattr(client, "connection_pool", None)) is None:
        raise ConfigurationError(
            f"A {type(client).__name__} has no connection pool whose settings could be taken over. "
            "Pass redis.Redis, redis.RedisCluster, the master_for of a Sentinel, or their asynchronous kinds."
        )
    return pool


def _client(kind: type, connection: Mapping[str, Any], connect: ConnectFunction | None, config: TieredConfig) -> Any:
    make: Any = redis.BlockingConnectionPool
    ours = {"retry": options.retries(config), "redis_connect_func": connect, "connection_class": kind}
    return options.client_of(make(**{**options.of_pools(config), **connection, **ours}))


def _async_client(
    kind: type, connection: Mapping[str, Any], connect: ConnectFunction | None, config: TieredConfig
) -> Any:
    make: Any = aioredis.BlockingConnectionPool
    ours = {"retry": options.async_retries(config), "redis_connect_func": connect, "connection_class": kind}
    return options.async_client_of(make(**{**options.of_pools(config), **connection, **ours}))


def _site_of(client: Any, config: TieredConfig, guard: ConnectionGuard | None) -> Site:
    """Read the settings of a synchronous client of a Cluster."""
    manager = client.nodes_manager
    given = manager.connection_kwargs
    kind = given.get("connection_class") or (redis.SSLConnection if given.get("ssl") else redis.Connection)
    # The redis_connect_func among them is the client's own; the user's comes after redis-py's handshake here.
    user = client.user_on_connect_func

    def handshake(connection: Any) -> None:
        connection.on_connect()
        user(connection)

    connection = options.known_to(kind, options.taken_over(given, config))
    slots = SlotMap([(node.host, node.port) for node in client.get_nodes()], manager.address_remap)
    return Site(slots, kind, connection, connect_function(guard, handshake if user is not None else None), config)


def _site_of_async(client: Any, config: TieredConfig, guard: ConnectionGuard | None) -> Site:
    """Read the settings of an asynchronous client of a Cluster."""
    manager, given = client.nodes_manager, client.connection_kwargs
    nodes = [*manager.startup_nodes.values(), *manager.nodes_cache.values()]
    slots = SlotMap([(node.host, int(node.port)) for node in nodes], manager.address_remap)
    kind = given.get("connection_class", aioredis.Connection)
    connection = options.known_to(kind, options.taken_over(given, config))
    return Site(slots, kind, connection, async_connect_function(guard), config)


def reconnect(client: SyncRedis) -> None:
    """Close a client's idle connections, so that the guard looks at the server anew; those in use are left alone."""
    if isinstance(client, ClusterClient):
        client.reconnect()
    else:
        client.give_back()
        options.close_idle(client.connection_pool)


async def _areconnect(client: AsyncRedis) -> None:
    if isinstance(client, AsyncClusterClient):
        await client.reconnect()
    else:
        await client.retire()
        await client.connection_pool.disconnect(inuse_connections=False)


def check_decoding(client: SyncRedis) -> None:
    """Refuse a client that turns replies into text.

    Raises:
        ConfigurationError: the client was made with `decode_responses=True`.
    """
    pool = getattr(client, "connection_pool", None)
    given = pool.connection_kwargs if pool is not None else {}
    encoder = getattr(client, "encoder", None) or getattr(client, "get_encoder", lambda: None)()
    if given.get("decode_responses") or getattr(encoder, "decode_responses", False):
        _refuse_decoding()


def _refuse_decoding() -> NoReturn:
    raise ConfigurationError(
        "The Redis client was made with decode_responses=True, but checkpoints are bytes, not text. "
        "Pass a client made with decode_responses=False; both can use the same server."
    )


class LoopClients:
    """One asynchronous client for each event loop, because its connections belong to the loop.

    A client is closed with its loop: an asynchronous generator that waits on the loop holds it, and ending a loop
    (`asyncio.run` does it, by `shutdown_asyncgens`) ends its generators first.
    """

    def __init__(self, make: Callable[[], AsyncRedis]) -> None:
        """Remember how to make clients."""
        self._make = make
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncRedis, _Holder]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def current(self) -> AsyncRedis | None:
        """Give the running loop's client, if it has one."""
        found = self._open.get(asyncio.get_running_loop())
        return found[0] if found is not None else None

    async def open(self) -> AsyncRedis:
        """Make the running loop's client."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if (found := self._open.get(loop)) is not None:
                return found[0]
            client = self._make()
            holder = self._hold(weakref.ref(loop), client)
            self._open[loop] = client, holder
        await holder.__anext__()
        return client

    async def close_current(self) -> None:
        """Close the running loop's client."""
        with self._lock:
            found = self._open.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found[1].aclose()

    def close_others(self) -> None:
        """Ask every other loop that still runs to close its client."""
        with self._lock:
            others = [(loop, holder) for loop, (_, holder) in self._open.items()]
            self._open.clear()
        for loop, holder in others:
            _run_soon(loop, holder.aclose)

    def reconnect(self) -> None:
        """Let every client's idle connections be made anew."""
        with self._lock:
            clients = [(loop, client) for loop, (client, _) in self._open.items()]
        for loop, client in clients:
            _run_soon(loop, functools.partial(_areconnect, client))

    async def _hold(self, loop: weakref.ref[asyncio.AbstractEventLoop], client: AsyncRedis) -> _Holder:
        try:
            yield
        finally:
            if (ending := loop()) is not None:
                self._open.pop(ending, None)
            await client.aclose()


def _run_soon(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Begin something on another thread's loop, unless that does not run any more."""

    def begin() -> None:
        task = loop.create_task(work())
        # The loop holds its tasks weakly.
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    if loop.is_running():
        with contextlib.suppress(RuntimeError):  # it has been closed just now
            loop.call_soon_threadsafe(begin)


_tasks: set[asyncio.Task[None]] = set()
