"""Options of redis-py's connections and pools: what is taken over from a user's client, and what is ours."""

from __future__ import annotations

import contextlib
import inspect
import queue
from collections.abc import Mapping
from typing import Any

import redis
import redis.asyncio as aioredis
from redis import sentinel
from redis.asyncio import sentinel as async_sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import lanes

# Of a user's pool: what belongs to that very pool, would repeat commands, or needs RESP 3.
_NOT_TAKEN_OVER = frozenset({
    "cache", "cache_config", "command_packer", "connection_class", "connection_pool", "event_dispatcher",
    "himport_registry", "legacy_responses", "maint_notifications_config", "maint_notifications_pool_handler",
    "maintenance_notification_hash", "maintenance_state", "max_connections", "orig_host_address",
    "orig_socket_connect_timeout", "orig_socket_timeout", "oss_cluster_maint_notifications_handler",
    "parser_class", "protocol", "queue_class", "redis_connect_func", "retry", "retry_on_error",
    "retry_on_timeout", "timeout",
})  # fmt: skip
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")

COUNTERPARTS: Mapping[type, type] = {
    redis.SSLConnection: aioredis.SSLConnection,
    redis.UnixDomainSocketConnection: aioredis.UnixDomainSocketConnection,
    redis.Connection: aioredis.Connection,
    sentinel.SentinelManagedConnection: async_sentinel.SentinelManagedConnection,
    sentinel.SentinelManagedSSLConnection: async_sentinel.SentinelManagedSSLConnection,
}


def of_connections(config: TieredConfig) -> dict[str, Any]:
    """Give our time-outs and protocol, for connections whose other options a URL names."""
    return {**dict.fromkeys(_TIMEOUTS, config.redis_timeout), "protocol": 2}


def of_pools(config: TieredConfig) -> dict[str, Any]:
    """Give our bounds of a pool."""
    return {"max_connections": config.redis_pool_size, "timeout": config.redis_timeout}


def taken_over(given: Mapping[str, Any], config: TieredConfig) -> dict[str, Any]:
    """Give a user's connection options with our time-outs where they set none."""
    options = {name: value for name, value in given.items() if name not in _NOT_TAKEN_OVER}
    defaults = inspect.signature(redis.Redis.__init__).parameters
    for name, ours in of_connections(config).items():
        # redis-py writes its own default down as if the user had set it.
        if options.get(name) is None or options[name] == defaults[name].default:
            options[name] = ours
    return options


def known_to(connection_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a kind of connection does not know."""
    known: set[str] = set()
    for ancestor in connection_class.__mro__:
        if ancestor is not object:
            known |= set(inspect.signature(ancestor).parameters)
    return {name: value for name, value in options.items() if name in known}


def accepted_by(connection_class: type, options: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Leave out what an asynchronous kind of connection does not know.

    Args:
        connection_class: The kind.
        options: Options of a synchronous connection.
        others: Names of options that are kept all the same.

    Raises:
        ConfigurationError: that would make it less secure.
    """
    kept = known_to(connection_class, options) | {name: options[name] for name in others if name in options}
    if missed := [name for name, value in options.items() if name.startswith("ssl_") and value and name not in kept]:
        raise ConfigurationError(
            f"redis-py's asynchronous connections do not know {', '.join(missed)}. Pass a client as async_redis=... "
            "whose settings are as safe."
        )
    return kept


def retries(config: TieredConfig) -> Retry:
    """Give our retry policy.

    redis-py repeats ten times by default and counts a time-out as a reason; that would multiply ours by ten.
    """
    return Retry(lanes.backoff(), config.redis_retries, supported_errors=(redis.ConnectionError,))


def async_retries(config: TieredConfig) -> AsyncRetry:
    """Give our retry policy, for asynchronous connections."""
    return AsyncRetry(lanes.backoff(), config.redis_retries, supported_errors=(redis.ConnectionError,))


def none() -> Retry:
    """Give the policy that nothing is tried again."""
    return Retry(NoBackoff(), 0)


def async_none() -> AsyncRetry:
    """Give the policy that nothing is tried again, for asynchronous connections."""
    return AsyncRetry(NoBackoff(), 0)


def client_of(pool: Any) -> Any:
    """Make a synchronous client that owns its pool."""
    # The provider is named again because one that renews its credentials is told of the pool by the client.
    provider = pool.connection_kwargs.get("credential_provider")
    client = lanes.LaneClient(connection_pool=pool, credential_provider=provider)
    client.auto_close_connection_pool = True
    return client


def async_client_of(pool: Any) -> Any:
    """Make an asynchronous client that owns its pool."""
    provider = pool.connection_kwargs.get("credential_provider")
    client = lanes.AsyncLaneClient(connection_pool=pool, credential_provider=provider)
    client.auto_close_connection_pool = True
    return client


def close_idle(pool: Any) -> None:
    """Close the idle connections of a synchronous blocking pool; those in use are left alone."""
    # redis-py's own way may close one that another thread takes at that moment, and is missing before 7.0.
    idle = []
    with contextlib.suppress(queue.Empty):
        while True:
            idle.append(pool.pool.get_nowait())
    for connection in idle:
        if connection is not None:
            connection.disconnect()
    for connection in reversed(idle):
        pool.pool.put_nowait(connection)
