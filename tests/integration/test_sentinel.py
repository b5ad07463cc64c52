"""Clients and savers on a master that Sentinel watches, before and after a failover to a replica that lags."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis
from psycopg_pool import ConnectionPool
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.sentinel import Sentinel

from langgraph_tiered_saver import TieredConfig, TieredSaver
from langgraph_tiered_saver.hot import clients
from tests.fault.workers import Chain, address, assert_durable, locked_table
from tests.integration.valkeys import PASSWORD, SENTINEL_PASSWORD, Valkey, directory_of_servers, free_port, url
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVICE = "the-master"
CALM, HASTY = 60_000, 500  # milliseconds after which a silent server is gone; a busy machine makes servers silent
CONFIG = TieredConfig(redis_timeout=1.0)


class Guard:
    """Notes whose connections were made."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def connected(self, run_id: str) -> None:
        """Note it."""
        self.seen.append(run_id)


class Watched:
    """A master, its replica, and sentinels, of which all but one must agree that the master is gone."""

    def __init__(self, sentinels: int) -> None:
        """Start them."""
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(directory_of_servers())
            self.master = self._start(stack, Valkey(directory / "master", "repl-diskless-sync-delay 0"))
            follow = f"replicaof 127.0.0.1 {self.master.port}"
            self.replica = self._start(stack, Valkey(directory / "replica", follow))
            wait_until(lambda: self.replica.client.info("replication")["master_link_status"] == "up")
            self.sentinels = [
                self._start(
                    stack,
                    Valkey(
                        directory / f"sentinel-{number}",
                        f"sentinel monitor {SERVICE} 127.0.0.1 {self.master.port} {max(1, sentinels - 1)}",
                        f'sentinel auth-pass {SERVICE} "{PASSWORD}"',
                        f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"',
                        f"sentinel down-after-milliseconds {SERVICE} {CALM}",
                        f"sentinel failover-timeout {SERVICE} 2000",
                        sentinel=True,
                    ),
                )
                for number in range(sentinels)
            ]
            for each in self.sentinels:
                wait_until(
                    lambda sentinel=each: self._knows_all(sentinel, sentinels - 1),
                    message="the sentinels know each other",
                )
            self.stop = stack.pop_all().close

    @staticmethod
    def _start(stack: contextlib.ExitStack, server: Valkey) -> Valkey:
        stack.callback(server.stop)
        return server

    def _knows_all(self, sentinel: Valkey, others: int) -> bool:
        state = sentinel.client.sentinel_masters()[SERVICE]
        return bool(state["num-other-sentinels"] == others and state["num-slaves"] == 1)

    def set_patience(self, milliseconds: int) -> None:
        """Tell the sentinels after how long a silent master is gone."""
        for each in self.sentinels:
            each.client.sentinel_set(SERVICE, "down-after-milliseconds", milliseconds)

    @property
    def ports(self) -> list[int]:
        """Of the sentinels; nobody listens on the first one."""
        return [free_port(), *(sentinel.port for sentinel in self.sentinels)]

    @property
    def url(self) -> str:
        """For savers."""
        return url("redis+sentinel", self.ports, f"{SERVICE}?sentinel_password={quote(SENTINEL_PASSWORD)}")

    def masters(self, kind: Any = Sentinel) -> Any:
        """A client of the user's."""
        addresses = [("127.0.0.1", port) for port in self.ports]
        manager = kind(addresses, sentinel_kwargs={"password": SENTINEL_PASSWORD}, password=PASSWORD)
        return manager.master_for(SERVICE)


@pytest.fixture(scope="module")
def calm() -> Iterator[Watched]:
    """Servers that nobody harms."""
    watched = Watched(1)
    yield watched
    watched.stop()


def make_clients(watched: Watched, guard: Guard) -> dict[str, Any]:
    """Give a client of every origin; the asynchronous ones are still to be made."""
    client, make_async = clients.from_url(watched.url, CONFIG, guard)
    return {
        "URL": client,
        "user's": clients.guarded(watched.masters(), CONFIG, guard),
        "async URL": make_async,
        "async derived": clients.derive_async(watched.masters(), CONFIG, guard),
        "async user's": lambda: clients.aguarded(watched.masters(AsyncSentinel), CONFIG, guard)(),
    }


def run_ids_seen(made: dict[str, Any], guard: Guard) -> dict[str, set[str]]:
    """Use every client once on a new connection, and tell whom each one reached."""
    found = {}
    for origin, client in made.items():
        guard.seen.clear()
        if origin.startswith("async"):

            async def use(make: Callable[[], Any] = client) -> None:
                awaited = make()
                await awaited.set("key", "value")
                await awaited.aclose()

            asyncio.run(use())
        else:
            clients.reconnect(client)
            client.set("key", "value")
        found[origin] = set(guard.seen)
    return found


@pytest.mark.parametrize("origin", ["URL", "user's"])
def test_a_late_reply_is_nobody_elses(calm: Watched, origin: str) -> None:
    """A connection whose reply did not come in time is not used again: the next command gets its own reply.

    redis-py's own connections to a master behind Sentinel return to the pool, and give it to the next command.
    """
    client = make_clients(calm, Guard())[origin]
    client.set("key", "mine")
    calm.master.client.client_pause(1500, all=True)

    with pytest.raises(redis.TimeoutError):
        client.execute_command("ECHO", "late")

    began = time.monotonic()
    replies = []
    while not replies and time.monotonic() - began < 10:
        with contextlib.suppress(redis.TimeoutError):
            replies.append(client.get("key"))
    assert replies == [b"mine"]
    client.close()


def test_threads_at_once_lose_no_sentinel(calm: Watched) -> None:
    """The order in which the sentinels are asked changes, but each of them stays."""
    client = make_clients(calm, Guard())["URL"]
    manager = client.connection_pool.sentinel_manager
    before = {id(sentinel) for sentinel in manager.sentinels}

    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(client.connection_pool.get_master_address) for _ in range(50)))

    asyncio.run(main())

    assert {id(sentinel) for sentinel in manager.sentinels} == before
    assert len(manager.sentinels) == 2
    client.close()


@pytest.fixture
def doomed() -> Iterator[Watched]:
    """Servers of one test's own."""
    watched = Watched(3)
    yield watched
    watched.stop()


def test_a_failover_to_a_lagging_replica(doomed: Watched, postgres_url: str, key_prefix: str) -> None:
    """I1, I6, I9: what the replica never had is in PostgreSQL afterwards, and no read goes back behind it.

    The replica's link is cut before the last writes, and PostgreSQL held up, so that only their writers have them when
    the master dies. Every kind of client finds the new master, whose run id the guard is told.
    """
    guard = Guard()
    made = make_clients(doomed, guard)
    old, new = doomed.master.run_id(), doomed.replica.run_id()
    assert run_ids_seen(made, guard) == {origin: {old} for origin in made}
    assert clients.instances(made["URL"]) == {old}
    settings: dict[str, Any] = {"key_prefix": key_prefix, "redis_timeout": 1.0, "poll_interval": 0.2}
    with contextlib.ExitStack() as stack:
        pool: ConnectionPool[Any] = stack.enter_context(ConnectionPool(postgres_url, min_size=2, open=True))
        savers = [
            TieredSaver.from_conn_string(doomed.url, postgres_url, **settings),
            TieredSaver(doomed.masters(), pool, config=TieredConfig(**settings)),
        ]
        chains = []
        for saver in savers:
            stack.callback(saver.close)
            chains += [Chain(saver, f"thread-{len(chains) + number}") for number in range(4)]
        acked = [chain.put() for chain in chains]
        for saver in savers:
            saver.flush()
        # A replica with a wrong password stays a replica, and cannot come back.
        doomed.replica.client.config_set("masterauth", "wrong")
        doomed.master.client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        wait_until(lambda: doomed.replica.client.info("replication")["master_link_status"] == "down")
        doomed.set_patience(HASTY)
        with locked_table(postgres_url):
            for chain in chains:
                acked.extend((chain.write(), chain.put()))
            assert sum(saver.stats().backlog_records for saver in savers) >= len(chains)
            doomed.master.kill()

        def read_and_write() -> bool:
            for chain in chains:
                for saver in savers:
                    found = saver.get_tuple(address(chain.thread_id))
                    assert found is not None
                    assert found.checkpoint["id"] == chain.checkpoint_id
                acked.extend((chain.write(), chain.put()))
            promoted = doomed.replica.client.info("replication")["role"] == "master"
            return promoted and all(saver.stats().hot_trusted for saver in savers)

        wait_until(read_and_write, 30.0, "Redis is trusted again")
        doomed.set_patience(CALM)
        read_and_write()

        async def aread() -> None:
            for chain in chains:
                for saver in savers:
                    found = await saver.aget_tuple(address(chain.thread_id))
                    assert found is not None
                    assert found.checkpoint["id"] == chain.checkpoint_id

        asyncio.run(aread())
        assert run_ids_seen(made, guard) == {origin: {new} for origin in made}
        for origin in ("URL", "user's"):
            assert clients.instances(made[origin]) == {new}
            made[origin].close()
        for saver in savers:
            saver.flush()
            assert saver.stats().lost_records == 0
    assert_durable(postgres_url, acked)
