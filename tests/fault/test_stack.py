"""The servers under test control do what they are told, so that the other tests' faults are real ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from langgraph_tiered_saver import TieredSaver
from tests.fault.proxy import Proxy
from tests.fault.stack import RedisServer, Stack, lives

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Both servers, for the tests of this module; each test leaves them running."""
    with Stack() as stack:
        yield stack


def test_redis_comes_back_with_what_it_had_or_less(stack: Stack) -> None:
    """A restart keeps the data, a truncated file its beginning, a wipe nothing; each has a run id of its own."""
    server = stack.redis
    runs = {server.run_id()}
    server.sync_from_now()
    with server.client() as client:
        for number in range(200):
            client.set(f"key-{number}", number)

        server.restart()
        assert client.dbsize() == 201
        runs.add(server.run_id())

        assert server.restart_truncated(0.5) > 0
        left = {int(key.split(b"-")[1]) for key in client.scan_iter("key-*", 1000)}
        assert left == set(range(len(left)))
        assert 0 < len(left) < 200
        runs.add(server.run_id())

        server.restart_wiped()
        assert client.dbsize() == 0
        assert len(runs | {server.run_id()}) == 4


def test_redis_refuses_writes_and_stalls(stack: Stack) -> None:
    """Out of memory it reads but does not write; paused it accepts and does not answer; then all is well again."""
    server = stack.redis
    with server.client(socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as client:
        client.set("key", "value")
        server.run_out_of_memory()
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("key", "other")
        assert client.get("key") == b"value"
        server.config_set(maxmemory=0)
        client.set("key", "other")

        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("key")
        server.go_on()

        assert client.get("key") == b"other"
        server.flushall()
        assert client.dbsize() == 0


def test_redis_loads_for_as_long_as_it_is_told_to(stack: Stack) -> None:
    """Loading after a restart, or as a replica on connections that stay, it answers LOADING; then it has its data."""
    server = stack.redis
    once = Retry(NoBackoff(), 0)
    with server.client(retry=once) as client, RedisServer() as master, master.client() as at_master:
        client.set("key", "value")
        before = server.run_id()
        server.restart_loading()
        with pytest.raises(redis.BusyLoadingError):
            client.get("key")
        assert server.is_loading()
        assert server.run_id() != before, "what tells of the server itself is answered"
        server.finish_loading()
        assert client.get("key") == b"value"
        assert client.dbsize() == 1

        at_master.set("key", "other")
        connection, before = client.client_id(), server.run_id()
        server.load_slowly_from(master)
        assert client.client_id() == connection
        with pytest.raises(redis.BusyLoadingError):
            client.get("key")
        assert server.run_id() == before
        server.finish_loading()
        assert client.get("key") == b"other"
        assert client.dbsize() == 1
        server.flushall()


def test_a_lagging_replica_is_promoted(stack: Stack) -> None:
    """A replica that heard nothing of its master's last writes becomes a master without them."""
    with RedisServer() as master, RedisServer() as replica, Proxy(master.port) as link, master.client() as client:
        replica.replicate(link.port)
        client.set("early", 1)
        assert client.wait(1, 5000) == 1
        link.deaf()
        client.set("late", 1)

        master.kill()
        replica.promote()

        with replica.client() as promoted:
            promoted.set("later", 1)
            assert sorted(promoted.keys()) == [b"early", b"later"]


def test_postgres_dies_with_every_process_and_comes_back(stack: Stack) -> None:
    """After each way to die no process of the old server lives, sessions are cut, and what was committed is there."""
    server = stack.postgres
    with server.connect() as connection:
        connection.execute("CREATE TABLE kept (number INTEGER)")
    deaths: tuple[Callable[[], None], ...] = (
        server.crash,
        partial(server.restart, "immediate"),
        partial(server.restart, "fast"),
    )
    for number, die in enumerate(deaths):
        with closing(server.connect()) as connection:
            connection.execute("INSERT INTO kept VALUES (%s)", (number,))
            old = server._all()
            assert len(old) > 3

            die()

            assert not any(lives(process) for process in old)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        with server.connect() as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (number + 1,)


def test_postgres_stalls_and_goes_on(stack: Stack) -> None:
    """Paused, no session answers and new ones wait; then both get their answers."""
    server = stack.postgres
    with server.connect() as connection, ThreadPoolExecutor(2) as executor:
        server.pause()
        answers = [
            executor.submit(connection.execute, "SELECT 1"),
            executor.submit(lambda: server.connect().execute("SELECT 1")),
        ]
        assert {process.status() for process in server._all()} == {psutil.STATUS_STOPPED}
        assert not wait(answers, timeout=0.1).done
        server.go_on()
        assert [answer.result(10).fetchone() for answer in answers] == [(1,), (1,)]


def test_postgres_refuses(stack: Stack) -> None:
    """Read-only, out of connections, and errors of any kind in the statements that a saver writes with."""
    server = stack.postgres
    with TieredSaver.from_conn_string(stack.redis.url, server.url) as saver:
        saver.setup()
    with psycopg.connect(server.url, autocommit=True) as session:
        server.set_read_only(True)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            session.execute("CREATE TABLE more ()")
        server.set_read_only(False)
        session.execute("CREATE TABLE more ()")

        with server.hold_connections() as held:
            assert held > 50
            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                psycopg.connect(server.url)
        psycopg.connect(server.url).close()

        for sqlstate in ("53100", "40001", "40P01"):
            server.raise_in_writes(sqlstate, 2)
            for _ in range(2):
                with pytest.raises(psycopg.Error) as error:
                    session.execute("DELETE FROM checkpoint_blobs")
                assert error.value.sqlstate == sqlstate
            session.execute("DELETE FROM checkpoint_blobs")
            assert server.raised() == 2
