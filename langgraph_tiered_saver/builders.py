"""What a runtime is built from: URLs, the environment, or the user's own clients. Checks first, connects never."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from psycopg_pool import ConnectionPool

from langgraph_tiered_saver.cold.pool import ColdPool, check_url, make_pool
from langgraph_tiered_saver.config import ENVIRONMENT_PREFIX, TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import clients
from langgraph_tiered_saver.runtime import Runtime, clone_pool

_URL_VARIABLES = {
    "Redis": (ENVIRONMENT_PREFIX + "REDIS_URL", "REDIS_URL"),
    "PostgreSQL": (ENVIRONMENT_PREFIX + "POSTGRES_URL", "DATABASE_URL"),
}


def urls_from_env() -> tuple[str, str]:
    """Find the servers' URLs in the environment.

    Raises:
        ConfigurationError: one is missing; the message names its variables.
    """
    found = []
    for server, names in _URL_VARIABLES.items():
        url = next((os.environ[name] for name in names if os.environ.get(name)), None)
        if url is None:
            raise ConfigurationError(f"No URL for {server}: set {names[0]} (or {names[1]}).")
        found.append(url)
    return found[0], found[1]


def from_urls(redis_url: str, postgres_url: str, config: TieredConfig) -> Callable[[], Runtime]:
    """Give a maker of runtimes that connect by URL.

    Raises:
        ConfigurationError: a URL cannot be read.
    """
    check_url(postgres_url)
    clients.from_url(redis_url, config)

    def build() -> Runtime:
        client, make_async = clients.from_url(redis_url, config)
        pool = ColdPool(make_pool(postgres_url, config), config, ours=True)
        return Runtime(client, clients.LoopClients(make_async), pool, config, close_client=True)

    return build


def from_clients(
    redis: Any, pool: ConnectionPool[Any], async_redis: Any, config: TieredConfig
) -> Callable[[], Runtime]:
    """Give a maker of runtimes that use the user's clients.

    Raises:
        ConfigurationError: a client is of a kind that cannot be used.
    """
    if not isinstance(pool, ConnectionPool):
        raise ConfigurationError(
            f"pool is a {type(pool).__name__}; pass a psycopg_pool.ConnectionPool, which serves async callers too."
        )
    if not hasattr(redis, "execute_command") or asyncio.iscoroutinefunction(redis.execute_command):
        raise ConfigurationError(
            f"redis is a {type(redis).__name__} of {type(redis).__module__}; pass a synchronous redis.Redis or "
            "redis.RedisCluster, and the asynchronous one as async_redis= if it cannot be derived."
        )
    clients.check_decoding(redis)
    if async_redis is None:
        clients.derive_async(redis, config)
    else:
        clients.check_decoding(async_redis)
    owner = os.getpid()

    def make_async() -> Any:
        return clients.derive_async(redis, config)()

    def build() -> Runtime:
        if os.getpid() == owner:
            cold, given_async = ColdPool(pool, config, ours=False), async_redis
        else:
            # A forked child must not share the pool's sockets, nor those of an event loop it does not have.
            cold, given_async = ColdPool(clone_pool(pool, config), config, ours=True), None
        loops = clients.LoopClients(make_async, given_async)
        return Runtime(redis, loops, cold, config, close_client=False)

    return build
