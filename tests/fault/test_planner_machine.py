"""Any order of calls, flushes, checks, crashes, stalls and losses of either server, and what must hold after each step.

The processes are those of `tests.fault.simulation`: the real code, cut between any two calls to a server. What fails is
printed with every call and how to repeat it. `TIERED_HYPOTHESIS_EXAMPLES=2000` before `pytest
tests/fault/test_planner_machine.py` searches for longer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from langgraph.checkpoint.base import RESUME

from langgraph_tiered_saver.cold import maintenance, writer
from langgraph_tiered_saver.cold.writer import Journaled, ThreadRecords
from langgraph_tiered_saver.errors import HotTierUnavailableError, TieredSaverError
from langgraph_tiered_saver.records import CheckpointRecord, MaintenanceRecord, Record, WritesRecord, decode
from tests.fault.simulation import PATIENCE, POLL, Outcome, Process, Snapshot, Task, World, new_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.runnables import RunnableConfig

    from langgraph_tiered_saver.embedded import EmbeddedServers

EXAMPLES = int(os.environ.get("TIERED_HYPOTHESIS_EXAMPLES", "0"))
THREADS = ("one", "two")
MOST_PROCESSES = 3

places = st.sampled_from([("one", ""), ("one", ""), ("one", "sub"), ("two", "")])
threads = st.sampled_from(["one", "one", "two"])
who = st.integers(0, MOST_PROCESSES - 1)
# How far a task goes: to its end; or so many calls, and the next one has an outcome, and may be the last for now.
ways: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.builds(
        lambda cut, outcome, stay: {"cut": cut, "outcome": outcome, "stay": stay},
        st.integers(0, 12),
        st.sampled_from([None, *Outcome]),
        st.booleans(),
    ),
)

# A record, as any place that may hold it names it: a checkpoint, or a task's writes to one.
Key = tuple[str, str, str, str]

READ_CHECKPOINTS = "SELECT thread_id, checkpoint_ns, checkpoint_id, '' AS task_id FROM checkpoints"
READ_WRITES = "SELECT DISTINCT thread_id, checkpoint_ns, checkpoint_id, task_id FROM checkpoint_writes"
# Checkpoints with fewer blobs than they were put with.
MISSING_BLOBS = """
SELECT thread_id, checkpoint_ns, checkpoint_id, tiered_blobs FROM checkpoints AS c WHERE tiered_blobs > (
    SELECT count(*) FROM jsonb_each_text(checkpoint -> 'channel_versions') AS named
    JOIN checkpoint_blobs AS b ON (b.thread_id, b.checkpoint_ns, b.channel, b.version)
        = (c.thread_id, c.checkpoint_ns, named.key, named.value))"""
READ_ALL = (
    "SELECT * FROM checkpoints ORDER BY thread_id, checkpoint_ns, checkpoint_id",
    "SELECT * FROM checkpoint_blobs ORDER BY thread_id, checkpoint_ns, channel, version",
    "SELECT * FROM checkpoint_writes ORDER BY thread_id, checkpoint_ns, checkpoint_id, task_id, idx",
)


def address(place: tuple[str, str], checkpoint_id: str = "") -> RunnableConfig:
    """Give the config of a checkpoint, or of the latest one."""
    return {"configurable": {"thread_id": place[0], "checkpoint_ns": place[1], "checkpoint_id": checkpoint_id}}


def key_of(thread_id: str, record: Record) -> Key | None:
    """Name a record."""
    if isinstance(record, CheckpointRecord):
        return (thread_id, record.checkpoint_ns, record.checkpoint_id, "")
    if isinstance(record, WritesRecord):
        return (thread_id, record.checkpoint_ns, record.checkpoint_id, record.task_id)
    return None


@dataclass(eq=False)
class Call:
    """A call of a client, and what becomes of it.

    Attributes:
        process: Who made it.
        thread_id: The thread.
        began, ended: When, counted in events; None: it is under way.
        acked: It returned.
    """

    process: Process
    thread_id: str
    began: int
    ended: int | None = None
    acked: bool = False

    def before(self, other: Call) -> bool:
        """Whether it had ended before the other one began."""
        return self.ended is not None and self.ended < other.began


@dataclass(eq=False)
class Written(Call):
    """A checkpoint or writes.

    Attributes:
        key: Its name.
        parent: The checkpoint that it came from.
        values, versions: Of a checkpoint's channels; or the value written.
        writer_lost: Its writer died, or could not keep it.
        redis_lost: It was in Redis, and went missing there before it was flushed.
        late: Nobody could know of it when a generation ended, because its writer was dead or silent.
        came_in: The open generation in which it came to PostgreSQL after all; 0 if it did in a closed one.
    """

    key: Key = ("", "", "", "")
    parent: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    writer_lost: bool = False
    redis_lost: bool = False
    late: bool = False
    came_in: int | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Its thread and namespace."""
        return self.key[:2]

    def __repr__(self) -> str:
        return f"{'put' if not self.key[3] else 'write'} {self.key} by {self.process.name}, {vars(self)}"


@dataclass(eq=False)
class Removed(Call):
    """A deleted or pruned thread."""

    whole: bool = True


class Processes(RuleBasedStateMachine):
    """What any number of processes do, and what is known to have been acknowledged."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.begin()
        self.world.on_move = self.moved
        self.now = 0
        self.count = 0
        self.written: dict[Key, Written] = {}
        self.removed: list[Removed] = []
        self.calls: dict[Task, Any] = {}
        self.snapshots: list[Snapshot] = []
        self.journaled_ever: dict[tuple[str, int], bytes] = {}
        self.passed_over: set[Process] = set()
        self.generation = (1, False)
        self.closed: dict[Process, int | None] = {}
        self.looked_at = self.asked_at = -1
        self.durable: set[Key] = set()
        self.calm = True
        self.start(False)

    # --- clients -----------------------------------------------------------------------------------------------------

    def tick(self) -> int:
        self.now += 1
        return self.now

    def process(self, number: int) -> Process:
        alive = self.world.processes
        return alive[number % len(alive)]

    def begin(self, name: str, call: Any, work: Any, way: dict[str, Any]) -> None:
        """Let a client of a process make a call, as far as that goes."""
        if not isinstance(call, Read):
            self.snapshots = [*self.snapshots, self.world.snapshot()][-4:]
        process = call.process
        task = process.start(name, work)
        self.calls[task] = call
        if not process.is_stalled:
            task.run(**way)
        self.after()

    @precondition(lambda self: len(self.world.processes) < MOST_PROCESSES)
    @rule(forgetful=st.sampled_from([False, False, False, True]))
    def start(self, forgetful: bool) -> None:
        """Start a process, which may have next to no memory for what it acknowledges."""
        self.world.start(max_memory_bytes=500 if forgetful else 1_000_000)

    @rule(number=who, place=places, back=st.integers(0, 3), seen=st.booleans(), way=ways)
    def put(self, number: int, place: tuple[str, str], back: int, seen: bool, way: dict[str, Any]) -> None:
        """Put a checkpoint after one that is known, seldom an older one: "b" and "c" change at a start only."""
        process = self.process(number)
        known = self.known(place, seen)
        parent = known[-1 - (back % len(known) if back == 3 else 0)] if known else None
        self.count += 1
        version = f"{self.count:08d}.0"
        changed = {"a": version} if parent else {"a": version, "b": version, "c": version}
        versions = {**(parent.versions if parent else {}), **changed}
        values = {**(parent.values if parent else {}), **{name: [name, self.count] for name in changed}}
        name = f"{self.count:08d}"
        checkpoint: Any = {
            "v": 4,
            "id": name,
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": values,
            "channel_versions": versions,
            "versions_seen": {},
            "updated_channels": list(changed),
        }
        parent_id = parent.key[2] if parent else ""
        call = Written(process, place[0], self.tick(), key=(*place, name, ""), parent=parent_id)
        call.values, call.versions = values, versions
        self.written[call.key] = call
        metadata: Any = {"source": "loop", "step": self.count, "parents": {}}
        self.begin(
            f"put {name}",
            call,
            lambda: process.saver.put(address(place, parent_id), checkpoint, metadata, changed),
            way,
        )

    def known(self, place: tuple[str, str], seen: bool) -> list[Written]:
        """Give the checkpoints that a client may go on from: acknowledged; or only seen, as what is hot may be."""
        there = self.durable | self.journaled()
        found = [
            one
            for one in self.written.values()
            if one.place == place and not one.key[3] and (one.acked or seen) and one.key in there
        ]
        return sorted((one for one in found if not self.is_gone(one, may_be=True)), key=lambda one: one.key)

    @rule(number=who, place=places, special=st.booleans(), early=st.sampled_from([False, False, True]), way=ways)
    def write(self, number: int, place: tuple[str, str], special: bool, early: bool, way: dict[str, Any]) -> None:
        """Write to the latest known checkpoint, or to one that nobody puts."""
        process = self.process(number)
        known = self.known(place, False)
        self.count += 1
        name = f"{self.count:08d}" if early or not known else known[-1].key[2]
        call = Written(process, place[0], self.tick(), key=(*place, name, f"task-{self.count}"))
        call.values = {RESUME if special else "a": ["write", self.count]}
        self.written[call.key] = call
        pairs = list(call.values.items())
        self.begin(
            f"write {call.key}", call, lambda: process.saver.put_writes(address(place, name), pairs, call.key[3]), way
        )

    @rule(number=who, thread=threads, whole=st.booleans(), way=ways)
    def remove(self, number: int, thread: str, whole: bool, way: dict[str, Any]) -> None:
        """Delete a thread, or prune it to its latest checkpoints."""
        process = self.process(number)
        call = Removed(process, thread, self.tick(), whole=whole)
        self.removed.append(call)
        saver = process.saver
        self.begin(
            f"{'delete' if whole else 'prune'} {thread}",
            call,
            (lambda: saver.delete_thread(thread)) if whole else (lambda: saver.prune([thread])),
            way,
        )

    @rule(number=who, place=places, steps=st.integers(1, 3))
    def run_graph(self, number: int, place: tuple[str, str], steps: int) -> None:
        """Let a client do what a graph does, undisturbed."""
        self.read(number, place, {})
        for _ in range(steps):
            self.put(number, place, 0, False, {})
            self.write(number, place, False, False, {})

    @rule(number=who, place=places, way=ways)
    def read(self, number: int, place: tuple[str, str], way: dict[str, Any]) -> None:
        """Read the latest checkpoint; what must come is known when the read begins."""
        process = self.process(number)
        self.look()
        call = Read(process, place[0], self.tick(), place=place)
        call.sure = {one for one in self.written.values() if one.place == place and one.acked}
        call.durable, call.journaled = set(self.durable), self.journaled()
        call.is_behind = self.is_behind(process)
        self.begin(f"read {place}", call, lambda: process.saver.get_tuple(address(place)), way)

    # --- what processes do by themselves -----------------------------------------------------------------------------

    def run(self, task: Task, way: dict[str, Any]) -> None:
        if not task.process.is_stalled:
            task.run(**way)
        self.after()

    @rule(number=who, way=ways)
    def flush(self, number: int, way: dict[str, Any]) -> None:
        self.run(self.process(number).flushing(), way)

    @rule(number=who, way=ways)
    def check(self, number: int, way: dict[str, Any]) -> None:
        self.run(self.process(number).checking(), way)

    @rule(number=who, way=ways)
    def adopt(self, number: int, way: dict[str, Any]) -> None:
        self.run(self.process(number).adopting(), way)

    @precondition(lambda self: any(process.tasks for process in self.world.processes))
    @rule(number=st.integers(0, 5), way=ways)
    def go_on(self, number: int, way: dict[str, Any]) -> None:
        """Let a task go on that stayed somewhere."""
        tasks = [task for process in self.world.processes for task in process.tasks]
        self.run(tasks[number % len(tasks)], way)

    @rule(polls=st.sampled_from([1, 1, 2, 5]))
    def pass_time(self, polls: int) -> None:
        """Let time pass: everybody who runs does what is to be done, and who is silent for long is given up."""
        self.world.pass_time(polls * POLL)
        self.after()

    # --- faults ------------------------------------------------------------------------------------------------------

    @rule(number=who)
    def crash(self, number: int) -> None:
        """Kill a process; there is always one."""
        process = self.process(number)
        for task, call in list(self.calls.items()):
            if task.process is process:
                call.ended = self.tick()
                del self.calls[task]
        for one in self.written.values():
            if one.process is process:
                one.writer_lost = True
        self.world.kill(process)
        self.passed_over.discard(process)
        if not self.world.processes:
            self.start(False)
        self.after()

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 3))
    def cancel(self, number: int) -> None:
        """Give a client's call up where it stands, as the end of an asynchronous task does."""
        calls = [task for task in self.calls if not task.process.is_stalled]
        if calls:
            task = calls[number % len(calls)]
            self.calls.pop(task).ended = self.tick()
            task.kill()
        self.after()

    @rule(number=who, flushes=st.booleans())
    def mishap(self, number: int, flushes: bool) -> None:
        """One process loses sight of Redis for a moment, in which it may flush what it holds."""
        process = self.process(number)
        if process.is_stalled or not process.runtime.ready:
            return
        process.runtime.health.lose(HotTierUnavailableError("A mishap."))
        if flushes:
            process.flushing().run()
        process.checking().run()
        self.after()

    @rule(number=who, stops=st.booleans())
    def stall(self, number: int, stops: bool) -> None:
        """One process stops, or goes on."""
        self.process(number).is_stalled = stops
        self.after()

    @rule(how=st.sampled_from(["wipe", "restart", "lose", "lose", "down", "up"]), which=st.integers(0, 3))
    def redis(self, how: str, which: int) -> None:
        """Something happens to Redis; what may be lost is what came from one of the last calls on."""
        before = self.journaled()
        if how == "wipe":
            self.world.wipe()
        elif how == "restart":
            self.world.restart()
        elif how == "lose" and self.snapshots:
            self.world.restart(self.snapshots[which % len(self.snapshots)])
        else:
            self.world.redis_is_up = how != "down"
        for key in before - self.journaled():
            self.written[key].redis_lost = True
        self.after()

    @rule(number=who, what=st.sampled_from(["redis", "postgres", "nothing"]))
    def cut(self, number: int, what: str) -> None:
        """One process cannot reach a server any more, or can reach both."""
        process = self.process(number)
        process.reaches_redis, process.reaches_postgres = what != "redis", what != "postgres"
        self.after()

    @rule(up=st.booleans())
    def postgres(self, up: bool) -> None:
        """PostgreSQL is away, or there."""
        self.world.postgres_is_up = up
        self.after()

    @rule(polls=st.integers(0, 1))
    def mend(self, polls: int) -> None:
        """Let everything work again, with or without time to notice it."""
        self.mend_all()
        self.world.pass_time(polls * POLL)
        self.after()

    def mend_all(self) -> None:
        self.world.redis_is_up = self.world.postgres_is_up = True
        for process in self.world.processes:
            process.is_stalled = False
            process.reaches_redis = process.reaches_postgres = True

    # --- what must hold ----------------------------------------------------------------------------------------------

    def after(self) -> None:
        self.world.go_on()
        self.world.trace.append("--")
        self.look()
        self.check_held()

    def look(self) -> None:
        """See what PostgreSQL has, if anything was done there."""
        if self.looked_at == self.world.writes:
            return
        self.looked_at = self.world.writes
        before = self.durable
        rows = self.world.postgres.execute(READ_CHECKPOINTS + " UNION ALL " + READ_WRITES).fetchall()
        self.durable = {tuple(row.values()) for row in rows}
        number, opened = self.generation
        for key in self.durable - before:
            one = self.written[key]
            if one.late and one.came_in is None:
                one.came_in = number if opened else 0
        self.check_references()
        self.check_order()
        self.check_removed()

    def journal(self) -> list[tuple[str, int, bytes]]:
        """Read the journals."""
        pipeline = self.world.redis.pipeline(transaction=False)
        for thread in THREADS:
            pipeline.xrange(self.world.keyspace.thread(thread).journal)
        found = [
            (thread, int(name.split(b"-")[0]), fields[b"r"])
            for thread, entries in zip(THREADS, pipeline.execute(), strict=True)
            for name, fields in entries
        ]
        self.journaled_ever.update({(thread, sequence): payload for thread, sequence, payload in found})
        return found

    def journaled(self) -> set[Key]:
        """Name the records that are in Redis, be it up or down."""
        keys = {key_of(thread, decode(payload)[1]) for thread, _, payload in self.journal()}
        return {key for key in keys if key is not None}

    @staticmethod
    def remembered(process: Process) -> set[Key]:
        """Name the records in a process's memory."""
        keys = {
            key_of(thread, decode(entry.payload)[1])
            for thread, queue in process.runtime.backlog._queues.items()
            for entry in queue.entries
            if entry.payload is not None
        }
        return {key for key in keys if key is not None}

    def is_gone(self, one: Written, *, may_be: bool) -> bool:
        """Whether a removal that has returned had to remove a record; or any one may have."""
        for removal in self.removed:
            if removal.thread_id != one.thread_id:
                continue
            # Who is behind may go on with a thread that others have deleted past Redis.
            if may_be and one.late and removal.whole:
                return True
            if removal.whole and removal.acked and one.before(removal):
                return True
            if may_be and not removal.before(one):
                newest = not any(
                    other.place == one.place and not other.key[3] and other.key[2] > one.key[2]
                    for other in self.written.values()
                )
                if removal.whole or not newest:
                    return True
        return False

    def check_held(self) -> None:
        """I1: an acknowledged record is in PostgreSQL, in the journal or in a living process's memory."""
        missing = [
            one
            for one in self.written.values()
            if one.acked and one.key not in self.durable and not (one.writer_lost and one.redis_lost)
        ]
        if not missing:
            return
        held = self.journaled().union(*map(self.remembered, self.world.processes))
        for one in missing:
            assert one.key in held or self.is_gone(one, may_be=True), f"I1: nobody has {one}"

    def check_references(self) -> None:
        """I2: PostgreSQL has every blob that a checkpoint there was put with."""
        found = self.world.postgres.execute(MISSING_BLOBS).fetchall()
        assert not found, (
            f"I2: {[self.written[(r['thread_id'], r['checkpoint_ns'], r['checkpoint_id'], '')] for r in found]}"
        )

    def check_order(self) -> None:
        """I3: of two records, PostgreSQL never has the later one alone: of one writer, or while Redis is trusted."""
        for late in self.written.values():
            if not late.acked or late.key not in self.durable:
                continue
            for early in self.written.values():
                same = early.thread_id == late.thread_id and (self.calm or early.process is late.process)
                if same and early.acked and early.before(late) and early.key not in self.durable:
                    excused = (early.writer_lost and early.redis_lost) or self.is_gone(early, may_be=True)
                    assert excused, f"I3: {late} came without {early}"

    def check_removed(self) -> None:
        """I5: nothing that was there when a delete began is there once it has returned."""
        for key in self.durable:
            assert not self.is_gone(self.written[key], may_be=False), f"I5: {self.written[key]} is back"

    # --- while tasks run ---------------------------------------------------------------------------------------------

    def moved(self, task: Task) -> None:
        """See what a step of a task has come to."""
        for process in self.world.processes:
            if process.runtime.ready and (process.runtime.hot is None or process.runtime.hot.generation > 1):
                self.calm = False
        if task.name == "check" and task.done and task.process.heard == self.world.clock:
            self.passed_over.discard(task.process)
        self.check_barrier(task)
        call = self.calls.pop(task, None) if task.done else None
        if call is not None:
            call.ended = self.tick()
            call.acked = task.error is None
            if task.error is not None and not isinstance(task.error, TieredSaverError):
                raise task.error
            if isinstance(call, Written) and call.acked:
                forgetful = call.process.runtime.config.max_memory_bytes < 1000
                call.writer_lost = call.writer_lost or forgetful
                call.late = self.is_behind(call.process)
            if isinstance(call, Read) and call.acked:
                self.check_read(call, task.result)
        elif task.done and task.error is not None:
            raise task.error

    def check_barrier(self, task: Task) -> None:
        """I6: nobody goes past Redis, or opens a generation, before every living process has flushed what it holds."""
        generation = self.generation
        if self.asked_at != self.world.writes:
            self.asked_at = self.world.writes
            row = self.world.postgres.execute("SELECT number, opened FROM tiered_generation").fetchone()
            generation = (row["number"], row["opened"])
        closed = task.process.runtime.health.closed if task.process.runtime.ready else None
        goes_past = closed == generation[0] and self.closed.get(task.process) != closed
        self.closed[task.process] = closed
        opens = generation != self.generation and generation[1]
        self.generation = generation
        if not (goes_past or opens):
            return
        self.look()
        for process in self.world.processes:
            silent = self.world.clock - process.heard >= PATIENCE
            ready = process.runtime.ready
            # Who began while PostgreSQL was away believes what Redis says, and nobody knows of it.
            silent = silent or (ready and not process.runtime.health._reported)
            if ready and process.runtime.health._reported < generation[0] and process is not task.process:
                assert silent, f"I6: generation {generation} did not wait for {process.name}"
                if not process.is_stalled:
                    self.passed_over.add(process)
            held = self.remembered(process) - self.durable if ready else set()
            for one in map(self.written.__getitem__, held):
                if one.acked and not self.is_gone(one, may_be=True):
                    assert silent, f"I6: generation {generation} began without {one}"
        for one in self.written.values():
            if one.acked and one.key not in self.durable:
                one.late = True

    def is_behind(self, process: Process) -> bool:
        """Whether a process may trust what is not so any more, because nobody waits for it."""
        return process in self.passed_over or (process.runtime.ready and not process.runtime.health._reported)

    def check_read(self, call: Read, found: Any) -> None:
        """I6, I9, I7: a read gives the latest of what was acknowledged before it began, whole."""
        hot = call.process.runtime.hot
        journaled = self.journaled()
        if call.is_behind or self.is_behind(call.process):
            return
        self.look()
        remembered = {
            key
            for process in self.world.processes
            if process not in self.passed_over and not process.is_stalled
            for key in self.remembered(process)
        }

        def is_due(one: Written) -> bool:
            if self.is_gone(one, may_be=True):
                return False
            if one.came_in is not None:
                return one.key in call.durable and (hot is None or one.came_in < hot.generation)
            if one.key in self.durable:
                return not one.late or one.key in call.durable
            if one.key in remembered and not one.late:
                return True
            return hot is not None and one.key in call.journaled and one.key in journaled

        due = [one for one in call.sure if is_due(one)]
        latest = max((one.key[2] for one in due if not one.key[3]), default="")
        if found is None:
            assert not latest, f"I6: {latest} was acknowledged before, but nothing was found"
            return
        name = found.checkpoint["id"]
        assert name >= latest, f"I6: {latest} was acknowledged before, but {name} was found"
        one = self.written[(*call.place, name, "")]
        assert not (one.ended is not None and self.is_gone_before(one, call)), f"I5: {one} was read"
        assert found.checkpoint["channel_values"] == one.values, f"I2: {one} was read as {found}"
        for write in due:
            if write.key[2] == name and write.key[3]:
                expected = [(write.key[3], *pair) for pair in write.values.items()]
                assert expected[0] in found.pending_writes, f"I9: {write} was not read"

    def is_gone_before(self, one: Written, call: Call) -> bool:
        return any(
            removal.whole
            and removal.acked
            and removal.thread_id == one.thread_id
            and one.before(removal)
            and removal.before(call)
            for removal in self.removed
        )

    # --- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.heal()
            self.check_end()
        except BaseException:
            note("\n".join(self.world.trace))
            raise
        finally:
            self.world.on_move = lambda _: None
            self.world.end()

    def heal(self) -> None:
        """Let everything work again, and wait until all is calm."""
        world = self.world
        self.mend_all()
        world.go_on()
        world.pass_time(3 * POLL)
        for process in world.processes:
            # Whoever has not noticed that Redis has lost something does so now.
            process.start("look", lambda process=process: process.saver.get_tuple(address(("three", ""))))  # type: ignore[misc]
        world.pass_time(6 * POLL)
        for _ in range(5):
            for process in world.processes:
                process.adopting().run()
            world.pass_time(POLL)
        self.after()
        left = [task for process in world.processes for task in process.tasks]
        assert not left, f"I8: {left} never ended"

    def check_end(self) -> None:
        """I1, I4: everything is in PostgreSQL, in every process's eyes, and flushing it again changes nothing."""
        assert not self.journal()
        for process in self.world.processes:
            if process.runtime.ready:
                assert process.runtime.backlog.is_drained()
                assert process.runtime.hot is not None
        for one in self.written.values():
            if one.acked and one.key not in self.durable:
                assert self.is_gone(one, may_be=True) or (one.writer_lost and one.redis_lost), f"I1: {one} is lost"
        for number in range(len(self.world.processes)):
            for place in {one.place for one in self.written.values()}:
                self.read(number, place, {})
                assert not self.calls
        before = [self.world.postgres.execute(query.encode()).fetchall() for query in READ_ALL]
        for (thread, sequence), payload in sorted(self.journaled_ever.items()):
            self.flush_again(thread, sequence, payload)
        assert [self.world.postgres.execute(query.encode()).fetchall() for query in READ_ALL] == before

    def flush_again(self, thread: str, sequence: int, payload: bytes) -> None:
        """Flush a record once more, as a process does that was away for long."""
        generation, record = decode(payload)
        postgres, shard_of = self.world.postgres, self.world.keyspace.shard_of
        if isinstance(record, MaintenanceRecord):
            known = postgres.execute(maintenance.READ_TOMBSTONE, (thread,)).fetchone()
            if known and known["tombstone"] >= sequence:
                maintenance.execute(
                    postgres, thread, sequence, generation, record, shard_of=shard_of, statement_timeout=10.0
                )
        elif key_of(thread, record) in self.durable:
            entry = ThreadRecords(thread, shard_of(thread), [Journaled(sequence, generation, record, payload)])
            writer.write(postgres, [entry], statement_timeout=10.0)


@dataclass(eq=False)
class Read(Call):
    """A read of the latest checkpoint.

    Attributes:
        place: The thread and namespace.
        sure: What was acknowledged when it began.
        durable, journaled: What PostgreSQL and Redis had then.
        is_behind: The process was given up then, and did not know.
    """

    place: tuple[str, str] = ("", "")
    sure: set[Written] = field(default_factory=set)
    durable: set[Key] = field(default_factory=set)
    journaled: set[Key] = field(default_factory=set)
    is_behind: bool = False


@pytest.fixture
def world(servers: EmbeddedServers) -> Iterator[World]:
    """A world on a Redis of its own."""
    with new_world(servers.postgres_url) as world:
        yield world


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_anything_may_happen(world: World) -> None:
    """I1-I7, I9: whatever happens to processes and servers, and wherever it happens."""
    run_state_machine_as_test(
        type("Machine", (Processes,), {"world": world}),
        settings=settings(
            max_examples=EXAMPLES or 40,
            # Shrinking takes minutes; what is found in a short run is reported as it is, with how to repeat it.
            phases=[phase for phase in Phase if EXAMPLES or phase is not Phase.shrink],
            stateful_step_count=40,
            # The same examples every time, unless somebody searches.
            derandomize=not EXAMPLES,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
