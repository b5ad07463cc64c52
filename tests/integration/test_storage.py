"""Records that carry deltas: both storages keep every version byte for byte, and lose none of it without a word."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row
from typer.testing import CliRunner

from langgraph_tiered_saver import DamagedValueError, ThreadQuarantinedError, deltas
from langgraph_tiered_saver.cli import FAILED, app
from langgraph_tiered_saver.cold import conversion as cold_conversion
from langgraph_tiered_saver.cold import maintenance, materialize, quarantine, reader, retention, storage, writer
from langgraph_tiered_saver.conversion import convert, show
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.names import ThreadPosition
from langgraph_tiered_saver.recent import RecentValues
from langgraph_tiered_saver.records import FRESH, Blob, CheckpointRecord, MaintenanceRecord, encode, pack_value
from langgraph_tiered_saver.verify import check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langgraph_tiered_saver import TieredSaver

EXAMPLES = int(os.environ.get("TIERED_HYPOTHESIS_EXAMPLES", "0"))
STORAGES = ("standard", "compact")
SERDE = JsonPlusSerializer()
TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "tiered_deltas")

both_storages = pytest.mark.parametrize("mode", STORAGES)


class Bytes:
    """A serializer that hands out the stored bytes."""

    def loads_typed(self, data: tuple[str, bytes]) -> tuple[str, bytes]:
        return data

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        raise NotImplementedError


class Stored(NamedTuple):
    """A version that was put, and its value."""

    version: str
    typed: tuple[str, bytes]


NOTHING = Stored("", ("", b""))


@dataclass
class Conversation:
    """Makes the records of a thread whose channel `messages` grows, as the hot side journals them.

    Attributes:
        thread_id: The thread.
        values: By checkpoint id, what each channel's value is.
        records: The journal.
    """

    thread_id: str
    values: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    records: list[writer.Journaled] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    last: Stored | None = None
    parent: str = ""
    note: Stored = NOTHING
    seed: int = 0
    clock: int = 1_000_000

    def version(self) -> str:
        self.seed += 1
        return f"{self.seed:032}.{random.Random(f'{self.thread_id}{self.seed}').random():016}"

    def add(self, text: str = "", *, whole: bool | None = None, sure: bool = True) -> str:
        """Put a checkpoint with one more message; whole, or as a delta if it has a base."""
        noise = random.Random(len(self.records) + self.seed)
        self.messages = [*self.messages, text or "".join(noise.choices("abcdefgh ijklm\nnoä🎈", k=600))]
        return self.put(SERDE.dumps_typed(self.messages), whole=whole, sure=sure)

    def put(self, typed: tuple[str, bytes], *, whole: bool | None = None, sure: bool = True) -> str:
        version = self.version()
        delta = None
        if self.last is not None and not whole and self.last.typed[0] == typed[0]:
            delta = deltas.diff(self.last.typed[1], typed[1])
        if delta is not None and self.last is not None:
            blob = Blob("messages", version, pack_value((typed[0], delta)), self.last.version)
        else:
            blob = Blob("messages", version, pack_value(typed), FRESH if sure else "")
        blobs = [blob]
        if not self.note.version:
            # Another channel, that later checkpoints reference and do not carry.
            self.note = Stored(self.version(), SERDE.dumps_typed({"note": self.thread_id}))
            blobs.append(Blob("note", self.note.version, pack_value(self.note.typed), FRESH))
        self.last = Stored(version, typed)
        checkpoint_id = f"1f{len(self.records):06}-{self.thread_id}"
        document = {
            "v": 4, "id": checkpoint_id, "ts": "2026-01-01T00:00:00+00:00", "channel_values": {},
            "channel_versions": {"messages": version, "note": self.note.version}, "versions_seen": {},
        }  # fmt: skip
        record = CheckpointRecord(
            "", checkpoint_id, self.parent, json.dumps(document).encode(),
            json.dumps({"step": len(self.records), "run_id": f"run-{len(self.records) // 5}"}).encode(), 2, blobs,
        )  # fmt: skip
        self.journal(record)
        self.parent = checkpoint_id
        self.values[checkpoint_id] = {"messages": typed, "note": self.note.typed}
        return checkpoint_id

    def journal(self, record: Any) -> None:
        self.clock += 1
        self.records.append(writer.Journaled(self.clock, 1, record, encode(record, 1)))


@dataclass
class Database:
    """A database that was set up, and what is done to it."""

    url: str
    connection: psycopg.Connection[Any]

    def write(self, talk: Conversation, records: Sequence[writer.Journaled] | None = None, **options: Any) -> Any:
        entry = writer.ThreadRecords(talk.thread_id, 0, talk.records if records is None else records)
        return writer.write(self.connection, [entry], statement_timeout=60, **options)

    def maintain(self, talk: Conversation, operation: str, **arguments: Any) -> None:
        talk.clock += 1
        record = MaintenanceRecord(operation, arguments)
        maintenance.execute(
            self.connection, talk.thread_id, talk.clock, 1, record, shard_of=lambda name: 0, statement_timeout=60
        )

    def rows(self) -> dict[str, list[Any]]:
        return {
            table: self.connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4").fetchall() for table in TABLES
        }

    def count(self, table: str) -> int:
        return int(self.connection.execute(f"SELECT count(*) AS n FROM {table}").fetchone()["n"])

    def execute(self, statement: str, *values: Any) -> int:
        return self.connection.execute(statement.encode(), values).rowcount

    @contextmanager
    def plain(self) -> Iterator[PostgresSaver]:
        """A plain PostgresSaver on the views if there are any, else on the tables."""
        views = self.connection.execute("SELECT value FROM tiered_state WHERE name = 'views'").fetchone()
        with psycopg.connect(self.url, autocommit=True, row_factory=dict_row, prepare_threshold=0) as connection:
            if views:
                connection.execute(f'SET search_path = "{views["value"]}"')
            yield PostgresSaver(connection, serde=Bytes())

    def found(self, talk: Conversation) -> dict[str, dict[str, tuple[str, bytes]]]:
        """Read every checkpoint of a thread, by a plain PostgresSaver, byte for byte."""
        config: Any = {"configurable": {"thread_id": talk.thread_id}}
        with self.plain() as saver:
            listed = {one.checkpoint["id"]: one.checkpoint["channel_values"] for one in saver.list(config)}
            for name, values in listed.items():
                got = saver.get_tuple({"configurable": {**config["configurable"], "checkpoint_ns": "",
                                                        "checkpoint_id": name}})  # fmt: skip
                assert got is not None
                assert got.checkpoint["channel_values"] == values
        # Our own reads go another way, and check digests.
        ours = {one.checkpoint["id"]: one.checkpoint["channel_values"] for one in reader.read_list(
            self.connection, Bytes(), config, filter=None, before=None, limit=None)}  # fmt: skip
        assert ours == listed
        return listed

    def damaged(self, talk: Conversation) -> list[Any]:
        """What `verify` finds wrong with values."""
        from langgraph_tiered_saver.cold import verify

        thread = verify.look(self.connection, [talk.thread_id])[talk.thread_id]
        verify.look_at_deltas(self.connection, talk.thread_id, thread)
        return [*thread.incomplete, *thread.damaged]

    def unneeded(self) -> list[Any]:
        """Versions that no checkpoint references, and no delta that one needs is made from."""
        return self.connection.execute(
            """
            WITH RECURSIVE stored AS (
                SELECT thread_id, checkpoint_ns, channel, version, NULL AS base FROM checkpoint_blobs
                UNION ALL SELECT thread_id, checkpoint_ns, channel, version, base FROM tiered_deltas
            ), needed AS (
                SELECT c.thread_id, c.checkpoint_ns, v.key AS channel, v.value AS version
                FROM checkpoints c, jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
                UNION
                SELECT s.thread_id, s.checkpoint_ns, s.channel, s.base FROM needed n
                JOIN stored s USING (thread_id, checkpoint_ns, channel, version)
            )
            SELECT thread_id, checkpoint_ns, channel, version FROM stored
            EXCEPT SELECT thread_id, checkpoint_ns, channel, version FROM needed"""
        ).fetchall()

    def convert(self, talk: Conversation, to: str, *, steps: int | None = None) -> int:
        """Convert a thread, or only some transactions of it."""
        if to == "compact":
            cold_conversion.begin_compact(self.connection)
        one = cold_conversion.ThreadConversion(talk.thread_id, 0, statement_timeout=60)
        step = one.to_compact if to == "compact" else one.to_standard
        versions = done = 0
        while (steps is None or done < steps) and (batch := step(self.connection)) is not None:
            assert not batch.damaged
            versions, done = versions + batch.versions, done + 1
        return versions


@contextmanager
def database_of(make_saver: Callable[..., TieredSaver], url: str, mode: str, **settings: Any) -> Iterator[Database]:
    make_saver(storage=mode, sweep_interval=0, **settings).setup()
    with psycopg.connect(url, autocommit=True, row_factory=dict_row, prepare_threshold=0) as connection:
        yield Database(url, connection)


def conversation(thread_id: str = "talk", steps: int = 20) -> Conversation:
    talk = Conversation(thread_id)
    for _ in range(steps):
        talk.add()
    return talk


# --- writing ---------------------------------------------------------------------------------------------------------


@both_storages
@pytest.mark.parametrize("remembers", [True, False], ids=["from memory", "from PostgreSQL"])
def test_every_version_is_read_byte_for_byte(
    make_saver: Callable[..., TieredSaver], postgres_url: str, mode: str, remembers: bool
) -> None:
    """I1, I4: deltas of one record at a time, in runs, and again, leave the same rows; every version is whole."""
    recent = RecentValues(10**8 if remembers else 0)
    with database_of(make_saver, postgres_url, mode) as database:
        talk = conversation(steps=80)

        for at in range(0, 40, 1):
            database.write(talk, talk.records[at : at + 1], storage=mode, recent=recent)
        database.write(talk, talk.records[40:], storage=mode, recent=recent)

        assert database.found(talk) == talk.values
        rows = database.rows()
        for size in (1, 7, 80):
            for at in range(0, 80, size):
                database.write(talk, talk.records[at : at + size], storage=mode, recent=recent)
        assert database.rows() == rows
        assert bool(rows["tiered_deltas"]) == (mode == "compact")
        assert database.damaged(talk) == []
        assert database.unneeded() == []
        depths = [row["depth"] for row in rows["tiered_deltas"]]
        assert max(depths, default=0) <= materialize.MOST_DEPTH
        # What is stored one way is not stored again by a saver that stores the other way.
        for other in STORAGES:
            database.write(talk, storage=other)
        assert database.rows() == rows


def test_mixed_fleets_read_and_continue_each_other(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I2: savers of both storages write one thread in turns; each finds the other's bases, and all is read whole."""
    with database_of(make_saver, postgres_url, "standard") as database:
        talk = conversation(steps=60)
        # Whoever is configured so has set it up.
        storage.create_views(database.connection)
        with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as reading:
            for turn in range(6):
                part = talk.records[turn * 10 : turn * 10 + 10]
                mode = STORAGES[turn % 2]
                database.write(talk, part, storage=mode)
                position = ThreadPosition(talk.thread_id, "", part[-1].record.checkpoint_id)  # type: ignore[union-attr]
                # A connection that has never met a delta hears of it with its first read.
                found = reader.read_checkpoint(reading, SERDE, position)
                assert found is not None
                values = found.load(Bytes()).checkpoint["channel_values"]  # type: ignore[arg-type]
                assert values == talk.values[position.checkpoint_id]

        assert database.found(talk) == talk.values
        assert 0 < database.count("tiered_deltas") < 40


def test_no_delta_is_stored_where_there_are_no_views_to_read_it_through(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I2: a process that could not set up what compact storage needs stores whole values meanwhile."""
    with database_of(make_saver, postgres_url, "standard") as database:
        talk = conversation(steps=6)
        database.write(talk, talk.records[:3], storage="compact")
        assert database.count("tiered_deltas") == 0
        assert storage.recorded(database.connection) == "standard"
        make_saver(storage="compact", sweep_interval=0).setup()
        database.write(talk, talk.records[3:], storage="compact")
        assert database.count("tiered_deltas") == 3
        assert database.found(talk) == talk.values


@both_storages
def test_a_value_that_shrinks_or_changes_its_type_is_read_as_it_was(
    make_saver: Callable[..., TieredSaver], postgres_url: str, mode: str
) -> None:
    """A value that has nothing in common with the last one, or is only half of it, is the one that was put."""
    with database_of(make_saver, postgres_url, mode) as database:
        talk = conversation(steps=10)
        talk.messages = talk.messages[5:]
        talk.add()
        talk.put(("bytes", b"\x00" * 9000))
        talk.put(("bytes", b"\x00" * 9000 + b"1"))
        talk.put(SERDE.dumps_typed(["short"]))
        talk.put(SERDE.dumps_typed(talk.messages))
        talk.add()

        database.write(talk, storage=mode)

        assert database.found(talk) == talk.values
        assert database.damaged(talk) == []


def test_what_postgresql_has_under_a_bases_version_counts(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """A value that is carried again, in other bytes, is not what deltas to its version are made from."""
    with database_of(make_saver, postgres_url, "standard") as database:
        talk = conversation(steps=2)
        database.write(talk)
        assert talk.last is not None
        carrying = talk.records[-1].record
        assert isinstance(carrying, CheckpointRecord)
        other = Blob("messages", talk.last.version, pack_value(SERDE.dumps_typed(["other bytes"])))
        talk.journal(
            CheckpointRecord("", carrying.checkpoint_id, "", carrying.checkpoint, carrying.metadata, 2, [other])
        )  # type: ignore[arg-type]
        talk.add()

        database.write(talk, talk.records[2:])

        assert database.found(talk) == talk.values


def test_a_thousand_small_deltas_of_a_large_value_are_bounded(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """I8: what a transaction has to take is bounded by `flush_max_bytes`, though its records are small."""
    taken: list[int] = []
    write = writer.write

    def watched(connection: Any, batch: Any, **options: Any) -> Any:
        placed = []
        place = materialize.place

        def place_and_look(*arguments: Any, **keywords: Any) -> Any:
            placed.append(place(*arguments, **keywords))
            return placed[-1]

        with monkeypatch.context() as patch:
            patch.setattr(materialize, "place", place_and_look)
            done = write(connection, batch, **options)
        taken.append(sum(len(data) for one in placed for _, data in one.blobs.values()))
        return done

    monkeypatch.setattr(writer, "write", watched)
    most = 1024 * 1024
    saver = make_saver(flush_max_bytes=most, sweep_interval=0)
    saver.setup()
    talk = Conversation("talk")
    talk.messages = ["x" * 200_000]
    for _ in range(120):
        talk.add()
    other = conversation("other", 3)
    for one in (talk, other):
        journal(redis_url, key_prefix, one)

    assert sum(1 for _ in saver.list({"configurable": {"thread_id": "other"}})) == 3
    # Every version of the large one is about 200 KB: 30 MB in all, of journaled records that take 500 KB.
    saver.wait_durable({"configurable": {"thread_id": "talk"}})

    assert max(taken) <= most
    assert sum(taken) > 24_000_000
    assert len(taken) >= 24


def journal(redis_url: str, key_prefix: str, talk: Conversation) -> None:
    """Append a conversation's records to its journal, as the script would."""
    with redis.Redis.from_url(redis_url) as client:
        keys = Keyspace(key_prefix, 64).thread(talk.thread_id)
        clock = int(client.hget(keys.shard, "clock") or talk.clock)
        generation = int(client.hget(f"{{{key_prefix}}}:meta", "generation"))
        for number, item in enumerate(talk.records, 1):
            client.xadd(keys.journal, {"r": encode(item.record, generation)}, id=f"{clock + number}-0")
        last = clock + len(talk.records)
        client.hset(keys.shard, mapping={b"t:" + talk.thread_id.encode(): last, b"clock": last})
        client.zadd(keys.dirty, {talk.thread_id: 1})


@both_storages
def test_journals_are_adopted_in_order(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str, mode: str
) -> None:
    """I3: whoever adopts records with deltas finds each one's base, in pages of the journal and across them."""
    talk = conversation(steps=90)
    saver = make_saver(storage=mode, flush_max_records=13, sweep_interval=0)
    saver.setup()
    journal(redis_url, key_prefix, talk)

    listed = {one.checkpoint["id"]: one.checkpoint for one in saver.list({"configurable": {"thread_id": "talk"}})}

    assert {name: checkpoint["channel_values"]["messages"] for name, checkpoint in listed.items()} == {
        name: SERDE.loads_typed(values["messages"]) for name, values in talk.values.items()
    }
    assert list(check(saver)) == []
    assert saver.stats().lost_records == 0


# --- what cannot be made ---------------------------------------------------------------------------------------------


@both_storages
def test_a_base_that_is_nowhere_loses_what_needs_it_and_says_so(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str, mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """I2, I7: no checkpoint is visible without a value, now or later; losses are counted, and the thread goes on."""
    saver = make_saver(storage=mode, sweep_interval=0)
    saver.setup()
    talk = conversation(steps=6)
    lost = talk.records.pop(2)
    # The last one does not carry the value, but references it.
    carrying = talk.records[-1].record
    assert isinstance(carrying, CheckpointRecord)
    document = {**json.loads(carrying.checkpoint), "id": "1f9"}
    talk.journal(CheckpointRecord("", "1f9", carrying.checkpoint_id, json.dumps(document).encode(), b"{}", 2, []))
    with caplog.at_level(logging.ERROR):
        for at in (slice(0, 4), slice(4, 6)):
            part = Conversation("talk", records=talk.records[at], clock=talk.clock)
            journal(redis_url, key_prefix, part)
            found = [one.checkpoint["id"] for one in saver.list({"configurable": {"thread_id": "talk"}})]

    assert isinstance(lost.record, CheckpointRecord)
    kept = list(talk.values)[:2]
    assert sorted(found) == kept
    assert saver.stats().lost_records == 4
    assert "are lost with the records that they were built on" in caplog.text
    assert saver.quarantined() == []
    more = Conversation("talk", messages=talk.messages, parent=kept[-1], note=talk.note, seed=talk.seed)
    more.records = [None] * 20  # type: ignore[list-item]
    name = more.add()
    more.records = more.records[20:]
    journal(redis_url, key_prefix, more)
    assert [one.checkpoint["id"] for one in saver.list({"configurable": {"thread_id": "talk"}}, limit=1)] == [name]
    problems = list(check(saver))
    assert [problem.kind for problem in problems if problem.kind in ("blob", "delta")] == []
    # A thread that is made anew is under no suspicion.
    saver.delete_thread("talk")
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT incomplete FROM tiered_threads").fetchall() == [(False,)]


@both_storages
def test_a_delta_that_cannot_be_applied_is_quarantined_and_retried(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str, mode: str
) -> None:
    """I3, I7: a digest that does not hold sets the thread aside; once the base is right again, a retry writes all."""
    saver = make_saver(storage=mode, sweep_interval=0, delta_memory_bytes=0)
    saver.setup()
    talk, other = conversation(steps=8), conversation("other", 3)
    journal(redis_url, key_prefix, Conversation("talk", records=talk.records[:1]))
    assert len(list(saver.list({"configurable": {"thread_id": "talk"}}))) == 1
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        (right,) = connection.execute("SELECT blob FROM checkpoint_blobs WHERE channel = 'messages'").fetchone()  # type: ignore[misc]
        connection.execute(
            "UPDATE checkpoint_blobs SET blob = %s WHERE channel = 'messages'",
            (right[:99] + bytes([right[99] ^ 1]) + right[100:],),
        )
        for one in (Conversation("talk", records=talk.records[1:]), other):
            journal(redis_url, key_prefix, one)

        with pytest.raises(ThreadQuarantinedError):
            list(saver.list({"configurable": {"thread_id": "talk"}}))

        assert len(list(saver.list({"configurable": {"thread_id": "other"}}))) == 3
        (thread,) = saver.quarantined()
        assert (thread.thread_id, thread.records) == ("talk", 7)
        assert "made from other bytes" in thread.reason
        with pytest.raises(ThreadQuarantinedError, match="made from other bytes"):
            saver.retry_quarantined("talk")
        connection.execute("UPDATE checkpoint_blobs SET blob = %s WHERE channel = 'messages'", (right,))
        assert saver.retry_quarantined("talk") == 7
    found = {one.checkpoint["id"]: one.checkpoint["channel_values"] for one in saver.list(
        {"configurable": {"thread_id": "talk"}})}  # fmt: skip
    assert found == {
        name: {channel: SERDE.loads_typed(value) for channel, value in values.items()}
        for name, values in talk.values.items()
    }
    assert list(check(saver)) == []


def test_a_retry_makes_no_more_values_at_once_than_memory_is_sure_to_hold(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: records in quarantine are small, what they make is not."""
    monkeypatch.setattr(quarantine, "_PAGE_BYTES", 50_000)
    with database_of(make_saver, postgres_url, "standard") as database:
        talk = conversation(steps=60)
        database.write(talk, talk.records[:1])
        entry = writer.ThreadRecords("talk", 0, talk.records[1:])
        assert writer.quarantine(database.connection, entry, "a test", statement_timeout=60)
        sizes: list[int] = []
        write_locked = quarantine.write_locked

        def watched(cursor: Any, batch: Any, **options: Any) -> Any:
            sizes.append(len(batch[0].records))
            return write_locked(cursor, batch, **options)

        monkeypatch.setattr(quarantine, "write_locked", watched)
        assert quarantine.retry(database.connection, "talk", shard_of=lambda name: 0, statement_timeout=60) == 59
        assert len(sizes) > 15
        assert database.found(talk) == talk.values


def test_memory_of_a_thread_that_was_made_anew_is_not_trusted(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """A base in memory that is not what the delta was made from gives way to PostgreSQL's."""
    with database_of(make_saver, postgres_url, "standard") as database:
        recent = RecentValues(10**8)
        old, new = Conversation("talk", messages=["old " * 2000]), Conversation("talk", messages=["new " * 2000])
        old.add("first")
        database.write(old, recent=recent)
        database.maintain(old, "delete_thread")
        new.clock = old.clock
        for text in ("first", "second"):
            new.add(text)
        database.write(new, new.records[:1])

        database.write(new, new.records[1:], recent=recent)

        assert database.found(new) == new.values


# --- removing and copying --------------------------------------------------------------------------------------------


@both_storages
@pytest.mark.parametrize("keep_last", [1, 3])
def test_prune_keeps_what_kept_versions_are_made_from_and_nothing_else(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch, mode: str,
    keep_last: int,
) -> None:  # fmt: skip
    """I2: what stays is whole, its chains included; a base goes with the last version that is made from it."""
    monkeypatch.setattr(retention, "MOST_REMOVED", 7)
    with database_of(make_saver, postgres_url, mode) as database:
        talk = conversation(steps=70)
        database.write(talk, storage=mode)
        for _ in range(10):
            database.maintain(talk, "retain", keep_last=keep_last)

        kept = dict(list(talk.values.items())[-keep_last:])
        assert database.found(talk) == kept
        assert database.unneeded() == []
        assert database.damaged(talk) == []
        for _ in range(5):
            talk.add(whole=_ == 0)
        database.write(talk, talk.records[70:], storage=mode)
        database.maintain(talk, "prune")
        # The chain that the first prune left is of no use to anybody now.
        assert database.found(talk) == dict(list(talk.values.items())[-1:])
        assert database.unneeded() == []
        assert database.count("checkpoint_blobs") + database.count("tiered_deltas") <= 6


@both_storages
def test_runs_and_threads_are_deleted(make_saver: Callable[..., TieredSaver], postgres_url: str, mode: str) -> None:
    """I2, I5: a run's checkpoints go though later ones are made from their values; a thread goes without a rest."""
    with database_of(make_saver, postgres_url, mode) as database:
        talk, other = conversation(steps=20), conversation("other", 4)
        for one in (talk, other):
            database.write(one, storage=mode)

        database.maintain(talk, "delete_runs", run_ids=["run-1", "run-3"])

        left = {name: values for number, (name, values) in enumerate(talk.values.items()) if number // 5 in (0, 2)}
        assert database.found(talk) == left
        assert database.unneeded() == []
        assert database.damaged(talk) == []
        database.maintain(talk, "delete_thread")
        assert database.found(talk) == {}
        assert {row["thread_id"] for rows in database.rows().values() for row in rows} == {"other"}
        assert database.found(other) == other.values


@both_storages
@pytest.mark.parametrize("into", ["a new thread", "one that has values"])
def test_a_copy_has_every_version(
    make_saver: Callable[..., TieredSaver], postgres_url: str, mode: str, into: str
) -> None:
    """I9: a copy reads like its source, and lives apart from it; what the target had stays as it was."""
    with database_of(make_saver, postgres_url, mode) as database:
        talk = conversation(steps=20)
        database.write(talk, storage=mode)
        target = Conversation("target")
        if into != "a new thread":
            # Versions of the same names, as a saver with versions that only count makes them, and other values.
            rival = conversation(steps=5)
            rival.thread_id = "target"
            rival.records, rival.values, target.clock = [], {}, rival.clock
            twin = Conversation("talk", messages=["other " * 900])
            for _ in range(3):
                twin.add("more")
            twin.thread_id = "target"
            database.write(twin, storage=mode)
            target = twin
        target.clock = max(target.clock, talk.clock)
        before = database.found(target)

        database.maintain(target, "copy", source="talk")
        database.maintain(talk, "delete_thread")

        found = database.found(target)
        assert database.damaged(target) == []
        assert set(found) == set(talk.values) | set(before)
        for name, values in before.items():
            assert found[name] == values
        for name in talk.values.keys() - before.keys():
            assert found[name]["messages"] == talk.values[name]["messages"]


# --- verify ----------------------------------------------------------------------------------------------------------


OVERWRITE = "overlay(delta placing '\\x61' from octet_length(delta))"
STORE_TWICE = "INSERT INTO checkpoint_blobs SELECT thread_id, '', channel, version, type, '\\x90' FROM tiered_deltas"
FAULTS = {
    "delta": (f"UPDATE tiered_deltas SET delta = {OVERWRITE} WHERE depth = 3", "made from other bytes"),
    "base": ("DELETE FROM checkpoint_blobs WHERE channel = 'messages'", "is missing"),
    "link": ("DELETE FROM tiered_deltas WHERE depth = 2", "is missing"),
    "circle": ("UPDATE tiered_deltas SET base = version WHERE depth = 2", "is missing"),
    "header": ("UPDATE tiered_deltas SET delta = '\\x00' WHERE depth = 2", "shorter than its header"),
    "twice": (f"{STORE_TWICE} WHERE depth = 2", "both whole and as a delta"),
    "size": ("UPDATE tiered_deltas SET size = 7 WHERE depth = 2", "its row says 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds_what_cannot_be_rebuilt(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """I2: a chain that does not make what was stored is told of; a read of it raises, and is no other value."""
    monkeypatch.setattr("langgraph_tiered_saver.verify._MOMENT", 0.01)
    statement, says = FAULTS[name]
    with database_of(make_saver, postgres_url, "compact") as database:
        saver = make_saver(storage="compact", sweep_interval=0)
        talk, other = conversation(steps=6), conversation("other", 4)
        for one in (talk, other):
            database.write(one, storage="compact")
        assert list(check(saver)) == []

        assert database.execute(f"{statement}{' AND' if 'WHERE' in statement else ' WHERE'} thread_id = 'talk'")

        problems = list(check(saver))
        assert {problem.thread_id for problem in problems} == {"talk"}
        assert [one for one in problems if one.kind == "delta" and says in one.what], problems
        if name not in ("twice", "size", "link"):
            with pytest.raises(DamagedValueError):
                list(saver.list({"configurable": {"thread_id": "talk"}}))
        assert len(list(saver.list({"configurable": {"thread_id": "other"}}))) == 4


# --- views -----------------------------------------------------------------------------------------------------------


def test_views_are_read_by_sql_and_take_no_writes(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """SQL sees whole values under PostgresSaver's names, makes only those it asks for, and changes nothing."""
    with database_of(make_saver, postgres_url, "compact") as database:
        talk = conversation(steps=30)
        database.write(talk, storage="compact")
        execute = database.connection.execute
        rows = execute("SELECT version, type, blob FROM public_whole.checkpoint_blobs WHERE channel = 'messages'")
        assert {(row["type"], row["blob"]) for row in rows} == {one["messages"] for one in talk.values.values()}
        for table in ("checkpoints", "checkpoint_writes", "checkpoint_migrations"):
            assert execute(f"SELECT count(*) AS n FROM public_whole.{table}").fetchone() == {"n": database.count(table)}
        execute("SET search_path = public_whole")
        PostgresSaver(database.connection).setup()
        for statement in (
            "DELETE FROM checkpoint_blobs",
            "UPDATE checkpoints SET metadata = '{}'",
            "INSERT INTO checkpoint_blobs VALUES ('a', '', 'b', 'c', 'd', '')",
        ):
            with pytest.raises(psycopg.Error, match=r"read-only|cannot"):
                execute(statement)
        # A join looks at many versions, and makes the one that it finds.
        execute("ANALYZE public.tiered_deltas")
        plan = execute(
            "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) SELECT b.blob FROM checkpoints c "
            "CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v "
            "JOIN checkpoint_blobs b ON b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns "
            "AND b.channel = v.key AND b.version = v.value WHERE c.checkpoint_id = %s",
            (list(talk.values)[-1],),
        ).fetchone()
        assert "tiered_whole" not in json.dumps(plan)


def test_the_views_schema_is_named_after_the_tables(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """Tables in a schema of their own, however long or odd its name is, have views in one of theirs."""
    assert storage.views_name("public") == "public_whole"
    long = "ü" * 30
    assert len(storage.views_name(long).encode()) <= 63
    assert storage.views_name(long) != storage.views_name(long + "a")
    for schema in ('odd "name"', long):
        saver = make_saver(storage="compact", postgres_schema=schema, key_prefix=uuid.uuid4().hex, sweep_interval=0)
        talk = conversation(steps=10)
        saver.setup()
        with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
            connection.execute("SELECT set_config('search_path', %s, false)", ('"' + schema.replace('"', '""') + '"',))
            entry = writer.ThreadRecords("talk", 0, talk.records)
            writer.write(connection, [entry], statement_timeout=60, storage="compact")
        assert len(list(saver.list({"configurable": {"thread_id": "talk"}}))) == 10
        assert show(saver).views == storage.views_name(schema)
        assert list(check(saver)) == []


def test_a_pooled_connection_keeps_no_other_search_path(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """After a read through the views, and after one that failed, unqualified names mean the tables."""
    with database_of(make_saver, postgres_url, "compact") as database:
        talk = conversation(steps=5)
        database.write(talk, storage="compact")
        path = "SELECT current_setting('search_path') AS path, current_setting('tiered.raw', true) AS raw"
        before = database.connection.execute(path).fetchone()
        database.found(talk)
        assert database.connection.execute(path).fetchone()["path"] == before["path"]  # type: ignore[index]
        database.execute("UPDATE tiered_deltas SET delta = '\\x00'")
        with pytest.raises(DamagedValueError):
            database.found(talk)
        after = database.connection.execute(path).fetchone()
        assert after is not None
        assert (after["path"], after["raw"] or None) == (before["path"], None)  # type: ignore[index]


@pytest.mark.parametrize("dropped", ["SCHEMA public_whole", "TABLE checkpoints, tiered_deltas"])
def test_views_that_somebody_dropped_are_made_again(
    make_saver: Callable[..., TieredSaver], postgres_url: str, dropped: str
) -> None:
    """I7: without its views, compact storage is not read as if there were no deltas; they are made anew."""
    with database_of(make_saver, postgres_url, "compact") as database:
        saver = make_saver(sweep_interval=0)
        talk = conversation(steps=6)
        database.write(talk, storage="compact")
        assert len(list(saver.list({"configurable": {"thread_id": "talk"}}))) == 6

        database.execute(f"DROP {dropped} CASCADE")

        database.connection.execute("DISCARD ALL")
        found = list(saver.list({"configurable": {"thread_id": "talk"}}))
        assert len(found) == (6 if "SCHEMA" in dropped else 0)
        if "TABLE" in dropped:
            database.execute("DELETE FROM tiered_threads")
            database.write(talk, storage="compact")
        assert database.found(talk) == talk.values


def test_one_pool_may_serve_several_schemas(postgres_url: str, redis_url: str, key_prefix: str) -> None:
    """I7: a connection that has read one schema's views reads another schema's tables, and back."""
    from psycopg_pool import ConnectionPool

    from langgraph_tiered_saver import TieredConfig, TieredSaver

    with (
        ConnectionPool(postgres_url, min_size=1, max_size=2, kwargs={"autocommit": True}) as pool,
        redis.Redis.from_url(redis_url) as client,
    ):
        savers = {}
        for mode in STORAGES:
            config = TieredConfig(key_prefix=f"{key_prefix}-{mode}", postgres_schema=mode, storage=mode,
                                  sweep_interval=0)  # fmt: skip
            savers[mode] = TieredSaver(client, pool, config=config)  # type: ignore[call-arg,arg-type]
            savers[mode].setup()
            with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
                connection.execute(f"SET search_path = {mode}")
                talk = conversation(f"talk in {mode}", 5)
                entry = writer.ThreadRecords(talk.thread_id, 0, talk.records)
                writer.write(connection, [entry], statement_timeout=60, storage=mode)  # type: ignore[arg-type]
        for mode in (*STORAGES, *STORAGES):
            for name in STORAGES:
                found = savers[mode].get_tuple({"configurable": {"thread_id": f"talk in {name}"}})
                assert (found is not None) == (name == mode)
        for saver in savers.values():
            saver.close()


# --- converting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 1, 3], ids=["at once", "killed at first", "killed later"])
def test_converting_either_way_keeps_every_version(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch, steps: int | None
) -> None:
    """I2: converted, or converted in part, and converted again, every version is what it was."""
    monkeypatch.setattr(cold_conversion, "MOST_BYTES", 400_000)
    with database_of(make_saver, postgres_url, "standard") as database:
        talk = conversation(steps=100)
        for _ in range(3):
            # Branches that have less in common.
            talk.messages = talk.messages[:50]
            talk.add()
        database.write(talk)
        rows = database.rows()
        for _ in range(2):
            if steps is not None:
                database.convert(talk, "compact", steps=steps)
                assert database.found(talk) == talk.values
            database.convert(talk, "compact")
            assert database.found(talk) == talk.values
            assert database.damaged(talk) == []
            deltas_ = database.rows()["tiered_deltas"]
            assert len(deltas_) > 85
            assert max(row["depth"] for row in deltas_) <= materialize.MOST_DEPTH
            # What can be converted was.
            assert database.convert(talk, "compact") <= 1
            if steps is not None:
                database.convert(talk, "standard", steps=steps)
                assert database.found(talk) == talk.values
            database.convert(talk, "standard")
            assert database.rows() == rows
            assert database.convert(talk, "standard") == 0


def test_converting_while_writers_and_pruners_go_on(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: conversions to and fro, writers of both storages and prunes at once leave every version that stays whole."""
    monkeypatch.setattr(cold_conversion, "MOST_BYTES", 100_000)
    with database_of(make_saver, postgres_url, "compact") as database:
        talk = conversation(steps=300)
        ending = threading.Event()
        errors: list[BaseException] = []

        def going(work: Callable[[Database, int], None]) -> threading.Thread:
            def run() -> None:
                try:
                    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
                        turn = 0
                        while not ending.is_set():
                            work(Database(postgres_url, connection), turn)
                            turn += 1
                except BaseException as error:
                    errors.append(error)

            return threading.Thread(target=run)

        def to_and_fro(mine: Database, turn: int) -> None:
            mine.convert(talk, STORAGES[turn % 2])
            cold_conversion.end_compact(mine.connection)

        def prune(mine: Database, turn: int) -> None:
            clock = written[-1].sequence
            record = MaintenanceRecord("retain", {"keep_last": 40})
            maintenance.execute(mine.connection, "talk", clock, 1, record, shard_of=lambda name: 0,
                                statement_timeout=60)  # fmt: skip

        def read(mine: Database, turn: int) -> None:
            for name, values in mine.found(talk).items():
                assert values == talk.values[name]

        written = talk.records[:1]
        database.write(talk, written)
        threads = [going(work) for work in (to_and_fro, prune)]
        for thread in threads:
            thread.start()
        try:
            for at in range(1, 300, 3):
                part = talk.records[at : at + 3]
                database.write(talk, part, storage=random.choice(STORAGES))
                written = part
        finally:
            ending.set()
            for thread in threads:
                thread.join()

        assert errors == []
        found = database.found(talk)
        assert len(found) >= 40
        assert found == {name: talk.values[name] for name in found}
        assert list(talk.values)[-1] in found
        assert database.damaged(talk) == []


def test_the_mark_that_there_are_deltas_goes_only_when_there_are_none(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I2: a transaction that stores a delta while somebody says that there are none makes the mark anew."""
    with database_of(make_saver, postgres_url, "compact") as database:
        talk = conversation(steps=4)
        assert storage.recorded(database.connection) == "compact"
        assert cold_conversion.end_compact(database.connection)
        database.write(talk, storage="compact")
        assert storage.recorded(database.connection) == "compact"
        assert not cold_conversion.end_compact(database.connection)
        assert database.found(talk) == talk.values


def test_the_command_converts_and_shows(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """An operator converts all threads, or one, there and back, and is told what that did."""

    def run(*arguments: str) -> tuple[int, str]:
        known = {"LANGGRAPH_TIERED_REDIS_URL": redis_url, "LANGGRAPH_TIERED_POSTGRES_URL": postgres_url,
                 "LANGGRAPH_TIERED_KEY_PREFIX": key_prefix, "COLUMNS": "200"}  # fmt: skip
        result = CliRunner().invoke(app, ["storage", *arguments], env=known)
        return result.exit_code, result.output

    with database_of(make_saver, postgres_url, "standard") as database:
        talk, other = conversation(steps=30), conversation("other", 12)
        for one in (talk, other):
            database.write(one)
        code, text = run("convert", "--to", "compact", "talk", "--json")
        assert code == 0, text
        done = json.loads(text)
        assert (done["threads"], done["damaged"], done["standard"]) == (1, 0, False)
        assert 20 < done["versions"] < 30
        assert done["bytes_after"] < done["bytes_before"] / 5
        code, text = run("show", "--json")
        state = json.loads(text)
        assert (code, state["storage"], state["views"], state["deltas"]) == (0, "compact", "public_whole",
                                                                           done["versions"])  # fmt: skip
        assert "do not let plain PostgresSaver" in run("show")[1]
        code, text = run("convert", "--to", "compact")
        assert code == 0, text
        for one in (talk, other):
            assert database.found(one) == one.values
        database.execute("UPDATE tiered_deltas SET delta = '\\x00' WHERE thread_id = 'other' AND depth = 1")
        code, text = run("convert", "--to", "standard")
        assert code == FAILED
        assert "cannot be rebuilt" in text
        database.maintain(other, "delete_thread")
        code, text = run("convert", "--to", "standard")
        assert code == 0, text
        assert "plain PostgresSaver may use the tables" in text
        assert json.loads(run("show", "--json")[1])["storage"] == "standard"
        assert database.found(talk) == talk.values
        with PostgresSaver.from_conn_string(postgres_url) as plain:
            latest = plain.get_tuple({"configurable": {"thread_id": "talk"}})
            assert latest is not None
            assert latest.checkpoint["channel_values"]["messages"] == talk.messages
        assert run("convert", "--to", "elsewhere")[0] == 2


def test_a_conversion_that_ends_in_the_middle_is_gone_on_with(
    make_saver: Callable[..., TieredSaver], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between any two transactions, `convert` may be run again, and comes to the same."""
    monkeypatch.setattr(cold_conversion, "MOST_BYTES", 60_000)
    with database_of(make_saver, postgres_url, "standard") as database:
        saver = make_saver(sweep_interval=0)
        talks = [conversation(name, 25) for name in ("a", "b")]
        for one in talks:
            database.write(one)

        class EndedError(Exception):
            pass

        for to in ("compact", "standard"):
            for most in (1, 4, 7):
                calls = 0

                def end(done: Any, of: int, most: int = most) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == most:
                        raise EndedError

                with contextlib.suppress(EndedError):
                    convert(saver, to, progress=end)  # type: ignore[arg-type]
                for one in talks:
                    assert database.found(one) == one.values
            done = convert(saver, to)  # type: ignore[arg-type]
            assert done.threads == (2 if to == "compact" else done.threads)
            assert list(check(saver)) == []
        assert done.standard
        assert database.count("tiered_deltas") == 0


# --- everything at random --------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 1), st.integers(1, 12)),
        st.tuples(st.just("whole"), st.integers(0, 1), st.just(1)),
        st.tuples(st.just("cut"), st.integers(0, 1), st.integers(0, 8)),
        st.tuples(st.just("fork"), st.integers(0, 1), st.integers(1, 5)),
        st.tuples(st.just("keep"), st.integers(0, 1), st.integers(1, 6)),
        st.tuples(st.just("runs"), st.integers(0, 1), st.integers(0, 8)),
        st.tuples(st.just("copy"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("delete"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("again"), st.integers(0, 1), st.integers(1, 9)),
        st.tuples(st.sampled_from(STORAGES), st.integers(0, 1), st.integers(1, 3)),
    ),
    min_size=3,
    max_size=14,
)


@pytest.fixture
def scene(make_saver: Callable[..., TieredSaver], postgres_url: str) -> Iterator[Database]:
    with database_of(make_saver, postgres_url, "compact") as database:
        yield database


@given(operations=OPERATIONS, mode=st.sampled_from([*STORAGES, "both"]), depth=st.sampled_from([2, 64]))
@settings(max_examples=EXAMPLES or 15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_operations_keeps_every_value(
    scene: Database, operations: list[tuple[str, int, int]], mode: str, depth: int
) -> None:
    """I2, I4, I5: puts, prunes, copies, deletes and conversions in any order read like a model of whole values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialize, "MOST_DEPTH", depth)
        patch.setattr(cold_conversion, "MOST_BYTES", 30_000)
        run_at_random(scene, operations, mode)


def run_at_random(database: Database, operations: list[tuple[str, int, int]], mode: str) -> None:
    name = uuid.uuid4().hex
    talks = [Conversation(f"{name}-{number}") for number in range(2)]
    recent = RecentValues(10**6)
    for number, (operation, which, amount) in enumerate(operations):
        talk, written = talks[which], len(talks[which].records)
        ids = list(talk.values)
        if operation in ("add", "whole", "fork", "cut"):
            if operation == "cut":
                talk.messages = talk.messages[amount:]
            if operation == "fork":
                talk.messages = talk.messages[: len(talk.messages) // 2]
            for _ in range(amount if operation == "add" else 1):
                talk.add(whole=operation == "whole")
            database.write(talk, talk.records[written:], storage=STORAGES[number % 2] if mode == "both" else mode,
                           recent=recent)  # fmt: skip
        elif operation == "keep" and ids:
            database.maintain(talk, "retain", keep_last=amount)
            talk.values = {key: talk.values[key] for key in sorted(ids)[-amount:]}
            talk.last = talk.last if talk.values else None
        elif operation == "runs":
            doomed = f"run-{amount}"
            database.maintain(talk, "delete_runs", run_ids=[doomed])
            talk.values = {key: values for key, values in talk.values.items() if run_of(key) != doomed}
            # As after a removal on the hot side: the next value is carried whole.
            talk.last = None
            talk.note = NOTHING
        elif operation == "copy":
            other = talks[1 - which]
            talk.clock = max(talk.clock, other.clock)
            database.maintain(talk, "copy", source=other.thread_id)
            talk.values = {**other.values, **talk.values}
        elif operation == "delete":
            database.maintain(talk, "delete_thread")
            talk.values, talk.last, talk.note = {}, None, NOTHING
        elif operation == "again" and talk.records:
            database.write(talk, talk.records[-amount:], storage=STORAGES[amount % 2])
        elif operation in STORAGES:
            database.convert(talk, operation, steps=amount)
        for one in talks:
            assert database.found(one) == one.values
            assert database.damaged(one) == []


def run_of(checkpoint_id: str) -> str:
    return f"run-{int(checkpoint_id[2:8]) // 5}"
