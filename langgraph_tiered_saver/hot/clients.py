"""Redis clients: made from a URL or derived from the user's, one set of connections for each event loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast
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
from langgraph_tiered_saver.redaction import redact

_SCHEMES = ("redis://", "rediss://", "unix://")
_RETRY_BASE = 0.02
_RETRY_CAP = 0.25

SyncRedis = Any  # redis.Redis or redis.RedisCluster; their stubs share no base with both calls we make
AsyncRedis = Any


def from_url(url: str, config: TieredConfig) -> tuple[SyncRedis, Callable[[], AsyncRedis]]:
    """Make a synchronous client, and a maker of asynchronous ones, without connecting.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py documents it.
        config: Time-outs, retries and pool size. What the URL's query says wins.

    Raises:
        ConfigurationError: the URL cannot be read. Its password is not repeated.
    """
    if not isinstance(url, str) or not url.startswith(_SCHEMES):
        raise ConfigurationError(
            f"The Redis URL {redact(str(url))!r} cannot be used: it must start with {', '.join(_SCHEMES)}."
        )
    options = {
        "socket_timeout": config.redis_timeout,
        "socket_connect_timeout": config.redis_timeout,
        "timeout": config.redis_timeout,
        "max_connections": config.redis_pool_size,
        "protocol": 2,
    }
    try:
        pool = redis.BlockingConnectionPool.from_url(url, **options, retry=_retry(Retry, redis.ConnectionError, config))
    except (ValueError, TypeError, AttributeError) as error:
        reason = redact(str(error), secrets_in=url)
        raise ConfigurationError(f"The Redis URL {redact(url)!r} cannot be read: {reason}.") from None
    client = redis.Redis(connection_pool=pool)
    check_decoding(client)

    def make_async() -> AsyncRedis:
        return aioredis.Redis(
            connection_pool=aioredis.BlockingConnectionPool.from_url(
                url, **options, retry=_retry(AsyncRetry, redis.ConnectionError, config)
            )
        )

    return client, make_async


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
    return lambda: aioredis.Redis(
        connection_pool=aioredis.BlockingConnectionPool(
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
    """One asynchronous client for each event loop, because its connections belong to the loop."""

    def __init__(self, make: Callable[[], AsyncRedis], given: AsyncRedis | None = None) -> None:
        """Remember how to make clients; `given` serves the first loop that asks."""
        self._make = make
        self._given = given
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncRedis] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def current(self) -> AsyncRedis:
        """Give the running loop's client."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            with self._lock:
                # A client's connections refer to their loop, so a loop that ended would stay for ever.
                for ended in [known for known in self._clients if known.is_closed()]:
                    del self._clients[ended]
                if self._given is not None:
                    client, self._given = self._given, None
                else:
                    client = self._make()
                self._clients[loop] = client
        return client

    async def close_current(self, *, keep: AsyncRedis | None = None) -> None:
        """Close the running loop's client, unless it is the user's."""
        with self._lock:
            client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None and client is not keep:
            await client.aclose()

    def close_others(self, *, keep: AsyncRedis | None = None) -> None:
        """Ask every other loop that still runs to close its client; connections of dead loops are just dropped."""
        with self._lock:
            others = list(self._clients.items())
            self._clients.clear()
        for loop, client in others:
            if client is not keep and loop.is_running():
                closing = cast("Callable[[], Awaitable[None]]", client.aclose)
                loop.call_soon_threadsafe(lambda c=closing, at=loop: at.create_task(c()))  # type: ignore[misc]
