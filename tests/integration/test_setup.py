"""Setup on every kind of database, from any number of processes at once; and clients that the user brings."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import psycopg_pool
import pytest
import redis
import redis.asyncio as aioredis
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row, tuple_row

from langgraph_tiered_saver import ColdTierUnavailableError, ConfigurationError, TieredConfig, TieredSaver
from langgraph_tiered_saver.cold import schema
from langgraph_tiered_saver.cold.schema import LOCK_CLASS, SETUP_LOCK
from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.hot.keys import meta_key
from tests.fault.workers import ROOT, Chain, address, assert_durable, count_checkpoints, values_of

OURS = {
    "tiered_deltas",
    "tiered_generation",
    "tiered_members",
    "tiered_migrations",
    "tiered_quarantine",
    "tiered_retention",
    "tiered_state",
    "tiered_threads",
}
THEIRS = {"checkpoints", "checkpoint_blobs", "checkpoint_writes", "checkpoint_migrations"}


def look(postgres_url: str, postgres_schema: str = "public") -> dict[str, list[tuple[Any, ...]]]:
    """Read the structure of a schema: each table's columns and indexes."""
    with psycopg.connect(postgres_url) as connection:
        found: dict[str, list[tuple[Any, ...]]] = {}
        for table, *column in connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
            "WHERE table_schema = %s ORDER BY table_name, ordinal_position",
            (postgres_schema,),
        ):
            found.setdefault(table, []).append(tuple(column))
        for table, name, valid in connection.execute(
            "SELECT t.relname, i.relname, indisvalid FROM pg_index JOIN pg_class i ON i.oid = indexrelid "
            "JOIN pg_class t ON t.oid = indrelid JOIN pg_namespace n ON n.oid = t.relnamespace "
            "WHERE n.nspname = %s ORDER BY 1, 2",
            (postgres_schema,),
        ):
            found[table].append(("index", name, valid))
        return found


def recorded(postgres_url: str) -> dict[str, str]:
    """Read the settings that the first setup recorded."""
    with psycopg.connect(postgres_url) as connection:
        return dict(connection.execute("SELECT name, value FROM tiered_state").fetchall())


@pytest.fixture(scope="module")
def expected_tables(servers: EmbeddedServers) -> dict[str, Any]:
    """What a setup on an empty database makes; in a schema of its own, which the database's own tables do not meet."""
    name = f"model-{uuid.uuid4().hex}"
    with TieredSaver.from_conn_string(
        servers.redis_url, servers.postgres_url, key_prefix=name, postgres_schema=name
    ) as saver:
        saver.setup()
    tables = look(servers.postgres_url, name)
    with psycopg.connect(servers.postgres_url) as connection:
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))
    return tables


# --- databases -------------------------------------------------------------------------------------------------------


def test_an_empty_database(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """Setup makes PostgresSaver's tables, ours beside them, and every index is valid."""
    make_saver(shard_count=7).setup()

    tables = look(postgres_url)
    assert set(tables) == OURS | THEIRS
    assert all(valid for columns in tables.values() for kind, _, valid in columns if kind == "index")
    assert ("tiered_seq", "bigint", "YES") in tables["checkpoints"]
    assert ("tiered_seq", "bigint", "YES") in tables["checkpoint_writes"]
    assert recorded(postgres_url) == {"shards": "7", "storage": "standard"}
    with PostgresSaver.from_conn_string(postgres_url) as cold:
        cold.setup()
    assert look(postgres_url) == tables


def test_twice(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """Setting up again, by the same saver, another one and asynchronously, changes nothing and loses nothing."""
    saver = make_saver()
    saver.setup()
    acked = [Chain(saver, "red").put()]
    saver.flush()
    before = look(postgres_url), recorded(postgres_url)

    saver.setup()
    asyncio.run(saver.asetup())
    make_saver().setup()

    assert (look(postgres_url), recorded(postgres_url)) == before
    assert_durable(postgres_url, acked)
    assert saver.get_tuple(address("red")) is not None


def test_a_database_that_postgres_saver_made(
    make_saver: Callable[..., TieredSaver], postgres_url: str, expected_tables: dict[str, Any]
) -> None:
    """A thread that PostgresSaver wrote resumes under us, goes on, and both read all of it."""
    with PostgresSaver.from_conn_string(postgres_url) as cold:
        cold.setup()
        old = Chain(cold, "red")  # type: ignore[arg-type]
        acked = [record for _ in range(3) for record in (old.put(), old.write())]
        before = [at.checkpoint for at in cold.list(address("red"))]

    saver = make_saver()
    found = saver.get_tuple(address("red"))

    assert found is not None
    assert found.checkpoint["channel_values"] == values_of("red", 2)
    assert [at.checkpoint for at in saver.list(address("red"))] == before
    new = Chain(saver, "red")
    new.config, new.versions, new.step = old.config, old.versions, old.step
    acked += [record for _ in range(3) for record in (new.put(), new.write())]
    saver.flush()
    assert_durable(postgres_url, acked)
    assert count_checkpoints(postgres_url) == 6
    assert look(postgres_url) == expected_tables
    with PostgresSaver.from_conn_string(postgres_url) as cold:
        assert [at.checkpoint for at in cold.list(address("red"))][3:] == before
        assert len([at.checkpoint for at in saver.list(address("red"))]) == 6


def test_an_old_database_of_postgres_saver(
    make_saver: Callable[..., TieredSaver], postgres_url: str, expected_tables: dict[str, Any]
) -> None:
    """A database that an older PostgresSaver left unfinished is brought to its newest version first."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for version, migration in enumerate(PostgresSaver.MIGRATIONS[:4]):
            connection.execute(migration.encode())
            connection.execute("INSERT INTO checkpoint_migrations VALUES (%s)", (version,))

    make_saver().setup()

    def sorted_columns(tables: dict[str, Any]) -> dict[str, Any]:
        return {table: sorted(columns) for table, columns in tables.items()}

    assert sorted_columns(look(postgres_url)) == sorted_columns(expected_tables)


# Twenty processes are forked from one that has imported everything, and begin at the same moment.
TWENTY = """
import asyncio, os, sys
from langgraph_tiered_saver import TieredSaver
from tests.fault.workers import Chain
start, go = os.pipe()
pids = []
for number in range(20):
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(start, 1)  # ends when the parent closes the other end
        # The first one to record its shard count wins.
        settings = {"key_prefix": sys.argv[3], "shard_count": 3 + number, "postgres_pool_size": 2}
        with TieredSaver.from_conn_string(*sys.argv[1:3], **settings) as saver:
            if number % 3 == 0:
                saver.setup()
            elif number % 3 == 1:
                asyncio.run(saver.asetup())
            Chain(saver, f"thread {number}").put()
        os._exit(0)
    pids.append(pid)
os.close(go)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""


@pytest.mark.parametrize("made_by", ["nobody", "PostgresSaver"])
def test_twenty_processes_at_once(
    made_by: str,
    make_saver: Callable[..., TieredSaver],
    redis_url: str,
    postgres_url: str,
    key_prefix: str,
    expected_tables: dict[str, Any],
) -> None:
    """All of twenty simultaneous setups succeed, the tables are right, and all agree on what was recorded."""
    if made_by == "PostgresSaver":
        with PostgresSaver.from_conn_string(postgres_url) as cold:
            cold.setup()

    done = subprocess.run(
        [sys.executable, "-c", TWENTY, redis_url, postgres_url, key_prefix],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, f"{[0] * 20}\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert look(postgres_url) == expected_tables
    shards = int(recorded(postgres_url)["shards"])
    assert 3 <= shards < 23
    with redis.Redis.from_url(redis_url) as client:
        assert client.hgetall(meta_key(key_prefix)) == {
            b"format": b"2",
            b"shards": b"%d" % shards,
            b"generation": b"1",
            b"opened": b"1",
            b"instances": client.info("server")["run_id"].encode(),
        }
        used = {int(key.split(b"}")[0].rpartition(b":")[2]) for key in client.scan_iter(f"{{{key_prefix}:*", 1000)}
    assert max(used) < shards
    assert len(list(make_saver().list(None))) == 20


def test_a_setup_waits_for_another_and_gives_up(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I8: a setup that another process's never lets in ends at its time-out, with an error that says so."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, SETUP_LOCK))

        with pytest.raises(ColdTierUnavailableError, match="Another process has been setting up"):
            make_saver(flush_timeout=0.3).setup()

    assert look(postgres_url) == {}
    make_saver().setup()


@pytest.mark.parametrize(
    "postgres_schema",
    ["With Spaces", 'a "quoted" one', "o'brien; --", "ünï-コード", "CAPITALS", "$users, b", "select"],
)
def test_a_schema_of_any_name(
    postgres_schema: str,
    make_saver: Callable[..., TieredSaver],
    postgres_url: str,
    redis_url: str,
    key_prefix: str,
    expected_tables: dict[str, Any],
) -> None:
    """The schema is made, quoted, and holds everything; nothing lands anywhere else."""
    saver = make_saver(postgres_schema=postgres_schema)
    chain = Chain(saver, "red")
    chain.put(), chain.write()
    saver.flush()

    assert look(postgres_url) == {}
    # Indexes and columns alike, in the schema of that name.
    assert look(postgres_url, postgres_schema) == expected_tables
    with psycopg.connect(postgres_url) as connection:
        count = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(postgres_schema, "checkpoints"))
        assert connection.execute(count).fetchone() == (1,)
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.scan_iter(f"{{{key_prefix}:*:hot:*", 1000))
    found = make_saver(postgres_schema=postgres_schema).get_tuple(address("red"))
    assert found is not None
    assert found.checkpoint["channel_values"] == values_of("red", 0)
    saver.delete_thread("red")
    assert list(saver.list(None)) == []


def test_a_schema_that_cannot_be_named(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """PostgreSQL takes "$user" in a search_path for the user's name, also in quotes: refused, and nothing is made."""
    with pytest.raises(ConfigurationError, match="postgres_schema"):
        make_saver(postgres_schema="$user").setup()
    assert look(postgres_url) == {}


def test_two_schemas_in_one_database(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """Two installations side by side see nothing of each other, tables and keys alike."""
    with contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(
                TieredSaver.from_conn_string(
                    redis_url, postgres_url, key_prefix=f"{key_prefix}-{name}", postgres_schema=name
                )
            )
            for name in ("one", "two")
        )
        Chain(one, "red").put()
        Chain(two, "blue").put()
        one.flush(), two.flush()

        assert two.get_tuple(address("red")) is None
        assert [thread.thread_id for thread in one.thread_ids()] == ["red"]
        assert [thread.thread_id for thread in two.thread_ids()] == ["blue"]


def test_without_auto_setup(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I7: with auto_setup off, use before setup() is an error that names it and makes nothing; after it, all works."""
    saver = make_saver(auto_setup=False)
    calls: list[Callable[[], Any]] = [
        lambda: saver.get_tuple(address("red")),
        lambda: Chain(saver, "red").put(),
        lambda: list(saver.list(None)),
        lambda: asyncio.run(Chain(saver, "red").aput()),
        lambda: saver.delete_thread("red"),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=r"auto_setup.*setup\(\)"):
            call()
    assert look(postgres_url) == {}

    saver.setup()

    acked = [Chain(saver, "red").put()]
    saver.flush()
    assert_durable(postgres_url, acked)
    assert make_saver(auto_setup=False).get_tuple(address("red")) is not None


@pytest.mark.parametrize(
    "drop",
    [
        "DROP SCHEMA public CASCADE; CREATE SCHEMA public",
        f"DROP TABLE {', '.join(sorted(THEIRS))}",
        f"DROP TABLE {', '.join(sorted(OURS))}",
        "DROP TABLE checkpoint_writes",
        "ALTER TABLE checkpoints DROP COLUMN tiered_seq",
    ],
    ids=["everything", "PostgresSaver's", "ours", "one", "a column"],
)
def test_tables_that_disappear(
    drop: str,
    make_saver: Callable[..., TieredSaver],
    postgres_url: str,
    expected_tables: dict[str, Any],
) -> None:
    """I1: somebody drops tables under a saver that runs: it makes them anew, and what comes then is kept."""
    saver = make_saver(flush_timeout=5.0)
    before = Chain(saver, "before")
    before.put(), before.write()
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(drop.encode())

    after = Chain(saver, "after")
    acked = [record for _ in range(3) for record in (after.put(), after.write())]
    saver.flush()

    assert_durable(postgres_url, acked)
    assert len(list(saver.list(address("after")))) == 3
    saver.delete_thread("after")

    def unordered(tables: dict[str, Any]) -> dict[str, Any]:
        return {table: sorted(columns) for table, columns in tables.items()}

    assert unordered(look(postgres_url)) == unordered(expected_tables)


def test_a_database_that_was_made_anew(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """I7: a read that meets no tables, with nothing to flush, makes them and says what is true: nothing is there."""
    saver = make_saver()
    saver.setup()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    assert saver.get_tuple(address("nobody")) is None
    assert list(saver.list(None)) == []
    assert set(look(postgres_url)) == OURS | THEIRS


def test_the_recorded_shard_count_wins(
    make_saver: Callable[..., TieredSaver],
    postgres_url: str,
    redis_url: str,
    key_prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A saver with another shard_count finds the threads of the first one, and says that its setting is ignored."""
    first = make_saver(shard_count=5)
    for number in range(20):
        Chain(first, f"thread {number}").put()
    other = make_saver(shard_count=64)

    assert all(other.get_tuple(address(f"thread {number}")) for number in range(20))

    assert other.stats().hot_hits == 20
    assert "shard_count=64 is ignored" in caplog.text
    first.flush()
    # Also if Redis has forgotten everything: PostgreSQL knows.
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.scan_iter(f"{{{key_prefix}*", 1000))
    third = make_saver(shard_count=9)
    third.setup()
    assert recorded(postgres_url)["shards"] == "5"
    with redis.Redis.from_url(redis_url) as client:
        assert client.hget(meta_key(key_prefix), "shards") == b"5"


def test_sequence_numbers_go_on_after_redis_was_emptied(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """I6: a new clock in Redis starts beyond PostgreSQL's last number, though that lies in the future."""
    first = make_saver()
    Chain(first, "red").put()
    first.flush()
    first.close()
    future = 4_102_444_800_000_000  # the year 2100
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE tiered_threads SET tombstone = %s", (future,))
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.scan_iter(f"{{{key_prefix}*", 1000))

    second = make_saver()
    chain = Chain(second, "red")
    acked = [chain.put(), chain.write()]
    second.flush()

    assert_durable(postgres_url, acked)
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute("SELECT watermark FROM tiered_threads").fetchone()
    assert row is not None
    assert row[0] > future


def test_data_of_a_later_version_is_refused(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str
) -> None:
    """I7: what this version cannot read is an error, not an empty thread."""
    make_saver().setup()
    with redis.Redis.from_url(redis_url) as client:
        client.hset(meta_key(key_prefix), "format", "99")

    with pytest.raises(ConfigurationError, match="format '99'"):
        make_saver().get_tuple(address("red"))


# --- what the user brings --------------------------------------------------------------------------------------------


@pytest.fixture
def pool(postgres_url: str) -> Iterator[psycopg_pool.ConnectionPool[Any]]:
    """A pool as psycopg makes it: no autocommit, rows are tuples."""
    with psycopg_pool.ConnectionPool(postgres_url, min_size=2, max_size=4, open=True) as pool:
        pool.wait()
        yield pool


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the user's."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


def settings_of(pool: psycopg_pool.ConnectionPool[Any]) -> list[tuple[Any, ...]]:
    """Look at all of a pool's connections."""
    found = []
    with contextlib.ExitStack() as stack:
        for _ in range(pool.max_size):
            connection = stack.enter_context(pool.connection())
            row_factory, connection.row_factory = connection.row_factory, tuple_row
            rows = [
                connection.execute(f"SELECT current_setting('{name}')").fetchone()
                for name in ("search_path", "statement_timeout")
            ]
            connection.rollback() if not connection.autocommit else None
            connection.row_factory = row_factory
            found.append((connection.autocommit, row_factory, connection.prepare_threshold, *rows))
    return found


@pytest.mark.parametrize("postgres_schema", [None, "Of Its Own"])
@pytest.mark.parametrize("options", [{}, {"autocommit": True, "row_factory": dict_row}], ids=["plain", "as we like"])
def test_clients_of_the_users(
    options: dict[str, Any], postgres_schema: str | None, client: redis.Redis, postgres_url: str, key_prefix: str
) -> None:
    """A pool of any settings works, gets its connections back as they were, and is the user's to close."""
    path = "public, elsewhere"

    def configure(connection: psycopg.Connection[Any]) -> None:
        connection.execute(f"SET search_path = {path}")
        connection.execute("SET statement_timeout = '77s'")
        connection.commit()

    with psycopg_pool.ConnectionPool(
        postgres_url, min_size=4, max_size=4, kwargs=options, configure=configure, open=True
    ) as pool:
        pool.wait()
        before = settings_of(pool)
        assert {settings[3] for settings in before} == {(path,)}
        config = TieredConfig(key_prefix=key_prefix, postgres_schema=postgres_schema, postgres_pool_size=4)
        with TieredSaver(client, pool, config=config) as saver:
            chain = Chain(saver, "red")
            for _ in range(3):
                chain.put(), chain.write()
            saver.flush()
            assert len(list(saver.list(address("red")))) == 3
            saver.delete_thread("red")

            async def main() -> None:
                other = Chain(saver, "blue")
                await other.aput()
                assert await saver.aget_tuple(address("blue")) is not None
                assert len([at async for at in saver.alist(None)]) == 1

            asyncio.run(main())
            assert settings_of(pool) == before

        assert settings_of(pool) == before
        assert not pool.closed
    assert client.ping()
    tables = look(postgres_url, postgres_schema or "public")
    assert set(tables) == OURS | THEIRS


def test_a_search_path_of_the_users(client: redis.Redis, postgres_url: str, key_prefix: str) -> None:
    """Without postgres_schema, the tables are where the user's own connections look first."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA mine")
    options = {"options": "-c search_path=mine"}
    with (
        psycopg_pool.ConnectionPool(postgres_url, min_size=2, kwargs=options, open=True) as pool,
        TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix)) as saver,
    ):
        Chain(saver, "red").put()
        saver.flush()
    assert look(postgres_url) == {}
    assert set(look(postgres_url, "mine")) == OURS | THEIRS


def test_an_async_client_of_the_users(
    client: redis.Redis, redis_url: str, pool: psycopg_pool.ConnectionPool[Any], key_prefix: str
) -> None:
    """`async_redis` serves the first loop and stays open; another loop gets a derived one."""
    given = aioredis.Redis.from_url(redis_url, client_name=f"given-{key_prefix[-8:]}")
    saver = TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix), async_redis=given)

    async def main(thread_id: str) -> int:
        chain = Chain(saver, thread_id)
        await chain.aput()
        await chain.awrite()
        found = await saver.aget_tuple(address(thread_id))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(thread_id, 0)
        return sum(each["name"] == f"given-{key_prefix[-8:]}" for each in client.client_list())

    async def first() -> None:
        assert await main("red") == 1
        assert await given.ping()

    asyncio.run(first())
    asyncio.run(main("blue"))

    async def last() -> None:
        await saver.aclose()

    asyncio.run(last())
    assert client.ping()
    with pool.connection() as connection:
        row = connection.execute("SELECT count(*) FROM checkpoints").fetchone()
    assert row == (2,)


def test_close_leaves_the_users_async_client(
    client: redis.Redis, redis_url: str, pool: psycopg_pool.ConnectionPool[Any], key_prefix: str
) -> None:
    """The saver has connections of its own, made as those of `async_redis` are; aclose() does not close the user's."""

    async def main() -> None:
        given = aioredis.Redis.from_url(redis_url)
        assert await given.ping()
        async with TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix), async_redis=given) as saver:
            await Chain(saver, "red").aput()
        assert len(given.connection_pool._available_connections) == 1
        assert await given.ping()
        await given.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["password", "user", "unix socket", "database", "protocol 3", "no retries"])
def test_kinds_of_clients(
    kind: str,
    redis_url: str,
    servers: EmbeddedServers,
    pool: psycopg_pool.ConnectionPool[Any],
    key_prefix: str,
    tmp_path: Path,
) -> None:
    """Whatever a client was made with, the asynchronous one that is derived from it reaches the same server."""
    whole = redis.Redis.from_url(redis_url)
    options = dict(whole.connection_pool.connection_kwargs)
    basic = {name: options[name] for name in ("host", "port", "password")}
    user, password = "tiered-tester", "p@ss:w/rd #?é"
    if kind == "user":
        whole.acl_setuser(user, enabled=True, passwords=[f"+{password}"], commands=["+@all"], keys=["*"], reset=True)
        basic |= {"username": user, "password": password}
    elif kind == "database":
        basic["db"] = 3
    elif kind == "protocol 3":
        basic["protocol"] = 3
    elif kind == "no retries":
        basic |= {"retry": None, "health_check_interval": 1, "client_name": "somebody", "socket_keepalive": True}
    try:
        with contextlib.ExitStack() as stack:
            if kind == "unix socket":
                path = stack.enter_context(unix_socket_of(servers, str(tmp_path)))
                basic = {"unix_socket_path": path, "password": options["password"]}
            client = stack.enter_context(redis.Redis(**basic))
            saver = stack.enter_context(TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix)))
            chain = Chain(saver, "red")
            chain.put()

            async def main() -> None:
                await chain.aput()
                found = await saver.aget_tuple(address("red"))
                assert found is not None
                assert found.checkpoint["channel_values"] == values_of("red", 1)

            asyncio.run(main())
            found = saver.get_tuple(address("red"))
            assert found is not None
            assert found.checkpoint["channel_values"] == values_of("red", 1)
            # Everything went where the user's client looks, and nowhere else.
            assert client.exists(meta_key(key_prefix)) == 1
            assert whole.exists(meta_key(key_prefix)) == (0 if kind == "database" else 1)
            saver.flush()
    finally:
        whole.acl_deluser(user)
        whole.close()


@contextlib.contextmanager
def unix_socket_of(servers: EmbeddedServers, directory: str) -> Iterator[str]:
    """Offer the session's Valkey on a Unix socket, too, by passing bytes on."""
    port = urlsplit(servers.redis_url).port
    path = f"{directory}/redis.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    open_sockets: list[socket.socket] = [listener]

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield path
    finally:
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def test_a_password_in_a_url(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """A URL's user name and password may hold any character, if it is quoted as URLs want it."""
    user, password = "tiered-tester", "p@ss:w/rd #?é%41"
    parts = urlsplit(redis_url)
    url = f"redis://{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}/0"
    with redis.Redis.from_url(redis_url) as whole:
        whole.acl_setuser(user, enabled=True, passwords=[f"+{password}"], commands=["+@all"], keys=["*"], reset=True)
        try:
            with TieredSaver.from_conn_string(url, postgres_url, key_prefix=key_prefix) as saver:
                chain = Chain(saver, "red")
                chain.put()
                asyncio.run(chain.aput())
                saver.flush()
        finally:
            whole.acl_deluser(user)
    assert count_checkpoints(postgres_url) == 2


def test_a_connection_string_instead_of_a_url(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """PostgreSQL can be named as libpq's key=value pairs."""
    with TieredSaver.from_conn_string(redis_url, make_conninfo(postgres_url), key_prefix=key_prefix) as saver:
        Chain(saver, "red").put()
        saver.flush()
    assert count_checkpoints(postgres_url) == 1


def test_clients_that_are_refused(redis_url: str, postgres_url: str, client: redis.Redis) -> None:
    """What cannot work is refused when the saver is made, with what to pass instead."""
    pool = psycopg_pool.ConnectionPool[Any](postgres_url, open=False)
    text = redis.Redis.from_url(redis_url, decode_responses=True)
    async_text = aioredis.Redis.from_url(redis_url, decode_responses=True)
    async_client = aioredis.Redis.from_url(redis_url)

    class Odd(redis.Connection):
        """A kind of connection that nobody knows an asynchronous counterpart of."""

    odd = redis.Redis(connection_pool=redis.ConnectionPool(connection_class=Odd))
    asynchronous = psycopg_pool.AsyncConnectionPool[Any](postgres_url, open=False)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (text, pool, {}, "decode_responses=False"),
        (client, pool, {"async_redis": async_text}, "decode_responses=False"),
        (client, asynchronous, {}, r"AsyncConnectionPool; pass a psycopg_pool\.ConnectionPool"),
        (client, postgres_url, {}, r"str; pass a psycopg_pool\.ConnectionPool"),
        (async_client, pool, {}, r"pass a synchronous redis\.Redis"),
        (redis_url, pool, {}, r"pass a synchronous redis\.Redis"),
        (None, pool, {}, r"pass a synchronous redis\.Redis"),
        (odd, pool, {}, "async_redis="),
    ]

    for given, given_pool, options, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            TieredSaver(given, given_pool, **options)
    TieredSaver(odd, pool, async_redis=async_client).close()


@pytest.mark.parametrize("argument", ["?decode_responses=True", "?decode_responses=1"])
def test_a_url_that_asks_for_text_is_refused(argument: str, redis_url: str, postgres_url: str) -> None:
    """What a client may not do, a URL may not ask for."""
    with pytest.raises(ConfigurationError, match="decode_responses"):
        TieredSaver.from_conn_string(redis_url + argument, postgres_url)


def test_a_pool_that_is_not_open(client: redis.Redis, postgres_url: str, key_prefix: str) -> None:
    """I7: a pool that its user forgot to open, or closed, is a typed error with the reason."""
    pool = psycopg_pool.ConnectionPool[Any](postgres_url, open=False)
    saver = TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix, postgres_timeout=1.0))

    with pytest.raises((ColdTierUnavailableError, ConfigurationError), match="open"):
        saver.setup()

    saver.close()


def test_every_migration_is_recorded(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """A setup that was interrupted goes on where it ended."""
    saver = make_saver()
    saver.setup()
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute("SELECT v FROM tiered_migrations ORDER BY v").fetchall()
        assert rows == [(version,) for version in range(len(schema.MIGRATIONS))]
        connection.execute("DELETE FROM tiered_migrations WHERE v >= 2")
        connection.execute("DROP TABLE tiered_threads")

    make_saver().setup()

    assert set(look(postgres_url)) == OURS | THEIRS
