"""What delta channels are rebuilt from is answered by Redis, and is never less than what PostgreSQL would give.

`TIERED_HYPOTHESIS_EXAMPLES=1000 pytest tests/integration/test_delta_history.py` searches for longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from langgraph.checkpoint.base import ERROR
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from psycopg.rows import dict_row

from langgraph_tiered_saver import ColdTierUnavailableError, TieredSaver, operations
from langgraph_tiered_saver.drivers import _perform
from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.hot.tier import HotCall
from tests.integration import graphs
from tests.integration.test_equivalence import delta_graph, exact
from tests.integration.test_hot_tier import locked_tables
from tests.integration.test_processes import hanging, own_servers
from tests.integration.test_state_machine import SHARDS, World, config_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig

__all__ = ["own_servers"]

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("TIERED_HYPOTHESIS_EXAMPLES", "0"))
NEVER = 600.0  # seconds of linger: nothing is flushed before somebody waits for it
CHANNELS = ("a", "ü b")
TASKS = tuple(str(uuid.UUID(int=number)) for number in (3, 1, 2))
PATHS = ("~__pregel_pull, b", "", "~__pregel_pull, a")


class Run:
    """One thread and namespace, written as LangGraph writes it."""

    def __init__(self, thread_id: str = "thread", ns: str = "") -> None:
        self.at = (thread_id, ns)
        # Of every checkpoint that was put: the versions, and the arguments of `put`.
        self.known: dict[str, tuple[dict[str, str], tuple[Any, ...]]] = {}
        self.count = 0

    @property
    def latest(self) -> str:
        return max(self.known, default="")

    def put(
        self,
        saver: Any,
        stored: Mapping[str, str],
        *,
        parent: str | None = None,
        id: str = "",
        counters: bool = True,
        value: Any = None,
    ) -> str:
        """Put a checkpoint that stores its channels in one of these ways.

        * "snapshot": a snapshot, of a new version
        * "plain", "inline", "none": the same with a list, a number, and None
        * "written": nothing, of a new version, as a step does that wrote to the channel
        * "counted": nothing, of a new version that is the same on every branch
        * "silent": nothing, of a new version that the caller does not name as one
        * "kept": nothing new
        """
        self.count += 1
        parent = self.latest if parent is None else parent
        versions = dict(self.known[parent][0]) if parent else {}
        values: dict[str, Any] = {}
        new_versions: dict[str, str] = {}
        snapshots = {channel for channel, how in stored.items() if how == "snapshot"}
        made = {"snapshot": _DeltaSnapshot(value or [f"s{self.count}"]), "plain": [f"p{self.count}"]}
        made |= {"inline": self.count, "none": None}
        for channel, how in stored.items():
            if how == "kept":
                continue
            version = InMemorySaver().get_next_version(versions.get(channel), None)
            if how == "silent":
                versions[channel] = version
                continue
            new_versions[channel] = f"{int(version.split('.')[0])}" if how == "counted" else version
            if how in made:
                values[channel] = made[how]
        versions |= new_versions
        checkpoint = {
            "v": 4,
            "id": id or str(uuid6()),
            "ts": datetime.now(timezone.utc).isoformat(),
            "channel_values": values,
            "channel_versions": versions,
            "versions_seen": {},
            "updated_channels": sorted(new_versions),
        }
        counted = {channel: (1, 1) for channel in CHANNELS if channel not in snapshots} if counters else {}
        metadata: dict[str, Any] = {"source": "loop", "step": self.count, "parents": {}, "run_id": f"r{self.count % 4}"}
        if counted:
            metadata["counters_since_delta_snapshot"] = counted
        arguments = (config_of(*self.at, parent or None), checkpoint, metadata, new_versions)
        saver.put(*arguments)
        self.known[checkpoint["id"]] = (versions, arguments)
        return str(checkpoint["id"])

    def write(
        self, saver: Any, channels: Sequence[str] = CHANNELS[:1], *, task: int = 0, id: str = "", size: int = 0
    ) -> None:
        self.count += 1
        writes = [(channel, [f"w{self.count}.{index}" + "x" * size]) for index, channel in enumerate(channels)]
        saver.put_writes(config_of(*self.at, id or self.latest), writes, TASKS[task % 3], PATHS[task % 3])

    def history(self, saver: Any, channels: Sequence[str] = CHANNELS[:1], id: str | None = None) -> Any:
        return saver.get_delta_channel_history(config=config_of(*self.at, id), channels=list(channels))


def ask(saver: TieredSaver, run: Run, channels: Sequence[str] = CHANNELS[:1], id: str | None = None) -> tuple[Any, str]:
    """Give the history, and which tier answered."""
    before = saver.stats()
    found = run.history(saver, channels, id)
    after = saver.stats()
    assert after.hot_hits - before.hot_hits + after.cold_reads - before.cold_reads == 1
    return found, "hot" if after.hot_hits > before.hot_hits else "cold"


# --- any sequence of calls -------------------------------------------------------------------------------------------


class DeltaThreads(RuleBasedStateMachine):
    """Two savers write and read; PostgreSQL, once it has everything, says what was right."""

    world: World
    answered: Counter[str]

    savers = st.integers(0, 1)
    places = st.sampled_from([0, 0, 0, 1, 2])
    some = st.sampled_from([0, 0, 0, 1, 2, -1])
    hows = st.sampled_from(
        ["written"] * 6 + ["kept"] * 3 + ["snapshot"] * 2 + ["plain", "inline", "none", "counted", "silent"]
    )
    ways = st.fixed_dictionaries(dict.fromkeys(CHANNELS, hows))
    written = st.lists(st.sampled_from([*CHANNELS, *CHANNELS, "other", ERROR]), min_size=1, max_size=3, unique=True)

    def __init__(self) -> None:
        super().__init__()
        suffix = uuid.uuid4().hex[:8]
        self.runs = [Run(f"one {suffix}"), Run(f"one {suffix}", "sub"), Run(f"two {suffix}")]
        self.announced: list[list[str]] = [[], [], []]
        if not self.world.savers:
            self.world.savers = [self.world.open(), self.world.open()]
        self.open = self.world.savers

    @rule(
        saver=savers,
        place=places,
        steps=st.lists(
            st.tuples(ways, st.lists(st.tuples(st.integers(0, 2), written), max_size=3), st.booleans()),
            min_size=1,
            max_size=5,
        ),
        read=st.sampled_from(["first", "last", "never"]),
    )
    def go_on(self, saver: int, place: int, steps: Sequence[tuple[dict[str, str], Any, bool]], read: str) -> None:
        """Put the next checkpoints, and what their tasks write; some of it comes before its checkpoint."""
        run, one = self.runs[place], self.open[saver]
        if read == "first":
            self.disturb(saver, place, "read")
        for stored, tasks, early in steps:
            parent, id = run.latest, str(uuid6())
            if early and tasks:
                run.write(one, tasks[0][1], task=tasks[0][0], id=id)
            run.put(one, stored, parent=parent, id=id)
            for task, channels in tasks[early:]:
                run.write(one, channels, task=task)
        if read == "last":
            self.compare(1 - saver, place, named=False, asynchronous=False)

    @rule(saver=savers, place=places, parent=some, announced=st.booleans(), stored=ways, counters=st.booleans())
    def put(self, saver: int, place: int, parent: int, announced: bool, stored: dict[str, str], counters: bool) -> None:
        """Put a checkpoint after the latest or an older one; its tasks may have written already."""
        run, ids = self.runs[place], sorted(self.runs[place].known, reverse=True)
        parent_id = ids[parent % len(ids)] if ids else ""
        waiting = [id for id in self.announced[place] if id > parent_id]
        id = waiting[0] if announced and waiting else ""
        run.put(self.open[saver], stored, parent=parent_id, id=id, counters=counters or parent == 0)
        if id:
            self.announced[place].remove(id)

    @rule(saver=savers, place=places, parent=some, counters=st.booleans())
    def put_again(self, saver: int, place: int, parent: int, counters: bool) -> None:
        """Put a checkpoint once more, as a client does that got no answer."""
        run = self.runs[place]
        if ids := sorted(run.known, reverse=True):
            config, checkpoint, metadata, new_versions = run.known[ids[parent % len(ids)]][1]
            self.open[saver].put(config, checkpoint, metadata, new_versions if counters else {})

    @rule(saver=savers, place=places, which=st.integers(0, 3), task=st.integers(0, 2), channels=written)
    def write(self, saver: int, place: int, which: int, task: int, channels: list[str]) -> None:
        """Write on the latest checkpoint, on an older one, or on one that is put later or never."""
        run = self.runs[place]
        if which == 3:
            self.announced[place].append(str(uuid6()))
            run.write(self.open[saver], channels, task=task, id=self.announced[place][-1])
        elif ids := sorted(run.known, reverse=True):
            run.write(self.open[saver], channels, task=task, id=ids[which % len(ids)])

    @rule(saver=savers, how=st.sampled_from(["delete", "prune", "runs", "copy"]), place=places)
    def maintain(self, saver: int, how: str, place: int) -> None:
        """Delete a thread or some runs, prune, or copy."""
        run, one = self.runs[place], self.open[saver]
        if how == "delete":
            one.delete_thread(run.at[0])
        elif how == "prune":
            one.prune([run.at[0]], keep_last=2)
        elif how == "runs":
            one.delete_for_runs(["r1"])
        else:
            one.copy_thread(self.runs[0].at[0], self.runs[2].at[0])
            self.runs[2].known = {**self.runs[0].known, **self.runs[2].known}
        for run in self.runs:
            query = "SELECT checkpoint_id FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s"
            left = {row["checkpoint_id"] for row in self.world.postgres.execute(query, run.at)}
            run.known = {id: known for id, known in run.known.items() if id in left}

    @rule(saver=savers, place=places, how=st.sampled_from(["evict", "read", "flush", "close", "abandon"]))
    def disturb(self, saver: int, place: int, how: str) -> None:
        """Evict hot state, warm it, flush, or close a saver and open another."""
        if how == "evict":
            self.world.evict(self.runs[place].at[0])
        elif how == "read":
            # As a graph does that resumes.
            found = self.open[saver].get_tuple(config_of(*self.runs[place].at))
            if found is not None:
                self.open[saver].get_delta_channel_history(config=found.config, channels=CHANNELS)
        elif how == "flush":
            self.open[saver].flush()
        else:
            self.open[saver].close()
            self.open[saver] = self.world.open(close_timeout=10.0 if how == "close" else 0.0)

    @rule(saver=savers, place=places, named=st.booleans(), asynchronous=st.booleans())
    def compare(self, saver: int, place: int, named: bool, asynchronous: bool) -> None:
        """I2, I9: the history of the latest checkpoint is what PostgreSQL gives once it has everything."""
        run, one = self.runs[place], self.open[saver]
        latest = (run.latest or None) if named else None
        found = []
        for channels in ([CHANNELS[0]], [CHANNELS[1]], list(CHANNELS)):
            if asynchronous:
                hits = one.stats().hot_hits
                call = one.aget_delta_channel_history(config=config_of(*run.at, latest), channels=channels)
                history, tier = asyncio.run(call), "hot" if one.stats().hot_hits > hits else "cold"
            else:
                history, tier = ask(one, run, channels, latest)
            self.answered[tier] += 1
            found.append((channels, history))
            self.answered["with writes"] += tier == "hot" and any(entry["writes"] for entry in history.values())
            self.answered["with a seed"] += tier == "hot" and any("seed" in entry for entry in history.values())
        list(one.list(config_of(run.at[0]), limit=1))  # settles the thread

        plain = PostgresSaver(self.world.postgres)
        for channels, history in found:
            assert exact(history) == exact(run.history(plain, channels, latest))

    def teardown(self) -> None:
        step = (dict.fromkeys(CHANNELS, "written"), [(0, list(CHANNELS))], False)
        try:
            for place in range(3):
                self.compare(0, place, named=False, asynchronous=False)
                if self.runs[place].known:
                    self.go_on(1, place, [step, step], read="first")
                    self.compare(1, place, named=True, asynchronous=False)
            for run in self.runs:
                self.open[0].delete_thread(run.at[0])
        except BaseException:
            self.world.clear()
            raise


@pytest.fixture
def world(redis_url: str, postgres_url: str, key_prefix: str) -> Iterator[World]:
    world = World(redis_url, postgres_url, key_prefix)
    yield world
    world.close()


def run_machine(world: World, machine: type[RuleBasedStateMachine], examples: int, steps: int) -> Counter[str]:
    with world.open() as saver:
        saver.setup()
    answered: Counter[str] = Counter()
    run_state_machine_as_test(
        type("Machine", (machine,), {"world": world, "answered": answered}),
        settings=settings(
            max_examples=EXAMPLES or examples,
            phases=[phase for phase in Phase if EXAMPLES or phase is not Phase.shrink],
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return answered


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_any_calls_leave_the_history_that_postgres_saver_gives(world: World) -> None:
    """I2, I6, I7, I9: forks, late and early writes, evictions, deletions: hot or cold, the history is PostgreSQL's."""
    answered = run_machine(world, DeltaThreads, examples=30, steps=30)

    print(dict(answered))
    assert answered["with writes"] > 5
    assert answered["with a seed"] > 5


class DeltaGraphs(RuleBasedStateMachine):
    """A graph with delta channels on two savers; the same graph on PostgresSaver says what its state is."""

    world: World
    answered: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.config: RunnableConfig = {"configurable": {"thread_id": f"graph {uuid.uuid4().hex[:8]}"}}
        if not self.world.savers:
            self.world.savers = [self.world.open(), self.world.open()]
        self.count = 0

    def graph(self, saver: int) -> Any:
        return delta_graph(self.world.savers[saver], snapshot_frequency=4)

    def given(self) -> dict[str, Any]:
        self.count += 1
        return {"notes": [f"in{self.count}"], "count": 0} | ({"rare": [f"x{self.count}"]} if self.count % 3 else {})

    @rule(
        saver=st.integers(0, 1),
        durability=st.sampled_from(["sync", "async", "exit"]),
        how=st.sampled_from(["invoke", "invoke", "ainvoke", "update", "fork", "invoke older"]),
        which=st.integers(1, 8),
    )
    def use(self, saver: int, durability: str, how: str, which: int) -> None:
        graph, at = self.graph(saver), self.config
        if how in ("fork", "invoke older") and (older := list(graph.get_state_history(at, limit=9))[1:]):
            at = older[which % len(older)].config
        if how == "ainvoke":
            asyncio.run(graph.ainvoke(self.given(), at, durability=durability))
        elif how in ("update", "fork"):
            graph.update_state(at, self.given(), "first" if which % 2 else "second")
        else:
            graph.invoke(self.given(), at, durability=durability)

    @rule(saver=st.integers(0, 1), how=st.sampled_from(["evict", "prune", "close"]))
    def disturb(self, saver: int, how: str) -> None:
        thread_id = self.config["configurable"]["thread_id"]
        if how == "evict":
            self.world.evict(thread_id)
        elif how == "prune":
            self.world.savers[saver].prune([thread_id], keep_last=3)
        else:
            self.world.savers[saver].close()
            self.world.savers[saver] = self.world.open()

    @rule(saver=st.integers(0, 1))
    def compare(self, saver: int) -> None:
        """I2, I9: the state is the one that PostgreSQL has in the end."""
        found = []
        for one, graph in ((self.world.savers[index], self.graph(index)) for index in (saver, saver, 1 - saver)):
            cold = one.stats().cold_reads
            found.append(graph.get_state(self.config))
            self.answered["hot" if one.stats().cold_reads == cold else "cold"] += 1
        list(one.list(self.config, limit=1))
        expected = delta_graph(PostgresSaver(self.world.postgres), snapshot_frequency=4).get_state(self.config)

        for state in found:
            assert (state.values, state.config, state.next) == (expected.values, expected.config, expected.next)

    def teardown(self) -> None:
        try:
            self.compare(0)
        except BaseException:
            self.world.clear()
            raise


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_any_use_of_a_graph_leaves_the_state_that_postgres_saver_gives(world: World) -> None:
    """I2, I9: real graphs in every durability, updated, forked, pruned, evicted: hot or cold, the state is the same."""
    answered = run_machine(world, DeltaGraphs, examples=10, steps=15)

    print(dict(answered))
    assert answered["hot"] > 5


# --- what is answered hot, and what is not ---------------------------------------------------------------------------


@pytest.fixture
def saver(make_saver: Callable[..., TieredSaver]) -> TieredSaver:
    # Patient about its own pauses: whoever doubts Redis for a moment is not answered by it.
    saver = make_saver(flush_linger=NEVER, durable_channels="", shard_count=SHARDS, poll_interval=5.0)
    saver.setup()
    return saver


def begin(saver: TieredSaver, run: Run) -> None:
    """A snapshot, and three steps that write to the first channel."""
    run.put(saver, dict.fromkeys(CHANNELS, "snapshot"))
    for task in range(3):
        run.write(saver, task=task)
        run.write(saver, task=task + 1)
        run.put(saver, {CHANNELS[0]: "written", CHANNELS[1]: "kept"})
    run.write(saver, task=1)  # on the latest: pending, so no part of its history


def test_everything_since_the_snapshot_is_answered_without_postgresql(
    saver: TieredSaver, make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I9: seed and writes come from Redis while PostgreSQL answers nothing; another process gets them too."""
    run, other = Run(), make_saver(flush_linger=NEVER, shard_count=SHARDS)
    begin(saver, run)
    other.get_tuple(config_of(*run.at))
    with locked_tables(postgres_url):
        found = [ask(one, run, id=id) for one in (saver, other) for id in (None, run.latest)]
        found.append((asyncio.run(one_history(other, run)), "hot"))

    assert [tier for _, tier in found] == ["hot"] * 5
    history = found[0][0]["a"]
    assert history["seed"] == _DeltaSnapshot(["s1"])
    # Within a checkpoint, in the order of their paths: an empty one first.
    assert [value for _, _, (value,) in history["writes"]] == ["w3.0", "w2.0", "w5.0", "w6.0", "w8.0", "w9.0"]
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
        expected = run.history(PostgresSaver(connection))
    assert all(exact(one) == exact(expected) for one, _ in found)


async def one_history(saver: TieredSaver, run: Run) -> Any:
    return await saver.aget_delta_channel_history(config=config_of(*run.at), channels=["a"])


def late_write(saver: TieredSaver, run: Run, world: World) -> None:
    run.write(saver, task=1, id=sorted(run.known)[-2])


def late_write_of_another_channel(saver: TieredSaver, run: Run, world: World) -> None:
    run.write(saver, ["ü b", "other"], task=1, id=sorted(run.known)[-2])


def ancestor_put_again(saver: TieredSaver, run: Run, world: World) -> None:
    config, checkpoint, metadata, versions = run.known[sorted(run.known)[-2]][1]
    saver.put(config, {**checkpoint, "channel_values": {"a": ["a value after all"]}}, metadata, versions)


def latest_put_again(saver: TieredSaver, run: Run, world: World) -> None:
    saver.put(*run.known[run.latest][1])


def evicted(saver: TieredSaver, run: Run, world: World) -> None:
    assert world.evict(run.at[0])


def evicted_and_warmed(saver: TieredSaver, run: Run, world: World) -> None:
    evicted(saver, run, world)
    assert saver.get_tuple(config_of(*run.at)) is not None


def forked(saver: TieredSaver, run: Run, world: World) -> None:
    run.put(saver, {"a": "written", "ü b": "kept"}, parent=sorted(run.known)[1])


def a_step_without_delta_channels(saver: TieredSaver, run: Run, world: World) -> None:
    run.put(saver, {"a": "written"}, counters=False)


def version_that_counts(saver: TieredSaver, run: Run, world: World) -> None:
    run.put(saver, {"a": "counted", "ü b": "kept"})


def pruned(saver: TieredSaver, run: Run, world: World) -> None:
    saver.prune([run.at[0]], keep_last=2)
    saver.get_tuple(config_of(*run.at))


def runs_deleted(saver: TieredSaver, run: Run, world: World) -> None:
    saver.delete_for_runs([run.known[sorted(run.known)[1]][1][2]["run_id"]])
    saver.get_tuple(config_of(*run.at))


def copied_over(saver: TieredSaver, run: Run, world: World) -> None:
    other = Run("other")
    begin(saver, other)
    saver.copy_thread("other", run.at[0])
    run.known |= other.known
    saver.get_tuple(config_of(*run.at))


def too_many_writes(saver: TieredSaver, run: Run, world: World) -> None:
    for _ in range(3):
        saver.put_writes(config_of(*run.at, run.latest), [("a", [n]) for n in range(2000)], str(uuid.uuid4()))
        run.put(saver, {"a": "written", "ü b": "kept"})


def too_many_writes_at_once(saver: TieredSaver, run: Run, world: World) -> None:
    saver.put_writes(config_of(*run.at, run.latest), [("a", [n]) for n in range(5000)], str(uuid.uuid4()))
    run.put(saver, {"a": "written", "ü b": "kept"})


def too_many_bytes(saver: TieredSaver, run: Run, world: World) -> None:
    for _ in range(9):
        run.write(saver, size=2**19)
        run.put(saver, {"a": "written", "ü b": "kept"})


def nothing(saver: TieredSaver, run: Run, world: World) -> None:
    pass


# What happens, which tier answers then, and which one when asked again.
CHANGES = {
    nothing: ("hot", "hot"),
    late_write_of_another_channel: ("hot", "hot"),
    late_write: ("cold", "hot"),
    ancestor_put_again: ("cold", "hot"),
    a_step_without_delta_channels: ("cold", "hot"),
    evicted_and_warmed: ("cold", "hot"),
    pruned: ("cold", "hot"),
    runs_deleted: ("cold", "hot"),
    copied_over: ("cold", "hot"),
    # `get_tuple`, which comes first in a graph, makes the checkpoint hot.
    evicted: ("cold", "cold"),
    forked: ("cold", "cold"),
    latest_put_again: ("cold", "cold"),
    # Some other branch may have a value under the same version.
    version_that_counts: ("cold", "cold"),
    too_many_writes: ("cold", "cold"),
    too_many_writes_at_once: ("cold", "cold"),
    too_many_bytes: ("cold", "cold"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_whole_is_asked_of_postgresql(
    saver: TieredSaver, world: World, postgres_url: str, change: Callable[[TieredSaver, Run, World], None]
) -> None:
    """I2, I7: never a part of the history; it is whole again once read, or after the next value."""
    run, plain = Run(), PostgresSaver(world.postgres)
    begin(saver, run)
    assert ask(saver, run)[1] == "hot"
    change(saver, run, world)

    found = [ask(saver, run, id=run.latest) for _ in range(2)]

    assert tuple(tier for _, tier in found) == CHANGES[change]
    saver.flush()
    assert exact([history for history, _ in found]) == exact([run.history(plain)] * 2)
    # It goes on from what was made hot again.
    run.write(saver, task=1)
    run.put(saver, {"a": "written", "ü b": "kept"})
    went_on, tier = ask(saver, run)
    assert tier == CHANGES[change][1]
    saver.flush()
    assert exact(went_on) == exact(run.history(plain))
    # A value begins it anew, and nothing older is kept.
    saver.get_tuple(config_of(*run.at))
    run.write(saver)
    run.put(saver, dict.fromkeys(CHANNELS, "snapshot"))
    run.write(saver, task=1)
    run.put(saver, {"a": "written", "ü b": "kept"})
    again, tier = ask(saver, run)
    assert tier == "hot"
    saver.flush()
    assert exact(again) == exact(run.history(plain))
    fields = world.redis.hgetall(world.keyspace.thread(run.at[0]).hot(""))
    assert sum(map(len, fields.values())) < 3000
    assert {name for name in fields if name[:2] in (b"h:", b"b:")} == {b"h:a\0" + b"1", b"b:a", "b:ü b".encode()}


def deleted(saver: TieredSaver, run: Run, world: World) -> None:
    saver.delete_thread(run.at[0])


def next_put(saver: TieredSaver, run: Run, world: World) -> None:
    run.put(saver, {"a": "written", "ü b": "kept"})


def pending_write(saver: TieredSaver, run: Run, world: World) -> None:
    run.write(saver, task=2)


def another_late_write(saver: TieredSaver, run: Run, world: World) -> None:
    run.write(saver, ["other", "a"], task=1, id=sorted(run.known)[-2])


@pytest.mark.parametrize(
    "change",
    [next_put, pending_write, another_late_write, latest_put_again, evicted_and_warmed, pruned, deleted],
    ids=lambda change: change.__name__,
)
def test_what_changes_while_a_history_is_read_is_not_undone_by_warming(
    saver: TieredSaver, world: World, change: Callable[[TieredSaver, Run, World], None]
) -> None:
    """I5, I9: what happens between the cold read of a history and its warming is seen by the next read."""
    run = Run()
    begin(saver, run)
    late_write(saver, run, world)
    read_with_a_pause(saver, run, partial(change, saver, run, world))

    found = [run.history(saver) for _ in range(2)]

    saver.flush()
    assert exact(found) == exact([run.history(PostgresSaver(world.postgres))] * 2)


def read_with_a_pause(saver: TieredSaver, run: Run, before_warming: Callable[[], None]) -> None:
    """Read a history, and do something else just before what was read is kept."""
    runtime = saver._source.current()
    operation = operations.delta_history(runtime, saver.serde, config_of(*run.at, run.latest), ["a"])
    paused = False
    request = next(operation)
    try:
        while True:
            if isinstance(request, HotCall) and request.script.name == "warm_history":
                before_warming()
                paused = True
            request = operation.send(_perform(runtime, request))
    except StopIteration:
        assert paused


def test_a_history_stays_in_few_fields(saver: TieredSaver, world: World) -> None:
    """I8: a hot hash grows by what is written, in fields of 16 KiB, and is as small as before after a snapshot."""
    run = Run()
    run.put(saver, dict.fromkeys(CHANNELS, "snapshot"))
    for task in range(400):
        run.write(saver, task=task, size=100)
        run.put(saver, {"a": "written", "ü b": "kept"})
    key = world.keyspace.thread(run.at[0]).hot("")

    found, tier = ask(saver, run)

    assert (tier, len(found["a"]["writes"])) == ("hot", 400)
    assert world.redis.hlen(key) < 30
    run.put(saver, dict.fromkeys(CHANNELS, "snapshot"))
    run.put(saver, dict.fromkeys(CHANNELS, "kept"))
    assert world.redis.hlen(key) < 22
    assert sum(map(len, world.redis.hvals(key))) < 2000


def test_a_seed_that_is_kept_as_a_delta(
    make_saver: Callable[..., TieredSaver], world: World, postgres_url: str
) -> None:
    """I2: two large snapshots in a row are kept as one and what the next one changed; the seed is that one."""
    saver = make_saver(flush_linger=NEVER, durable_channels="", shard_count=SHARDS)
    saver.setup()
    run, value = Run(), [f"{number:04}" for number in range(2000)]
    run.put(saver, {"a": "snapshot"}, value=value)
    run.put(saver, {"a": "snapshot"}, value=[*value[:-1], "last"])
    fields = world.redis.hkeys(world.keyspace.thread(run.at[0]).hot(""))
    assert b"s:a\0" + b"1" in fields
    run.write(saver)
    run.put(saver, {"a": "written"})

    with locked_tables(postgres_url):
        found, tier = ask(saver, run)

    assert tier == "hot"
    assert found["a"]["seed"] == _DeltaSnapshot([*value[:-1], "last"])
    assert len(found["a"]["writes"]) == 1


def test_a_version_that_was_not_named_as_a_new_one(saver: TieredSaver, world: World) -> None:
    """I2: a value counts for the checkpoints that name its version only, and not because nothing new was named."""
    run = Run()
    run.put(saver, {"a": "snapshot"})
    for how in ("silent", "kept", "written"):
        run.write(saver)
        run.put(saver, {"a": how})

        found = run.history(saver)

        saver.flush()
        assert exact(found) == exact(run.history(PostgresSaver(world.postgres)))


def test_a_graph_without_delta_channels_keeps_no_history(saver: TieredSaver, world: World) -> None:
    """Graphs without delta channels send, store and read nothing for them."""
    run = Run()
    for task in range(3):
        run.put(saver, {"a": "plain"}, counters=False)
        run.write(saver, task=task)

    fields = world.redis.hkeys(world.keyspace.thread(run.at[0]).hot(""))

    assert not [name for name in fields if name == b"h" or name.startswith(b"h:")]


def test_a_history_needs_no_checkpoint_of_its_own(saver: TieredSaver) -> None:
    """I7: of a thread that nobody knows, of a root and of a channel that nobody wrote to, it is PostgresSaver's."""
    run = Run()
    assert run.history(saver) == {"a": {"writes": []}}
    run.put(saver, {"a": "written"})
    assert ask(saver, run, ["a", "ü b"]) == ({"a": {"writes": []}, "ü b": {"writes": []}}, "hot")
    assert ask(saver, run, ["a", "nobody's"]) == ({"a": {"writes": []}, "nobody's": {"writes": []}}, "cold")
    assert run.history(saver, []) == {}


# --- processes -------------------------------------------------------------------------------------------------------

SECOND_PROCESS = """
import json, sys
from pathlib import Path
from langgraph_tiered_saver import TieredSaver
from tests.integration import graphs
redis_url, postgres_url, settings, directory, durability = sys.argv[1:]
with TieredSaver.from_conn_string(redis_url, postgres_url, **json.loads(settings)) as saver:
    saver.setup()
    graph = graphs.delta(saver, graphs.Effects(Path(directory)))
    config = {"configurable": {"thread_id": "delta"}}
    print("ready", flush=True)
    sys.stdin.readline()
    found = [graph.get_state(config).values]
    found.append(graph.invoke({"often": ["second"], "turn": 7}, config, durability=durability))
    found.append(graph.get_state(config).values)
    stats = saver.stats()
    print(json.dumps([found, stats.cold_reads, stats.hot_misses]), flush=True)
"""


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_second_process_resumes_while_postgresql_hangs(
    own_servers: EmbeddedServers, key_prefix: str, tmp_path: Path, durability: str
) -> None:
    """I9: a graph with delta channels goes on in another process, though PostgreSQL hangs and has none of it."""
    config: RunnableConfig = {"configurable": {"thread_id": "delta"}}
    urls = own_servers.redis_url, own_servers.postgres_url
    # Patient about its own pauses: this is not about those.
    own: dict[str, Any] = {
        "key_prefix": key_prefix,
        "postgres_timeout": 1.0,
        "close_timeout": 0.5,
        "flush_timeout": 1.0,
        "poll_interval": 5.0,
    }
    model = graphs.delta(InMemorySaver(), graphs.Effects(tmp_path / "model"))
    command = [sys.executable, "-c", SECOND_PROCESS, *urls, json.dumps(own), str(tmp_path), durability]
    with (
        TieredSaver.from_conn_string(*urls, **own, flush_linger=NEVER) as saver,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "ready\n"
            graph = graphs.delta(saver, graphs.Effects(tmp_path))
            for turn in range(4):
                given = {"often": [f"in{turn}"], "turn": turn} | ({"seldom": ["x"]} if turn == 2 else {})
                assert graph.invoke(given, config, durability=durability) == model.invoke(given, config)
            with hanging(own_servers):
                print(file=other.stdin, flush=True)
                found, cold_reads, misses = json.loads(other.stdout.readline())
                # The first process finds what the second one journaled.
                before = saver.stats()
                assert graph.get_state(config).values == found[2]
                assert (saver.stats().hot_misses, saver.stats().cold_reads) == (before.hot_misses, before.cold_reads)
                with pytest.raises(ColdTierUnavailableError):
                    saver.get_delta_channel_history(config=config_of("delta", "", str(uuid6())), channels=["often"])
            assert other.wait(30) == 0
        finally:
            other.kill()
        assert (cold_reads, misses) == (0, 0)
        assert found[0] == model.get_state(config).values
        assert found[1] == found[2] == model.invoke({"often": ["second"], "turn": 7}, config)
        saver.flush()
        with PostgresSaver.from_conn_string(urls[1]) as cold:
            assert graphs.delta(cold, graphs.Effects(tmp_path)).get_state(config).values == found[2]


def test_a_resume_costs_two_round_trips(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    """Reading a graph's state with delta channels is one read for the checkpoint and one for the history."""
    saver = make_saver(flush_linger=NEVER)
    config: RunnableConfig = {"configurable": {"thread_id": "delta"}}
    graph = graphs.delta(saver, graphs.Effects(tmp_path))
    graph.invoke({"often": ["in"], "turn": 1}, config)
    graph.get_state(config)
    with redis.Redis.from_url(redis_url) as client, client.monitor() as monitor:
        graph.get_state(config)
        client.exists("the end")
        seen = []
        while "the end" not in (command := monitor.next_command())["command"]:
            if command["client_type"] != "lua" and key_prefix in command["command"]:
                seen.append(command["command"].split()[0])

    # The first two are sent at once.
    assert seen == ["HGETALL", "HGET", "EVALSHA"]
