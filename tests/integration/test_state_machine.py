"""Two savers over the same servers, as two processes would be, against one saver in memory, in any order of calls.

`TIERED_HYPOTHESIS_EXAMPLES=1000 pytest tests/integration/test_state_machine.py` searches for longer.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from langgraph.checkpoint.base import ERROR, INTERRUPT, RESUME, SCHEDULED, WRITES_IDX_MAP, CheckpointTuple
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import dict_row

from langgraph_tiered_saver import TieredSaver, operations
from langgraph_tiered_saver.cold import maintenance, writer
from langgraph_tiered_saver.drivers import _perform
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.hot.tier import HotCall
from langgraph_tiered_saver.records import MaintenanceRecord, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langchain_core.runnables import RunnableConfig

EXAMPLES = int(os.environ.get("TIERED_HYPOTHESIS_EXAMPLES", "0"))
NEVER = 600.0  # seconds of linger: nothing is flushed before somebody waits for it
SHARDS = 2
THREADS = ("one", "two {x}:/", "drei")
NAMESPACES = ("", "sub")
RUNS = ("run-0", "run-1", "run-2")
CHANNELS = ("messages", "files", "count", "note", "flag")
TASKS = tuple(str(uuid.UUID(int=number)) for number in (3, 1, 2))
PATHS = dict(zip(TASKS, ("~__pregel_pull, a", "~__pregel_pull, c", ""), strict=True))
SPECIAL = (ERROR, SCHEDULED, INTERRUPT, RESUME)
# Places are counted, so that one machine can use six and another one; half of all calls meet in the first.
slots = st.one_of(st.just(0), st.integers(0, len(THREADS) * len(NAMESPACES) - 1))
threads = st.one_of(st.just(0), st.integers(0, len(THREADS) - 1))
savers = st.integers(0, 1)
some = st.one_of(st.just(0), st.integers(-2, 3))  # counted from the latest
COUNT_ROWS = "SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx FROM checkpoint_writes"


class Model(InMemorySaver):
    """LangGraph's own saver in memory, with PostgresSaver's rules where the two differ, and what it lacks."""

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Let a call that mixes special and regular writes replace nothing, as PostgresSaver's insert does."""
        at = config["configurable"]
        stored = self.writes[at["thread_id"], at["checkpoint_ns"], at["checkpoint_id"]]
        replace = all(channel in WRITES_IDX_MAP for channel, _ in writes)
        for index, (channel, value) in enumerate(writes):
            key = (task_id, WRITES_IDX_MAP.get(channel, index))
            if replace or key not in stored:
                stored[key] = (task_id, channel, self.serde.dumps_typed(value), task_path)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        for ns, checkpoints in list(self.storage[source_thread_id].items()):
            target = self.storage[target_thread_id][ns]
            target.update({id: stored for id, stored in checkpoints.items() if id not in target})
        for (thread_id, *rest), stored in list(self.writes.items()):
            if thread_id == source_thread_id:
                copied = self.writes[target_thread_id, rest[0], rest[1]]
                copied.update({key: write for key, write in stored.items() if key not in copied})
        for (thread_id, *rest), value in list(self.blobs.items()):
            if thread_id == source_thread_id:
                self.blobs.setdefault((target_thread_id, *rest), value)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        for thread_id in thread_ids:
            for ns, checkpoints in self.storage[thread_id].items():
                latest = max(checkpoints, default=None)
                self._remove(thread_id, ns, [id for id in checkpoints if id != latest])
                if latest is not None:
                    checkpoint, metadata, _ = checkpoints[latest]
                    checkpoints[latest] = (checkpoint, metadata, None)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        for thread_id, namespaces in self.storage.items():
            for ns, checkpoints in namespaces.items():
                doomed = [
                    id
                    for id, (_, metadata, _) in checkpoints.items()
                    if self.serde.loads_typed(metadata).get("run_id") in run_ids
                ]
                self._remove(thread_id, ns, doomed)

    def _remove(self, thread_id: str, ns: str, ids: Sequence[str]) -> None:
        for id in ids:
            del self.storage[thread_id][ns][id]
            self.writes.pop((thread_id, ns, id), None)

    def write_keys(self) -> set[tuple[str, str, str, str, int]]:
        return {(*at, task, index) for at, stored in self.writes.items() for task, index in stored}


@dataclass(frozen=True)
class Known:
    """What a child of a checkpoint, or the same one put again, is made from."""

    parent_id: str
    values: dict[str, Any]
    versions: dict[str, str]
    arguments: tuple[dict[str, Any], dict[str, Any]]


class World:
    """The servers of a test, and two savers that live through many examples."""

    def __init__(self, redis_url: str, postgres_url: str, key_prefix: str) -> None:
        self.redis_url = redis_url
        self.postgres_url = postgres_url
        self.key_prefix = key_prefix
        self.linger = NEVER
        self.savers: list[TieredSaver] = []
        self.redis = redis.Redis.from_url(redis_url)
        self.postgres: psycopg.Connection[Any] = psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row)

    def open(self, **settings: Any) -> TieredSaver:
        chosen = {"flush_linger": self.linger, "shard_count": SHARDS, "sweep_interval": 0.0, "flush_timeout": 5.0}
        return TieredSaver.from_conn_string(
            self.redis_url, self.postgres_url, key_prefix=self.key_prefix, **{**chosen, **settings}
        )

    def evict(self, thread_id: str) -> int:
        """Remove a thread's hot hashes, as their TTL or an eviction would."""
        stem = self.keyspace.thread(thread_id).hot_stem
        names = [name for name in self.redis.scan_iter(match=f"{{{self.key_prefix}:*", count=1000)
                 if name.startswith(stem)]  # fmt: skip
        return int(self.redis.delete(*names)) if names else 0

    @property
    def keyspace(self) -> Keyspace:
        return Keyspace(self.key_prefix, SHARDS)

    def journal(self, thread_id: str) -> list[writer.Journaled]:
        """Read a thread's journal."""
        entries = self.redis.xrange(self.keyspace.thread(thread_id).journal)
        return [
            writer.Journaled(int(name.split(b"-")[0]), *decode(fields[b"r"]), fields[b"r"]) for name, fields in entries
        ]

    def unflushed(self) -> list[bytes]:
        """List what in Redis says that something is not flushed."""
        names = list(self.redis.scan_iter(match=f"{{{self.key_prefix}:*", count=1000))
        waiting = [name for name in names if b":journal:" in name or name.endswith(b":dirty")]
        fields = [field for name in names if name.endswith(b":shard") for field in self.redis.hkeys(name)]
        return waiting + [field for field in fields if field.startswith(b"t:")]

    def clear(self) -> None:
        """Close the savers and remove everything, after an example that failed and after the last one."""
        for saver in self.savers:
            saver.close()
        self.savers = []
        if names := list(self.redis.scan_iter(match=f"{{{self.key_prefix}*", count=1000)):
            self.redis.delete(*names)
        for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "tiered_threads"):
            self.postgres.execute(f"DELETE FROM {table}".encode())

    def close(self) -> None:
        self.clear()
        self.redis.close()
        self.postgres.close()


def config_of(thread_id: str, ns: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    parts = {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in parts.items() if value is not None}}


def readable(found: CheckpointTuple | None) -> Any:
    """Give what a caller can see of a checkpoint, in one form for all savers."""
    if found is None:
        return None
    at, parent = found.config["configurable"], (found.parent_config or {}).get("configurable", {})
    checkpoint = dict(found.checkpoint)
    return {
        "at": (at["thread_id"], at["checkpoint_ns"], at["checkpoint_id"]),
        "parent": parent.get("checkpoint_id"),
        "values": checkpoint.pop("channel_values"),
        "checkpoint": checkpoint,
        "metadata": dict(found.metadata),
        "writes": found.pending_writes,
    }


def listed(found: Iterator[CheckpointTuple]) -> list[Any]:
    """Order a list as PostgresSaver does; where ids are equal, as in copies, its order is nobody's."""
    return sorted(map(readable, found), key=lambda one: (one["at"][2], *one["at"][:2]), reverse=True)


class TwoSavers(RuleBasedStateMachine):
    """Every call goes to one of two savers and to the model."""

    world: World
    places: int

    def __init__(self) -> None:
        super().__init__()
        # Threads are new in each example, so that the savers need not be.
        suffix = uuid.uuid4().hex[:8]
        self.threads = [f"{name} {suffix}" for name in THREADS]
        self.slots = [(thread, ns) for ns in NAMESPACES for thread in self.threads][: self.places]
        self.model = Model()
        if not self.world.savers:
            self.world.savers = [self.world.open(), self.world.open()]
        self.savers = self.world.savers
        self.known: dict[tuple[str, str], dict[str, Known]] = {slot: {} for slot in self.slots}
        self.announced: dict[tuple[str, str], list[str]] = {slot: [] for slot in self.slots}
        self.held: dict[str, dict[int, writer.Journaled]] = {thread: {} for thread in self.threads}
        self.count = 0
        self.eager = False

    def slot(self, number: int) -> tuple[str, str]:
        return self.slots[number % len(self.slots)]

    # --- what is done ------------------------------------------------------------------------------------------------

    @initialize(eager=st.booleans())
    def choose(self, eager: bool) -> None:
        """Reading changes what is hot, so that one half of the examples reads after every step, the other seldom."""
        self.eager = eager

    @rule(
        saver=savers,
        slot=slots,
        parent=some,
        announced=st.booleans(),
        changed=st.sets(st.sampled_from(CHANNELS), min_size=1),
        lost=st.sets(st.sampled_from(CHANNELS), max_size=2),
        run=st.sampled_from(RUNS),
    )
    def put(
        self,
        saver: int,
        slot: int,
        parent: int,
        announced: bool,
        changed: set[str],
        lost: set[str],
        run: str,
    ) -> None:
        """Put a checkpoint after the latest one, or as a fork after an older one."""
        at = self.slot(slot)
        parents = sorted(self.known[at], reverse=True)
        parent_id = parents[parent % len(parents)] if parents else ""
        waiting = [id for id in self.announced[at] if id > parent_id]
        checkpoint_id = waiting[0] if announced and waiting else str(uuid6())
        self.put_checkpoint(self.savers[saver], at, parent_id, checkpoint_id, changed, lost - changed, run)

    @rule(
        saver=savers,
        slot=slots,
        supersteps=st.lists(
            st.tuples(
                st.sets(st.sampled_from(CHANNELS), min_size=1, max_size=2),
                st.lists(st.sampled_from(TASKS), unique=True),
                st.integers(0, 3),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def run(self, saver: int, slot: int, supersteps: Sequence[tuple[set[str], Sequence[str], int]]) -> None:
        """Put the next checkpoints and what their tasks write, some of which arrives before its checkpoint."""
        at, one = self.slot(slot), self.savers[saver]
        for changed, tasks, early in supersteps:
            checkpoint_id, latest = str(uuid6()), max(self.known[at], default="")
            for task in tasks[:early]:
                self.write(one, at, checkpoint_id, task, ["messages", "count"])
            self.put_checkpoint(one, at, latest, checkpoint_id, changed, set(), RUNS[0])
            for task in tasks[early:]:
                self.write(one, at, checkpoint_id, task, ["messages"])

    @rule(saver=savers, slot=slots, which=some)
    def put_again(self, saver: int, slot: int, which: int) -> None:
        """Put a checkpoint once more, with other metadata; its parent may have been pruned meanwhile."""
        at = self.slot(slot)
        if ids := sorted(self.known[at], reverse=True):
            checkpoint_id = ids[which % len(ids)]
            before = self.known[at][checkpoint_id]
            self.count += 1
            checkpoint, metadata = before.arguments
            metadata = {**metadata, "again": self.count}
            self.known[at][checkpoint_id] = replace(before, arguments=(checkpoint, metadata))
            stored = self.model.get_tuple(config_of(*at, checkpoint_id))
            assert stored is not None
            # The first parent stays; the model would replace it, so that it gets it again.
            parent_id = stored.parent_config["configurable"]["checkpoint_id"] if stored.parent_config else None
            self.model.put(config_of(*at, parent_id), checkpoint, metadata, {})
            self.savers[saver].put(config_of(*at, before.parent_id or None), checkpoint, metadata, {})
            self.hold(at[0])

    @rule(
        saver=savers,
        slot=slots,
        which=some,
        early=st.integers(0, 3),
        task=st.sampled_from(TASKS),
        channels=st.one_of(
            st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3),
            st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=2, unique=True),
            st.lists(st.sampled_from((*CHANNELS, *SPECIAL)), min_size=1, max_size=3, unique=True),
        ),
    )
    def put_writes(self, saver: int, slot: int, which: int, early: int, task: str, channels: list[str]) -> None:
        """Write on the latest checkpoint, on an older one, or on one that is put later or never."""
        at = self.slot(slot)
        if early == 0 and which >= len(self.announced[at]):
            self.announced[at].append(str(uuid6()))
        ids = self.announced[at] if early == 0 else sorted(self.known[at], reverse=True)
        if ids:
            self.write(self.savers[saver], at, ids[which % len(ids)], task, channels)

    def put_checkpoint(
        self,
        saver: TieredSaver,
        slot: tuple[str, str],
        parent_id: str,
        checkpoint_id: str,
        changed: set[str],
        lost: set[str],
        run: str,
    ) -> None:
        before = self.known[slot].get(parent_id, Known("", {}, {}, ({}, {})))
        if checkpoint_id in self.announced[slot]:
            self.announced[slot].remove(checkpoint_id)
        self.count += 1
        version = self.model.get_next_version(max(before.versions.values(), default=None), None)
        lost = lost & set(before.values)
        new_versions = dict.fromkeys([*changed, *lost], version)
        number = self.count
        made = {"messages": [number], "files": {"n": [number]}, "count": number, "note": f"n{number}", "flag": None}
        kept = {channel: value for channel, value in before.values.items() if channel not in lost}
        values = {**kept, **{channel: made[channel] for channel in changed}}
        versions = {**before.versions, **new_versions}
        checkpoint = {
            "v": 4,
            "id": checkpoint_id,
            "ts": datetime.now(timezone.utc).isoformat(),
            "channel_values": values,
            "channel_versions": versions,
            "versions_seen": {"node": dict(before.versions)},
            "updated_channels": sorted(changed),
        }
        metadata = {"source": "loop", "step": number, "parents": {}, "run_id": run}
        self.known[slot][checkpoint_id] = Known(parent_id, values, versions, (checkpoint, metadata))
        for one in (saver, self.model):
            one.put(config_of(*slot, parent_id or None), checkpoint, metadata, new_versions)
        self.hold(slot[0])

    def write(
        self, saver: TieredSaver, slot: tuple[str, str], checkpoint_id: str, task: str, channels: Sequence[str]
    ) -> None:
        self.count += 1
        writes = [(channel, {"write": [self.count, index]}) for index, channel in enumerate(channels)]
        for one in (saver, self.model):
            one.put_writes(config_of(*slot, checkpoint_id), writes, task, PATHS[task])
        self.hold(slot[0])

    def hold(self, thread: str) -> None:
        """Read a journal, as a flusher does that is then slow."""
        self.held[thread].update({item.sequence: item for item in self.world.journal(thread)})

    # --- what is removed and copied ----------------------------------------------------------------------------------

    @rule(saver=savers, how=st.sampled_from(["delete", "prune", "runs", "copy"]), first=threads, second=threads,
          run=st.sampled_from(RUNS))  # fmt: skip
    def maintain(self, saver: int, how: str, first: int, second: int, run: str) -> None:
        """Delete a thread or some runs, prune, or copy."""
        thread, other = self.threads[first], self.threads[second]
        for one in (self.savers[saver], self.model):
            if how == "delete":
                one.delete_thread(thread)
            elif how == "prune":
                one.prune(sorted({thread, other}), strategy="keep_latest")
            elif how == "runs":
                one.delete_for_runs([run])
            elif other != thread:
                one.copy_thread(thread, other)
        if how == "copy" and other != thread:
            for name, ns in self.slots:
                if name == other:
                    self.known[other, ns] = {**self.known.get((thread, ns), {}), **self.known[other, ns]}
            self.hold_maintenance(other, MaintenanceRecord(maintenance.COPY, {"source": thread}))
        elif how == "delete":
            self.hold_maintenance(thread, MaintenanceRecord(maintenance.DELETE_THREAD, {}))
        elif how == "prune":
            self.hold_maintenance(thread, MaintenanceRecord(maintenance.PRUNE, {}))
        for name, ns in self.slots:
            left = self.model.storage[name][ns]
            self.known[name, ns] = {id: known for id, known in self.known[name, ns].items() if id in left}

    def hold_maintenance(self, thread: str, record: MaintenanceRecord) -> None:
        query = "SELECT tombstone FROM tiered_threads WHERE thread_id = %s"
        found = self.world.postgres.execute(query, (thread,)).fetchone()
        assert found is not None
        sequence = found["tombstone"]
        self.held[thread][sequence] = writer.Journaled(sequence, 1, record, encode(record, 1))

    # --- what happens by itself --------------------------------------------------------------------------------------

    @rule(thread=threads)
    def evict(self, thread: int) -> None:
        self.world.evict(self.threads[thread])

    @rule(saver=savers, how=st.sampled_from(["flush", "close", "abandon"]))
    def flush(self, saver: int, how: str) -> None:
        """Flush, or close the saver, which may leave its records to the journal, and open another."""
        if how == "flush":
            self.savers[saver].flush()
        else:
            self.savers[saver].close()
            self.savers[saver] = self.world.open(close_timeout=10.0 if how == "close" else 0.0)

    @rule(number=threads, start=st.integers(0, 9), size=st.integers(1, 4))
    def flush_late(self, number: int, start: int, size: int) -> None:
        """Write records once more that PostgreSQL has had for long, as a slow flusher does in the end."""
        thread = self.threads[number]
        waiting = self.world.journal(thread)
        first = waiting[0].sequence if waiting else None
        held = [item for sequence, item in sorted(self.held[thread].items()) if first is None or sequence < first]
        shard_of, connection = self.world.keyspace.shard_of, self.world.postgres
        start %= max(1, len(held))
        for item in held[start : start + size]:
            if isinstance(item.record, MaintenanceRecord):
                maintenance.execute(
                    connection,
                    thread,
                    item.sequence,
                    item.generation,
                    item.record,
                    shard_of=shard_of,
                    statement_timeout=10.0,
                )
            else:
                entry = writer.ThreadRecords(thread, shard_of(thread), [item])
                writer.write(connection, [entry], statement_timeout=10.0)

    # --- what is read ------------------------------------------------------------------------------------------------

    @rule(
        saver=savers,
        slot=slots,
        how=st.sampled_from(["latest", "one", "list", "everything"]),
        which=some,
        run=st.sampled_from([None, *RUNS]),
        everywhere=st.booleans(),
    )
    def read(self, saver: int, slot: int, how: str, which: int, run: str | None, everywhere: bool) -> None:
        """I6, I9: every read gives what was acknowledged before, by whichever saver."""
        one, (thread, ns) = self.savers[saver], self.slot(slot)
        ids = sorted({*self.known[thread, ns], *self.announced[thread, ns]}, reverse=True)
        chosen = ids[which % len(ids)] if ids else str(uuid6())
        if how == "everything":
            assert listed(one.list(None)) == listed(self.model.list(None))
        elif how == "list":
            config = config_of(thread, None if everywhere else ns)
            options: dict[str, Any] = {"filter": {"run_id": run} if run else None}
            if which:
                options["before"] = config_of(thread, "", chosen)
            assert listed(one.list(config, **options)) == listed(self.model.list(config, **options))
        else:
            config = config_of(thread, ns, chosen if how == "one" else None)
            assert readable(one.get_tuple(config)) == readable(self.model.get_tuple(config))

    @invariant()
    def read_after_every_step(self) -> None:
        if self.eager:
            self.read_all_latest()

    def read_all_latest(self) -> None:
        """I6, I9: the latest checkpoint is the one with the highest id, with all its writes."""
        for index, slot in enumerate(self.slots):
            found = self.savers[(self.count + index) % 2].get_tuple(config_of(*slot))

            assert readable(found) == readable(self.model.get_tuple(config_of(*slot)))

    # --- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.read_all_latest()
            self.check_cold_tier()
            for thread in self.threads:
                self.savers[0].delete_thread(thread)
        except BaseException:
            self.world.clear()
            raise

    def check_cold_tier(self) -> None:
        """I1, I2: once all is flushed, PostgreSQL alone holds what the model holds, and Redis has nothing waiting."""
        for saver in self.savers:
            saver.flush()
        # Records of closed savers have no owner left; reading everything adopts them.
        self.savers[0].thread_ids()

        assert self.world.unflushed() == []
        connection = self.world.postgres
        plain = PostgresSaver(connection)
        assert listed(plain.list(None)) == listed(self.model.list(None))
        for slot in self.slots:
            assert readable(plain.get_tuple(config_of(*slot))) == readable(self.model.get_tuple(config_of(*slot)))
        writes = {tuple(row.values()) for row in connection.execute(COUNT_ROWS)}
        assert writes == self.model.write_keys()
        self.check_references()

    def check_references(self) -> None:
        """I2: every value that a checkpoint was put with is inline, or there is the blob it names."""
        connection = self.world.postgres
        blobs = {
            tuple(row.values())
            for row in connection.execute("SELECT thread_id, checkpoint_ns, channel, version FROM checkpoint_blobs")
        }
        stored = {
            (row["thread_id"], row["checkpoint_ns"], row["checkpoint_id"]): row["checkpoint"]
            for row in connection.execute("SELECT * FROM checkpoints")
        }
        for slot, checkpoints in self.known.items():
            for checkpoint_id, known in checkpoints.items():
                checkpoint = stored[(*slot, checkpoint_id)]
                for channel in known.values:
                    inline = channel in checkpoint["channel_values"]
                    assert inline or (*slot, channel, checkpoint["channel_versions"][channel]) in blobs


def run_machine(world: World, places: int, examples: int, steps: int) -> None:
    with world.open() as saver:
        saver.setup()
    run_state_machine_as_test(
        type("Machine", (TwoSavers,), {"world": world, "places": places}),
        settings=settings(
            max_examples=EXAMPLES or examples,
            # Shrinking takes minutes; what is found in a short run is reported as it is, with how to repeat it.
            phases=[phase for phase in Phase if EXAMPLES or phase is not Phase.shrink],
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=bool(EXAMPLES),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def world(redis_url: str, postgres_url: str, key_prefix: str) -> Iterator[World]:
    world = World(redis_url, postgres_url, key_prefix)
    yield world
    world.close()


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_any_calls_read_like_one_saver_in_memory(world: World) -> None:
    """I1, I2, I4, I5, I6, I9: two savers that flush only when somebody waits, three threads, two namespaces."""
    run_machine(world, places=6, examples=40, steps=50)


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_any_calls_in_one_place_read_like_one_saver_in_memory(world: World) -> None:
    """I1, I2, I4, I5, I6, I9: the same, where every call meets every other one."""
    run_machine(world, places=1, examples=50, steps=50)


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_any_calls_with_flushers_running_beside(world: World) -> None:
    """I1, I2, I4, I5, I6, I9: the same, with both background flushers at work all the time."""
    world.linger = 0.0
    run_machine(world, places=6, examples=12, steps=50)


# --- single sequences ------------------------------------------------------------------------------------------------


class Thread:
    """Makes small checkpoints of one thread, in the order of their ids."""

    def __init__(self) -> None:
        self.model = Model()
        self.slot = ("one", "")
        self.checkpoints: list[tuple[RunnableConfig, dict[str, Any], dict[str, Any], dict[str, str]]] = []

    def make(self, count: int) -> None:
        """Make a line of checkpoints, each the child of the one before; nothing is put."""
        versions: dict[str, str] = {}
        for number in range(count):
            parent = self.checkpoints[-1][1]["id"] if self.checkpoints else None
            versions = {"n": self.model.get_next_version(versions.get("n"), None)}
            checkpoint = {
                "v": 4,
                "id": str(uuid6()),
                "ts": datetime.now(timezone.utc).isoformat(),
                "channel_values": {"n": [number]},
                "channel_versions": versions,
                "versions_seen": {},
                "updated_channels": ["n"],
            }
            metadata = {"source": "loop", "step": number, "parents": {}}
            self.checkpoints.append((config_of(*self.slot, parent), checkpoint, metadata, versions))

    def put(self, saver: TieredSaver, *numbers: int) -> None:
        for number in numbers:
            for one in (saver, self.model):
                one.put(*self.checkpoints[number])

    def write(self, saver: TieredSaver, number: int, task: str = TASKS[0]) -> None:
        for one in (saver, self.model):
            one.put_writes(config_of(*self.slot, self.checkpoints[number][1]["id"]), [("n", "written")], task, "path")

    def check(self, saver: TieredSaver) -> None:
        found = saver.get_tuple(config_of(*self.slot))
        assert readable(found) == readable(self.model.get_tuple(config_of(*self.slot)))


@pytest.fixture
def thread() -> Thread:
    """Five checkpoints of one thread that are not put yet."""
    thread = Thread()
    thread.make(5)
    return thread


@pytest.fixture
def saver(world: World) -> Iterator[TieredSaver]:
    with world.open() as saver:
        yield saver


@pytest.mark.parametrize(
    "again", [[0], [1], [0, 1], [1, 2], [2, 1], [0, 1, 2], [1, 3]], ids=lambda again: "-".join(map(str, again))
)
def test_checkpoints_put_again_after_eviction_are_not_the_latest(
    world: World, saver: TieredSaver, thread: Thread, again: list[int]
) -> None:
    """I6: the latest stays the one with the highest id when older ones are put again while nothing is hot."""
    thread.put(saver, 0, 1, 2, 3, 4)
    world.evict("one")

    thread.put(saver, *again)

    thread.check(saver)


def test_a_new_branch_of_older_ids_after_eviction_is_not_the_latest(
    world: World, saver: TieredSaver, thread: Thread
) -> None:
    """I6: nor when two older checkpoints arrive late, from a process that was slow, while nothing is hot."""
    thread.put(saver, 0, 1, 4)
    world.evict("one")

    thread.put(saver, 2, 3)

    thread.check(saver)


@pytest.mark.parametrize("put_first", [0, 2])
def test_writes_of_a_later_checkpoint_survive_the_put_of_one_before_it(
    saver: TieredSaver, thread: Thread, put_first: int
) -> None:
    """I9: writes that arrive before anything is hot belong to their checkpoint, whatever is put between."""
    thread.put(saver, *range(put_first))
    thread.write(saver, put_first + 1)

    thread.put(saver, put_first, put_first + 1)

    thread.check(saver)


@pytest.mark.parametrize("first", [0, 1])
def test_writes_that_were_evicted_before_their_checkpoint_arrived(
    world: World, saver: TieredSaver, thread: Thread, first: int
) -> None:
    """I9: writes that came early and left the hot tier before their checkpoint came are found in the cold one."""
    thread.put(saver, *range(first))
    thread.write(saver, first)
    world.evict("one")

    thread.put(saver, first)

    thread.check(saver)


@pytest.mark.parametrize("evicted", ["before", "after", "both"])
@pytest.mark.parametrize("hot", [0, 1])
def test_warming_keeps_the_writes_of_a_later_checkpoint(
    world: World, saver: TieredSaver, thread: Thread, hot: int, evicted: str
) -> None:
    """I9: a read that makes the latest checkpoint hot again does not lose the writes of the next one."""
    thread.put(saver, *range(hot))
    if evicted != "after":
        world.evict("one")
        thread.put(saver, hot)
        hot += 1
    thread.write(saver, hot)
    if evicted != "before":
        world.evict("one")
    thread.check(saver)

    thread.put(saver, hot)

    thread.check(saver)


@pytest.mark.parametrize("change", ["delete", "prune", "put", "write"])
@pytest.mark.parametrize("made_by", ["us", "PostgresSaver"])
def test_a_change_during_a_miss_is_not_undone_by_warming(
    world: World, saver: TieredSaver, thread: Thread, made_by: str, change: str
) -> None:
    """I5, I9: what happens between the cold read of a miss and the warming is seen by the next read."""
    saver.setup()
    if made_by == "us":
        thread.put(saver, 0, 1)
        saver.flush()
        world.evict("one")
    else:
        for one in (PostgresSaver(world.postgres), thread.model):
            for arguments in thread.checkpoints[:2]:
                one.put(*arguments)

    def before_warming() -> None:
        if change == "put":
            thread.put(saver, 2)
        elif change == "write":
            thread.write(saver, 1)
        elif change == "prune":
            saver.prune(["one"])
            thread.model.prune(["one"])
        else:
            saver.delete_thread("one")
            thread.model.delete_thread("one")

    read_with_a_pause(saver, config_of("one", ""), before_warming)

    thread.check(saver)
    assert listed(saver.list(config_of("one"))) == listed(thread.model.list(config_of("one")))


def read_with_a_pause(saver: TieredSaver, config: RunnableConfig, before_warming: Callable[[], None]) -> None:
    """Run `get_tuple`, and something else just before it makes what it read hot."""
    runtime = saver._source.current()
    operation = operations.get_tuple(runtime, saver.serde, config)
    paused = False
    request = next(operation)
    try:
        while True:
            if isinstance(request, HotCall) and request.script.name == "warm":
                before_warming()
                paused = True
            request = operation.send(_perform(runtime, request))
    except StopIteration:
        assert paused


def test_flush_across_another_savers_record_does_not_linger(world: World, thread: Thread) -> None:
    """I3, I8: who waits for a flush does not pay for `flush_linger`, also where another saver's record is between."""
    with world.open() as one, world.open() as other:
        thread.put(one, 0)
        thread.put(other, 1)
        thread.put(one, 2)
        started = time.monotonic()

        one.flush()

        assert time.monotonic() - started < 5.0
        thread.check(other)


@pytest.mark.parametrize("hot_ttl", [None, 3600.0])
def test_a_miss_does_not_shorten_what_is_kept_hot(world: World, thread: Thread, hot_ttl: float) -> None:
    """I5: hot state lives for `hot_ttl`, and the set that a delete finds it by no less, also after a miss."""
    with world.open(hot_ttl=hot_ttl) as saver, redis.Redis.from_url(world.redis_url) as client:
        saver.get_tuple(config_of("one", ""))
        thread.put(saver, 0)
        thread.write(saver, 0)
        thread.check(saver)

        names = [
            name for name in client.scan_iter(match=f"{{{world.key_prefix}:*") if b":hot:" in name or b"namesp" in name
        ]

        lives = {name: client.pttl(name) for name in names}
        assert len(lives) == 2
        assert all(life == -1 if hot_ttl is None else 3_500_000 < life <= 3_600_000 for life in lives.values()), lives
