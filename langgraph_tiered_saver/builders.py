"""What a runtime is built from: URLs, the environment, or the user's own clients. Checks first, connects never."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from psycopg_pool import ConnectionPool

from langgraph_tiered_saver.cold.pool import ColdPool, check_url, make_pool
from langgraph_tiered_saver.config import ENVIRONMENT_PREFIX, TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.health import InstanceGuard
from langgraph_tiered_saver.hot import clients
from langgraph_tiered_saver.runtime import Runtime, clone_pool

_PROBE_TIMEOUT = 0.5  # seconds in which a Redis that was away must answer to be looked at again

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
        guard = InstanceGuard()
        client, make_async = clients.from_url(redis_url, config, guard)
        pool = ColdPool(make_pool(postgres_url, config), config, ours=True)
        probing = _for_probes(config)
        return Runtime(
            client,
            clients.LoopClients(make_async),
            pool,
            config,
            guard=guard,
            make_probe=lambda: clients.from_url(redis_url, probing, like=client)[0],
        )

    return build


def _for_probes(config: TieredConfig) -> TieredConfig:
    return replace(config, redis_timeout=min(config.redis_timeout, _PROBE_TIMEOUT), redis_retries=0)


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

    def build() -> Runtime:
        guard = InstanceGuard()
        # The user's own connections are looked at by nobody, and must not be shared with a forked child.
        client = clients.guarded(redis, config, guard)
        make_async = (
            clients.derive_async(redis, config, guard)
            if async_redis is None
            else clients.aguarded(async_redis, config, guard)
        )
        same_process = os.getpid() == owner
        cold = ColdPool(pool if same_process else clone_pool(pool, config), config, ours=not same_process)
        probing = _for_probes(config)
        return Runtime(
            client,
            clients.LoopClients(make_async),
            cold,
            config,
            guard=guard,
            make_probe=lambda: clients.guarded(redis, probing, None),
        )

    return build
