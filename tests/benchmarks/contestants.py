"""Everybody who takes part, on connections of the same kinds: the peers as their documentation opens them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import redis
import redis.asyncio as aioredis
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from langgraph_tiered_saver import TieredConfig, TieredSaver
from tests.benchmarks.report import MEMORY, OURS, POSTGRES
from tests.benchmarks.stage import Stage, Urls

Saver = BaseCheckpointSaver[Any]
Savers = dict[str, Saver]

THROUGH = 'TieredSaver, write_mode="through"'
PLAIN = "plainredis RedisSaver"
VALKEY = "ValkeySaver (aws)"
EVERYBODY = (MEMORY, OURS, POSTGRES, PLAIN, VALKEY)

_POOL_SIZE = 10  # PostgreSQL's
_REDIS_POOL_SIZE = TieredConfig().redis_pool_size  # as many for everybody
_OPTIONS = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
_databases: WeakKeyDictionary[Saver, str] = WeakKeyDictionary()
_PLAIN_DATABASE, _VALKEY_DATABASE = 1, 2  # of Redis


def tiered(stage: Stage, stack: ExitStack | AsyncExitStack, urls: Urls | None = None, **settings: Any) -> TieredSaver:
    """Open a TieredSaver on a database and a key prefix of its own."""
    urls = urls or stage.urls
    database = urls.database(stack.enter_context(stage.database()))
    saver = TieredSaver.from_conn_string(urls.redis, database, key_prefix=uuid.uuid4().hex, **settings)
    _databases[saver] = database
    stack.callback(saver.close)
    if isinstance(stack, AsyncExitStack):
        # It closes the client of the stack's event loop too, and then `close` has nothing left to do.
        stack.push_async_callback(saver.aclose)
    stack.callback(_note_detours, stage, saver)
    saver.setup()
    return saver


def postgres(stage: Stage, stack: ExitStack | AsyncExitStack, urls: Urls | None = None) -> PostgresSaver:
    """Open a PostgresSaver on a database of its own."""
    urls = urls or stage.urls
    return postgres_at(urls.database(stack.enter_context(stage.database())), stack)


def postgres_at(url: str, stack: ExitStack | AsyncExitStack) -> PostgresSaver:
    """Open a PostgresSaver on a pool."""
    pool: ConnectionPool[Any] = ConnectionPool(url, kwargs=_OPTIONS, min_size=_POOL_SIZE, open=False)
    stack.enter_context(pool)
    pool.wait()
    saver = PostgresSaver(pool)
    _databases[saver] = url
    saver.setup()
    return saver


async def async_postgres_at(url: str, stack: AsyncExitStack) -> AsyncPostgresSaver:
    """Open an AsyncPostgresSaver on a pool."""
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(url, kwargs=_OPTIONS, min_size=_POOL_SIZE, open=False)
    await stack.enter_async_context(pool)
    await pool.wait()
    saver = AsyncPostgresSaver(pool)
    await saver.setup()
    return saver


def open_savers(stage: Stage, stack: ExitStack, names: tuple[str, ...] = EVERYBODY, urls: Urls | None = None) -> Savers:
    """Open synchronous savers; those whose package is missing are left out, see `absentees`."""
    urls = urls or stage.urls
    savers: Savers = {}
    for name in _present(names):
        if name == MEMORY:
            savers[name] = InMemorySaver()
        elif name in (OURS, THROUGH):
            savers[name] = tiered(stage, stack, urls, write_mode="behind" if name == OURS else "through")
        elif name == POSTGRES:
            savers[name] = postgres(stage, stack, urls)
        elif name == PLAIN:
            from langgraph_checkpoint_plainredis import RedisSaver

            url = urls.redis_database(_PLAIN_DATABASE)
            # 64 graphs at once would be more than the 100 connections of the usual pool, which then raises.
            pool = redis.BlockingConnectionPool.from_url(url, protocol=2, max_connections=_REDIS_POOL_SIZE)
            savers[name] = RedisSaver(stack.enter_context(redis.Redis.from_pool(pool)))
        else:
            import valkey
            from langgraph_checkpoint_aws import ValkeySaver

            url = urls.redis_database(_VALKEY_DATABASE)
            peers = valkey.BlockingConnectionPool.from_url(url, max_connections=_REDIS_POOL_SIZE)
            savers[name] = ValkeySaver(stack.enter_context(valkey.Valkey.from_pool(peers)))
    return savers


async def open_async_savers(
    stage: Stage, stack: AsyncExitStack, names: tuple[str, ...] = EVERYBODY, urls: Urls | None = None
) -> Savers:
    """Open savers for the running event loop."""
    urls = urls or stage.urls
    savers: Savers = {}
    for name in _present(names):
        if name == MEMORY:
            savers[name] = InMemorySaver()
        elif name in (OURS, THROUGH):
            savers[name] = tiered(stage, stack, urls, write_mode="behind" if name == OURS else "through")
        elif name == POSTGRES:
            url = urls.database(stack.enter_context(stage.database()))
            savers[name] = await async_postgres_at(url, stack)
        elif name == PLAIN:
            from langgraph_checkpoint_plainredis import AsyncRedisSaver

            url = urls.redis_database(_PLAIN_DATABASE)
            pool = aioredis.BlockingConnectionPool.from_url(url, protocol=2, max_connections=_REDIS_POOL_SIZE)
            savers[name] = AsyncRedisSaver(await stack.enter_async_context(aioredis.Redis.from_pool(pool)))
        else:
            import valkey.asyncio as aiovalkey
            from langgraph_checkpoint_aws import AsyncValkeySaver

            url = urls.redis_database(_VALKEY_DATABASE)
            peers = aiovalkey.BlockingConnectionPool.from_url(url, max_connections=_REDIS_POOL_SIZE)
            savers[name] = AsyncValkeySaver(await stack.enter_async_context(aiovalkey.Valkey.from_pool(peers)))
    return savers


def database_of(saver: Saver) -> str:
    """Give the URL of the database that a saver of this module was opened on."""
    return _databases[saver]


def _note_detours(stage: Stage, saver: TieredSaver) -> None:
    """Say so if calls were measured that went past Redis."""
    stats = saver.stats()
    if stats.direct_writes or stats.direct_reads:
        stage.notes.append(
            f"{stats.direct_writes} writes and {stats.direct_reads} reads of a TieredSaver went past Redis, because "
            "this machine stood still for longer than a process may."
        )


def settle(saver: Saver) -> None:
    """Let what a saver does in the background end in its own turn, so that nobody else's pays for it."""
    if isinstance(saver, TieredSaver):
        saver.flush()


async def asettle(saver: Saver) -> None:
    """Do what `settle` does, in an event loop."""
    if isinstance(saver, TieredSaver):
        await saver.aflush()


def absentees() -> Mapping[str, str]:
    """Tell who does not take part, and why."""
    missing: dict[str, str] = {}
    for name, modules in (
        (PLAIN, ("langgraph_checkpoint_plainredis",)),
        (VALKEY, ("valkey", "langgraph_checkpoint_aws")),
    ):
        try:
            for module in modules:
                __import__(module)
        except ImportError as error:
            missing[name] = f'{name} takes no part: {error}. pip install -e ".[bench]" brings it.'
    return missing


def _present(names: tuple[str, ...]) -> list[str]:
    away = absentees()
    return [name for name in names if name not in away]
