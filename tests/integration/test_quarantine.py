"""Threads of which PostgreSQL refuses a record for good: set aside, seen, tried again, dropped. The others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from langgraph.checkpoint.postgres import PostgresSaver
from typer.testing import CliRunner

from langgraph_tiered_saver import ThreadQuarantinedError, TieredSaver
from langgraph_tiered_saver.cli import FAILED, UNAVAILABLE, USAGE, app
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.records import CheckpointRecord, MaintenanceRecord, encode
from tests.fault.proxy import Proxy
from tests.fault.workers import Acked, Chain, address, assert_durable, values_of, writes_of
from tests.support import wait_until

NEVER = 3600.0  # seconds: the flusher writes only when somebody waits for it
TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "tiered_quarantine")


class Recording(Chain):
    """A chain that also remembers what it wrote, so that PostgresSaver can be given the same."""

    def __init__(self, saver: TieredSaver, thread_id: str) -> None:
        super().__init__(saver, thread_id)
        self.puts: list[tuple[Any, ...]] = []
        self.acked: list[Acked] = []

    def next(self) -> tuple[Any, ...]:
        self.puts.append(super().next())
        return self.puts[-1]

    def step_on(self, steps: int = 1) -> None:
        """Put checkpoints, each with the writes of a task."""
        for _ in range(steps):
            self.acked += [self.put(), self.write()]

    def repeat_on(self, other: PostgresSaver) -> None:
        """Write the same with PostgresSaver."""
        for step, (config, checkpoint, metadata, changed) in enumerate(self.puts):
            at = other.put(config, checkpoint, metadata, changed)
            other.put_writes(at, writes_of(self.thread_id, step), f"task-{step}")


class Database:
    """The test's database, in which it makes PostgreSQL refuse things."""

    def __init__(self, url: str) -> None:
        self.url = url

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def refuse(self, thread_id: str, step: int = 0) -> None:
        """Refuse a thread's checkpoint of a step, with 23514."""
        self.execute(
            "ALTER TABLE checkpoints ADD CONSTRAINT refused "
            f"CHECK (thread_id <> '{thread_id}' OR metadata ->> 'step' <> '{step}')"
        )

    def accept(self) -> None:
        """Refuse nothing any more."""
        self.execute("ALTER TABLE checkpoints DROP CONSTRAINT refused")

    def waiting(self, thread_id: str) -> list[tuple[Any, ...]]:
        """Give the sequence numbers and reasons of a thread's records in quarantine."""
        return self.execute(
            f"SELECT sequence, reason FROM tiered_quarantine WHERE thread_id = '{thread_id}' ORDER BY sequence"
        )

    def steps(self, thread_id: str) -> list[int]:
        """Give the steps of a thread's checkpoints."""
        rows = self.execute(
            f"SELECT (metadata ->> 'step')::int FROM checkpoints WHERE thread_id = '{thread_id}' ORDER BY 1"
        )
        return [row[0] for row in rows]

    def missing_blobs(self) -> list[tuple[Any, ...]]:
        """Give the checkpoints that reference a blob that is not there (I2)."""
        return self.execute(
            "SELECT thread_id, checkpoint_id FROM checkpoints c WHERE tiered_blobs > (SELECT count(*) "
            "FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v JOIN checkpoint_blobs AS b "
            "ON (b.thread_id, b.checkpoint_ns, b.channel, b.version) = (c.thread_id, c.checkpoint_ns, v.key, v.value))"
        )


@pytest.fixture
def database(postgres_url: str) -> Database:
    return Database(postgres_url)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def behind(redis_url: str) -> Iterator[Proxy]:
    """What the saver below reaches Valkey through, and what can cut it off."""
    with Proxy(urlsplit(redis_url).port or 0) as proxy:
        yield proxy


@pytest.fixture
def saver_behind(
    behind: Proxy, redis_url: str, postgres_url: str, saver_settings: dict[str, Any]
) -> Iterator[TieredSaver]:
    url = redis_url.replace(f":{urlsplit(redis_url).port}/", f":{behind.port}/")
    settings = {**saver_settings, "poll_interval": 0.05, "redis_timeout": 1.0}
    with TieredSaver.from_conn_string(url, postgres_url, **settings) as saver:
        yield saver


def wipe(client: redis.Redis, key_prefix: str) -> None:
    """Remove everything below the prefix, as FLUSHALL would."""
    if names := list(client.scan_iter(f"{{{key_prefix}*", 1000)):
        client.delete(*names)


def quarantine_by_flush(saver: TieredSaver, thread_id: str) -> None:
    with pytest.raises(ThreadQuarantinedError) as caught:
        saver.flush()
    assert caught.value.thread_id == thread_id


def reads_like_postgres_saver(saver: TieredSaver, database: Database, chain: Recording, other_url: str) -> None:
    """Compare a thread with what PostgresSaver makes of the same calls, by its reader and row by row."""
    with PostgresSaver.from_conn_string(other_url) as reference:
        reference.setup()
        chain.repeat_on(reference)
        expected = list(reference.list(address(chain.thread_id)))
        assert list(saver.list(address(chain.thread_id))) == expected
    with PostgresSaver.from_conn_string(database.url) as cold:
        assert list(cold.list(address(chain.thread_id))) == expected
    columns = {"checkpoint_blobs": "channel, version, type, blob",
               "checkpoint_writes": "checkpoint_id, task_id, idx, channel, type, blob, task_path"}  # fmt: skip
    for table, names in columns.items():
        query = f"SELECT {names} FROM {table} WHERE thread_id = '{chain.thread_id}' ORDER BY {names}"
        assert database.execute(query) == Database(other_url).execute(query)


# --- being set aside, and coming back --------------------------------------------------------------------------------


def test_a_refused_record_sets_its_thread_aside_and_every_other_thread_goes_on(
    make_saver: Callable[..., TieredSaver],
    make_database: Callable[[], str],
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """I1, I3: of a batch only what follows the refused record waits, in order; retried, it is like PostgresSaver's."""
    saver = make_saver(flush_linger=NEVER)
    saver.setup()
    database.refuse("poison", 2)
    chains = [Recording(saver, name) for name in ("a", "poison", "z")]
    for _ in range(4):
        for chain in chains:
            chain.step_on()
    before, poison, after = chains

    quarantine_by_flush(saver, "poison")

    wait_until(lambda: database.steps("z") == [0, 1, 2, 3], message="the flush of the last thread")
    assert_durable(database.url, before.acked + after.acked)
    assert database.steps("poison") == [0, 1]
    waiting = database.waiting("poison")
    assert len(waiting) == 4  # the checkpoints 2 and 3, and their writes
    assert [reason is None for _, reason in waiting] == [False, True, True, True]
    assert saver.stats().quarantined_threads == ("poison",)
    (line,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert "'poison' is quarantined" in line.message
    assert '"refused"' in line.message
    assert "Failing row" not in line.message  # which holds the state

    # Hot reads and later writes go on, in the same process and in another one.
    other = make_saver()
    assert other.get_tuple(poison.config).checkpoint["channel_values"] == values_of("poison", 3)  # type: ignore[union-attr]
    with pytest.raises(ThreadQuarantinedError, match="langgraph-tiered quarantine"):
        next(other.list(address("poison")))
    poison.saver = other
    poison.step_on()
    poison.saver = saver
    poison.step_on()
    quarantine_by_flush(saver, "poison")
    for process in (saver, other):
        (found,) = process.quarantined()
        assert (found.thread_id, found.records) == ("poison", 8)
        assert "refused" in found.reason
        assert "CheckViolation, 23514" in found.reason
        assert [record.kind for record in process.quarantined_records("poison")] == ["checkpoint", "writes"] * 4
    records = saver.quarantined_records("poison")
    assert sorted(records, key=lambda record: record.sequence) == records
    assert sum(record.size for record in records) == found.bytes
    assert records[-1].checkpoint_id == poison.checkpoint_id

    with pytest.raises(ThreadQuarantinedError, match=r"still quarantined: .*refused"):
        other.retry_quarantined("poison")
    assert database.steps("poison") == [0, 1]
    assert len(database.waiting("poison")) == 8
    database.accept()
    assert other.retry_quarantined("poison") == 8

    assert other.retry_quarantined("poison") == 0
    assert other.quarantined() == []
    assert_durable(database.url, poison.acked)
    reads_like_postgres_saver(other, database, poison, make_database())
    wait_until(lambda: not saver.stats().quarantined_threads, message="the first process hears of it")
    poison.step_on()
    saver.flush()
    assert_durable(database.url, poison.acked)
    assert database.missing_blobs() == []


def test_quarantined_records_are_in_postgresql_and_survive_redis(
    make_saver: Callable[..., TieredSaver],
    make_database: Callable[[], str],
    database: Database,
    client: redis.Redis,
    key_prefix: str,
) -> None:
    """I1, I7: Redis loses everything: nothing of the thread is lost, and no read takes older state for the latest."""
    saver = make_saver(poll_interval=0.05)
    saver.setup()
    database.refuse("t", 1)
    chain = Recording(saver, "t")
    chain.step_on(3)
    quarantine_by_flush(saver, "t")

    wipe(client, key_prefix)

    with pytest.raises(ThreadQuarantinedError):
        saver.get_tuple(chain.config)
    wait_until(lambda: saver.stats().hot_trusted, message="the next generation is open")
    with pytest.raises(ThreadQuarantinedError):
        saver.get_tuple(address("t", chain.checkpoint_id))
    chain.step_on()
    database.accept()
    # The process that is closed and one that never met the thread find the same.
    saver.close()
    other = make_saver(poll_interval=0.05)
    assert len(other.quarantined_records("t")) == 6
    assert other.retry_quarantined("t") == 6
    assert other.get_tuple(address("t")).checkpoint["channel_values"] == values_of("t", 3)  # type: ignore[union-attr]
    reads_like_postgres_saver(other, database, chain, make_database())


def test_many_large_records_are_retried_in_pages_all_or_nothing(
    make_saver: Callable[..., TieredSaver], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: a retry that PostgreSQL refuses in its last page leaves everything as it was; the next writes it all."""
    monkeypatch.setattr("langgraph_tiered_saver.cold.quarantine._PAGE_RECORDS", 3)
    saver = make_saver()
    saver.setup()
    database.refuse("t", 0)
    chain = Recording(saver, "t")
    chain.step_on(5)
    quarantine_by_flush(saver, "t")
    database.accept()
    database.refuse("t", 4)

    with pytest.raises(ThreadQuarantinedError):
        saver.retry_quarantined("t")

    assert database.steps("t") == []
    assert len(database.waiting("t")) == 10
    database.accept()
    assert saver.retry_quarantined("t") == 10
    assert_durable(database.url, chain.acked)


# --- dropping, and deleting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "kind", "reason"),
    [
        (b"garbage", "unreadable", "the bytes end within a frame"),
        (encode(MaintenanceRecord("copy", {}), 1), "copy", "'source'"),
        (encode(MaintenanceRecord("forget", {}), 1), "forget", "not an operation this version knows"),
        (encode(CheckpointRecord("", "1", "", b"\xff", b"{}", 0, ()), 1), "checkpoint", "invalid start byte"),
    ],
    ids=["no record", "without its arguments", "of another version", "not text"],
)
def test_what_is_dropped_cannot_come_back_and_the_thread_goes_on(
    make_saver: Callable[..., TieredSaver], database: Database, client: redis.Redis, key_prefix: str,
    payload: bytes, kind: str, reason: str,
) -> None:  # fmt: skip
    """I2, I5: a process that holds dropped records brings none back; the next checkpoint relies on none of them."""
    holder, other = make_saver(flush_linger=NEVER), make_saver()
    holder.setup()
    chain = Recording(holder, "t")
    chain.step_on(2)
    add_by_hand(client, key_prefix, "t", payload)
    chain.step_on(2)
    with pytest.raises(ThreadQuarantinedError):
        other.get_tuple(address("t", "an id that is not hot"))
    assert database.steps("t") == [0, 1]
    kinds = [kind, "checkpoint", "writes", "checkpoint", "writes"]
    assert [record.kind for record in other.quarantined_records("t")] == kinds
    with pytest.raises(ThreadQuarantinedError, match=reason):
        other.retry_quarantined("t")
    chain.step_on()  # is lost too, though nobody had flushed it

    lost = other.drop_quarantined("t")

    assert [record.kind for record in lost] == [*kinds, "checkpoint", "writes"]
    assert other.drop_quarantined("t") == []
    assert other.get_tuple(address("t")).checkpoint["channel_values"] == values_of("t", 1)  # type: ignore[union-attr]
    wait_until(lambda: not holder.stats().quarantined_threads, message="the other process hears of it")
    holder.flush()  # what it still holds
    assert database.steps("t") == [0, 1]
    assert database.execute("SELECT * FROM tiered_quarantine") == []
    chain.step_on()
    holder.flush()
    assert database.steps("t") == [0, 1, 5]
    assert database.missing_blobs() == []
    assert_durable(database.url, chain.acked[:4])


def add_by_hand(client: redis.Redis, key_prefix: str, thread_id: str, payload: bytes) -> None:
    """Append something that is no record to a thread's journal, as a script of another version might."""
    keys = Keyspace(key_prefix, 64).thread(thread_id)
    clock = client.hget(keys.shard, "clock")
    assert clock is not None
    sequence = int(clock) + 1
    client.xadd(keys.journal, {"r": payload}, id=f"{sequence}-0")
    # With the number of an entry, an entry that somebody added by hand must not displace it.
    client.xadd(keys.journal, {"r": b"more garbage"}, id=f"{sequence}-1")
    client.hset(keys.shard, mapping={b"t:" + thread_id.encode(): sequence, b"clock": sequence})


def test_an_entry_of_somebody_elses_does_not_displace_a_record(
    make_saver: Callable[..., TieredSaver], database: Database, client: redis.Redis, key_prefix: str
) -> None:
    """I1: XADD by hand gives the number of the record before it; that record is flushed all the same."""
    writer, other = make_saver(flush_linger=NEVER), make_saver()
    chain = Recording(writer, "t")
    chain.step_on()
    client.xadd(Keyspace(key_prefix, 64).thread("t").journal, {"r": b"garbage"})

    found = list(other.list(address("t")))

    assert [at.checkpoint["id"] for at in found] == [chain.checkpoint_id]
    assert_durable(database.url, chain.acked)
    assert other.quarantined() == []


@pytest.mark.parametrize("trusted", [True, False], ids=["with Redis", "past Redis"])
def test_deleting_a_quarantined_thread_erases_all_of_it(
    saver_behind: TieredSaver, behind: Proxy, database: Database, client: redis.Redis, key_prefix: str, trusted: bool
) -> None:
    """I5: an erasure reaches hot, journal, quarantine and cold, and the thread may begin anew."""
    saver = saver_behind
    saver.setup()
    database.refuse("t", 1)
    chain = Recording(saver, "t")
    chain.step_on(3)
    quarantine_by_flush(saver, "t")
    if not trusted:
        behind.down()

    saver.delete_thread("t")

    for table in TABLES:
        assert database.execute(f"SELECT * FROM {table}") == []
    assert saver.quarantined() == []
    assert saver.get_tuple(address("t")) is None
    behind.heal()
    wait_until(lambda: saver.stats().hot_trusted, message="Redis is trusted")
    assert saver.get_tuple(address("t")) is None
    assert not [key for key in client.scan_iter(f"{{{key_prefix}:*", 1000) if b":journal:" in key]
    Recording(saver, "t").put()
    saver.flush()
    assert database.steps("t") == [0]
    # Nobody knows when what cannot be read was acknowledged, so no deletion makes it vanish.
    add_by_hand(client, key_prefix, "t", b"garbage")
    with pytest.raises(ThreadQuarantinedError):
        next(saver.list(address("t")))
    assert [record.kind for record in saver.quarantined_records("t")] == ["unreadable"]


# --- operations that remove or copy ----------------------------------------------------------------------------------


def test_a_refused_delete_waits_with_what_follows_it_and_is_retried_in_order(
    make_saver: Callable[..., TieredSaver], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3, I7: a delete that PostgreSQL refuses raises; once it may, it removes what came before it and nothing else."""
    monkeypatch.setattr("langgraph_tiered_saver.cold.quarantine._PAGE_RECORDS", 1)
    saver = make_saver()
    chain = Recording(saver, "t")
    chain.step_on(2)
    saver.flush()
    database.execute(
        "CREATE TABLE report (t TEXT, ns TEXT, id TEXT, "
        "FOREIGN KEY (t, ns, id) REFERENCES checkpoints (thread_id, checkpoint_ns, checkpoint_id))"
    )
    database.execute("INSERT INTO report SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints")

    with pytest.raises(ThreadQuarantinedError):
        saver.delete_thread("t")

    again = Recording(saver, "t")
    again.step_on(2)
    quarantine_by_flush(saver, "t")
    assert [r.kind for r in saver.quarantined_records("t")] == ["delete_thread", *["checkpoint", "writes"] * 2]
    assert "ForeignKeyViolation" in saver.quarantined()[0].reason
    database.execute("DROP TABLE report")
    assert saver.retry_quarantined("t") == 5
    assert {at.checkpoint["id"] for at in saver.list(address("t"))} == {a.checkpoint_id for a in again.acked}
    assert_durable(database.url, again.acked)
    assert database.missing_blobs() == []
    assert saver.quarantined() == []


@pytest.mark.parametrize("trusted", [True, False], ids=["with Redis", "past Redis"])
def test_operations_on_a_quarantined_thread_wait_their_turn(
    saver_behind: TieredSaver, behind: Proxy, database: Database, trusted: bool
) -> None:
    """I3: a prune, and a copy into the thread, run where they were called, behind the records that waited already."""
    saver = saver_behind
    chain = Recording(saver, "source")
    chain.step_on()
    saver.flush()
    database.refuse("t", 1)
    chain = Recording(saver, "t")
    chain.step_on(3)
    quarantine_by_flush(saver, "t")
    if not trusted:
        behind.down()

    with pytest.raises(ThreadQuarantinedError):
        saver.prune(["t"])
    with pytest.raises(ThreadQuarantinedError):
        saver.copy_thread("source", "t")
    with contextlib.nullcontext() if trusted else pytest.raises(ThreadQuarantinedError):
        chain.step_on()  # past Redis it is kept, and says so
    if trusted:
        quarantine_by_flush(saver, "t")

    records = asyncio.run(saver.aquarantined_records("t"))
    assert [r.kind for r in records] == [
        *["checkpoint", "writes"] * 2, "retain", "copy", "checkpoint", *(["writes"] if trusted else ())
    ]  # fmt: skip
    database.accept()
    assert asyncio.run(saver.aretry_quarantined("t")) == len(records)
    assert asyncio.run(saver.aquarantined()) == []
    assert database.steps("t") == [0, 2, 3]  # the copy's, the one that the prune left, the last
    assert database.missing_blobs() == []
    behind.heal()
    wait_until(lambda: saver.stats().hot_trusted, message="Redis is trusted")
    assert saver.get_tuple(address("t")).checkpoint["channel_values"] == values_of("t", 3)  # type: ignore[union-attr]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_retries_and_drops_and_never_shows_a_value(
    make_saver: Callable[..., TieredSaver], database: Database, redis_url: str, key_prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """I7: an operator sees what waits and why, without the users' data, and exit codes tell what was done."""
    saver = make_saver()
    output = ""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        nonlocal output
        known = {"LANGGRAPH_TIERED_REDIS_URL": redis_url, "LANGGRAPH_TIERED_POSTGRES_URL": database.url,
                 "LANGGRAPH_TIERED_KEY_PREFIX": key_prefix, "COLUMNS": "300", **environment}  # fmt: skip
        result = CliRunner().invoke(app, ["quarantine", *arguments], env=known)
        output += result.output
        return result.exit_code, result.output

    assert run("list")[0] == USAGE  # nothing is set up, and a look must not do it
    secret = "a value of the user's"
    saver.setup()
    database.refuse("[red]t[/red]", 1)
    chain = Recording(saver, "[red]t[/red]")
    chain.step_on()
    saver.put_writes(chain.config, [("log", secret)], "task")
    chain.next()
    config, checkpoint, metadata, changed = chain.puts[-1]
    checkpoint["channel_values"]["step"] = secret  # inlined in the row that PostgreSQL shows when it refuses
    saver.put(config, checkpoint, metadata | {"title": secret}, changed)
    saver.put_writes(config, [("log", secret)], "another task")
    quarantine_by_flush(saver, "[red]t[/red]")

    code, text = run("list")
    assert code == 0
    assert "[red]t[/red]" in text
    assert "violates check constraint" in text
    code, text = run("list", "--json")
    (found,) = json.loads(text)
    assert (code, found["thread_id"], found["records"]) == (0, "[red]t[/red]", 2)
    code, text = run("show", "[red]t[/red]")
    assert code == 0
    assert "waits for an earlier one" in text
    code, text = run("show", "[red]t[/red]", "--json")
    first, second = json.loads(text)["records"]
    assert (first["kind"], first["checkpoint_id"], second["kind"]) == ("checkpoint", checkpoint["id"], "writes")
    code, text = run("retry", "[red]t[/red]", "--json")
    assert code == FAILED
    assert "still quarantined" in json.loads(text.splitlines()[0])["refused"]
    database.accept()
    assert run("retry", "[red]t[/red]") == (
        0, "2 records of thread '[red]t[/red]' are in PostgreSQL now. Its quarantine has ended.\n"
    )  # fmt: skip
    assert run("retry", "[red]t[/red]")[0] == FAILED
    assert run("list") == (0, "No thread is quarantined.\n")

    database.execute("DELETE FROM checkpoints WHERE metadata ->> 'step' = '1'")
    database.refuse("[red]t[/red]", 1)
    saver.put(config, checkpoint, metadata, changed)
    quarantine_by_flush(saver, "[red]t[/red]")
    code, text = run("drop", "[red]t[/red]", "--json")
    assert code == 0
    assert [record["kind"] for record in json.loads(text)["dropped"]] == ["checkpoint"]
    assert run("drop", "[red]t[/red]")[0] == run("show", "[red]t[/red]")[0] == FAILED
    assert database.steps("[red]t[/red]") == [0]
    nowhere = "postgresql://user:hidden@127.0.0.1:1/nothing"
    assert run("list", LANGGRAPH_TIERED_POSTGRES_URL=nowhere)[0] == UNAVAILABLE
    assert run("show")[0] == USAGE
    assert secret not in output + caplog.text
    assert "hidden" not in output
