"""Redis clients: made from a URL or derived from the user's, one set of connections for each event loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any
from weakref import WeakKeyDictionary

import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError

_SCHEMES = ("redis://", "rediss://", "unix://")
_LARGEST_PORT = 65535
_RETRY_BASE = 0.02
_RETRY_CAP = 0.25

SyncRedis = Any  # redis.Redis or redis.RedisCluster; their stubs share no base with both calls we make
AsyncRedis = Any
_Holder = AsyncGenerator[None, None]


def from_url(url: str, config: TieredConfig) -> tuple[SyncRedis, Callable[[], AsyncRedis]]:
    """Make a synchronous client, and a maker of asynchronous ones, without connecting.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py documents it.
        config: Time-outs, retries and pool size. What the URL's query says wins.

    Raises:
        ConfigurationError: the URL cannot be read. Its password is not repeated.
    """
    if not isinstance(url, str) or not url.startswith(_SCHEMES):
        raise ConfigurationError(f"The Redis URL cannot be used: it must start with {', '.join(_SCHEMES)}.")
    options = {
        "socket_timeout": config.redis_timeout,
        "socket_connect_timeout": config.redis_timeout,
        "timeout": config.redis_timeout,
        "max_connections": config.redis_pool_size,
        "protocol": 2,
    }
    pool = _parsed(url, options, config)
    if pool is None:
        # Not raised while the parser's error is handled: that error shows pieces of the URL.
        raise ConfigurationError(
            "The Redis URL cannot be read: its host, port, database or one of its options is malformed or unknown. "
            "Percent-encode special characters of the user name and password; the form is "
            "redis://user:password@host:port/database?option=value."
        )
    client = redis.Redis.from_pool(pool)
    check_decoding(client)

    def make_async() -> AsyncRedis:
        return aioredis.Redis.from_pool(
            aioredis.BlockingConnectionPool.from_url(
                url, **options, retry=_retry(AsyncRetry, redis.ConnectionError, config)
            )
        )

    return client, make_async


def _parsed(url: str, options: dict[str, Any], config: TieredConfig) -> Any:
    """Make a pool and, to see whether all options are known, a connection of it that connects to nothing."""
    try:
        pool = redis.BlockingConnectionPool.from_url(url, **options, retry=_retry(Retry, redis.ConnectionError, config))
        pool.connection_class(**pool.connection_kwargs)
        host, port = pool.connection_kwargs.get("host", ""), pool.connection_kwargs.get("port", 0)
    except (ValueError, TypeError, AttributeError, redis.RedisError):
        return None
    return pool if set("@/?# ").isdisjoint(str(host)) and 0 <= int(port or 0) <= _LARGEST_PORT else None


def derive_async(client: SyncRedis, config: TieredConfig) -> Callable[[], AsyncRedis]:
    """Give a maker of asynchronous clients that reach the same server as a synchronous one.

    Raises:
        ConfigurationError: the client's kind has no known asynchronous counterpart; pass `async_redis=`.
    """
    if isinstance(client, redis.RedisCluster):
        return lambda: _derive_cluster(client)
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        return lambda: _derive_sentinel(pool)
    counterparts: dict[type, type] = {
        redis.SSLConnection: aioredis.SSLConnection,
        redis.UnixDomainSocketConnection: aioredis.UnixDomainSocketConnection,
        redis.Connection: aioredis.Connection,
    }
    kind = getattr(pool, "connection_class", None)
    counterpart = counterparts.get(kind) if isinstance(kind, type) else None
    if pool is None or counterpart is None:
        raise ConfigurationError(
            f"No asynchronous client can be derived from {type(client).__name__} with connections of "
            f"{getattr(kind, '__name__', kind)}. Pass one as async_redis=..."
        )
    options = _accepted_by(counterpart, pool.connection_kwargs)
    options["retry"] = _retry(AsyncRetry, redis.ConnectionError, config)
    return lambda: aioredis.Redis.from_pool(
        aioredis.BlockingConnectionPool(
            connection_class=counterpart,
            max_connections=config.redis_pool_size,
            timeout=config.redis_timeout,
            **options,
        )
    )


def check_decoding(client: SyncRedis) -> None:
    """Refuse a client that turns replies into text.

    Raises:
        ConfigurationError: the client was made with `decode_responses=True`.
    """
    pool = getattr(client, "connection_pool", None)
    options = pool.connection_kwargs if pool is not None else getattr(client, "_kwargs", {})
    encoder = getattr(client, "encoder", None) or getattr(client, "get_encoder", lambda: None)()
    if options.get("decode_responses") or getattr(encoder, "decode_responses", False):
        raise ConfigurationError(
            "The Redis client was made with decode_responses=True, but checkpoints are bytes, not text. "
            "Pass a client made with decode_responses=False; both can use the same server."
        )


def _retry(kind: type[Any], error: type[Exception], config: TieredConfig) -> Any:
    # redis-py repeats ten times by default and counts a time-out as a reason; that would multiply ours by ten.
    backoff = ExponentialWithJitterBackoff(base=_RETRY_BASE, cap=_RETRY_CAP)
    return kind(backoff, config.redis_retries, supported_errors=(error,))


def _accepted_by(connection_class: type, options: dict[str, Any]) -> dict[str, Any]:
    accepted: set[str] = set()
    for ancestor in connection_class.__mro__:
        if ancestor is not object:
            accepted |= set(inspect.signature(ancestor).parameters)
    sync_only = {"retry", "parser_class", "redis_connect_func", "event_dispatcher", "self", "command_packer"}
    return {name: value for name, value in options.items() if name in accepted - sync_only and value is not None}


def _derive_sentinel(pool: SentinelConnectionPool) -> AsyncRedis:
    manager = pool.sentinel_manager
    options = _accepted_by(aioredis.Connection, pool.connection_kwargs)
    sentinels = [
        (s.connection_pool.connection_kwargs["host"], s.connection_pool.connection_kwargs["port"])
        for s in manager.sentinels
    ]
    sentinel_options = {
        name: value for name, value in manager.sentinel_kwargs.items() if name in ("username", "password", "ssl")
    }
    options.pop("host", None)
    options.pop("port", None)
    make: Any = AsyncSentinel
    return make(sentinels, sentinel_kwargs=sentinel_options or None).master_for(pool.service_name, **options)


def _derive_cluster(client: Any) -> AsyncRedis:
    known = inspect.signature(aioredis.RedisCluster.__init__).parameters
    options = {
        name: value
        for name, value in client.nodes_manager.connection_kwargs.items()
        if name in known and name not in ("host", "port", "retry", "protocol") and value is not None
    }
    nodes = [aioredis.cluster.ClusterNode(n.host, n.port) for n in client.get_nodes()]
    return aioredis.RedisCluster(startup_nodes=nodes, **options)


class LoopClients:
    """One asynchronous client for each event loop, because its connections belong to the loop.

    A client is closed with its loop: an asynchronous generator that waits on the loop holds it, and ending a loop
    (`asyncio.run` does it, by `shutdown_asyncgens`) ends its generators first.
    """

    def __init__(self, make: Callable[[], AsyncRedis], given: AsyncRedis | None = None) -> None:
        """Remember how to make clients; `given` serves the first loop that asks, and is not closed."""
        self._make = make
        self._given = given
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
            given, self._given = self._given, None
            client = self._make() if given is None else given
            holder = self._hold(weakref.ref(loop), client, ours=given is None)
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
            if loop.is_running():
                loop.call_soon_threadsafe(_close_soon, loop, holder)

    async def _hold(self, loop: weakref.ref[asyncio.AbstractEventLoop], client: AsyncRedis, *, ours: bool) -> _Holder:
        try:
            yield
        finally:
            if (ending := loop()) is not None:
                self._open.pop(ending, None)
            if ours:
                await client.aclose()


def _close_soon(loop: asyncio.AbstractEventLoop, holder: _Holder) -> None:
    task = loop.create_task(holder.aclose())
    # The loop holds its tasks weakly.
    _closing.add(task)
    task.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()
