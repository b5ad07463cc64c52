"""Retention: what `prune` and the worker's policy leave is what every thread needs to go on; each step is bounded."""

from __future__ import annotations

import asyncio
import json
import operator
import signal
import subprocess
import sys
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import TASKS
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from typer.testing import CliRunner

from langgraph_tiered_saver import (
    ConfigurationError,
    InvalidInputError,
    TieredConfig,
    TieredSaver,
    cli,
    drivers,
    operations,
)
from langgraph_tiered_saver.cold import maintenance, passes, retention
from langgraph_tiered_saver.config import parse_seconds
from langgraph_tiered_saver.errors import HotTierUnavailableError, ThreadQuarantinedError
from langgraph_tiered_saver.records import MaintenanceRecord
from langgraph_tiered_saver.retention_policy import PassResult, make_pass
from langgraph_tiered_saver.runtime import Runtime
from tests.integration import graphs
from tests.integration.test_cli import COMMAND, environment, run
from tests.integration.test_equivalence import (
    Branch,
    Script,
    agent_loop,
    at,
    channels_of,
    delta_graph,
    evict_hot,
    missing_values,
    perform,
    rows_of,
    subgraphs,
    task_id,
    unreferenced_blobs,
)
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DAY = 86400.0

# Prunes a thread, ten checkpoints at a time, and is killed in the middle of its fourth batch.
KILLED_PRUNER = """
import os, signal, sys
from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.cold import retention

removed, remove = 0, retention.remove

def remove_or_die(*arguments):
    global removed
    removed += 1
    remove(*arguments)
    if removed == 4:
        os.kill(os.getpid(), signal.SIGKILL)

retention.MOST_REMOVED, retention.remove = 10, remove_or_die
TieredSaver.from_env(sweep_interval=0).prune(["agent"], keep_last=3)
"""


@pytest.fixture
def urls(redis_url: str, postgres_url: str, key_prefix: str) -> dict[str, str]:
    """This test's database and prefix, as environment variables."""
    return {
        "LANGGRAPH_TIERED_REDIS_URL": redis_url,
        "LANGGRAPH_TIERED_POSTGRES_URL": postgres_url,
        "LANGGRAPH_TIERED_KEY_PREFIX": key_prefix,
    }


def aged(script: Script, ages: Sequence[float], *, now: float | None = None) -> None:
    """Let the checkpoints that a script puts be so many seconds old, in their order."""
    now = time.time() if now is None else now
    puts = [arguments[1] for method, arguments in script.calls if method == "put"]
    for checkpoint, age in zip(puts, ages, strict=True):
        checkpoint["ts"] = datetime.fromtimestamp(now - age, timezone.utc).isoformat()


def long_thread(thread_id: str, steps: int) -> tuple[Script, Branch]:
    """A thread whose checkpoints each change one channel of two, and write."""
    script = Script()
    run = Branch(script, thread_id)
    for number in range(steps):
        run.step({f"channel {number % 2}": [number]}, source="loop")
        run.write(task_id(number), [("channel 0", number)])
    return script, run


def checkpoints_of(url: str, thread_id: str) -> list[str]:
    """The ids of a thread's checkpoints in PostgreSQL, oldest first."""
    return [row["checkpoint_id"] for row in rows_of(url)["checkpoints"] if row["thread_id"] == thread_id]


def assert_whole(url: str, *scripts: Script) -> None:
    """I2: no visible checkpoint misses a value, has a parent that is gone, or leaves rows that nothing uses."""
    channels = {key: names for script in scripts for key, names in channels_of(script).items()}
    assert missing_values(url, channels) == []
    assert unreferenced_blobs(url) == []
    rows = rows_of(url)
    known = {(row["thread_id"], row["checkpoint_ns"], row["checkpoint_id"]) for row in rows["checkpoints"]}
    for row in rows["checkpoints"]:
        parent = (row["thread_id"], row["checkpoint_ns"], row["parent_checkpoint_id"])
        assert parent[2] is None or parent in known
    assert {
        (row["thread_id"], row["checkpoint_ns"], row["checkpoint_id"]) for row in rows["checkpoint_writes"]
    } <= known


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_keep_last_leaves_the_newest_of_each_namespace(
    make_saver: Callable[..., TieredSaver], postgres_url: str, asynchronous: bool
) -> None:
    """I2: the newest N of each namespace stay whole; subgraph calls go with the root checkpoint they started from."""
    script = Script()
    subgraphs(script, "with subgraphs")
    agent_loop(script, "agent", long_text=False)
    agent_loop(script, "other", long_text=False)
    saver = make_saver()
    perform(saver, script)
    stored = [config["configurable"] for config in script.stored]
    roots = sorted(c["checkpoint_id"] for c in stored if (c["thread_id"], c["checkpoint_ns"]) == ("with subgraphs", ""))
    memory = sorted(c["checkpoint_id"] for c in stored if c["checkpoint_ns"] == "memory")

    if asynchronous:
        asyncio.run(saver.aprune(["with subgraphs", "agent"], keep_last=2))
    else:
        saver.prune(["with subgraphs", "agent"], keep_last=2)

    left: dict[str, list[str]] = {}
    for row in rows_of(postgres_url)["checkpoints"]:
        if row["thread_id"] == "with subgraphs":
            left.setdefault(row["checkpoint_ns"], []).append(row["checkpoint_id"])
    assert left[""] == roots[-2:]
    assert left["memory"] == memory[-2:]
    # The last call started from the last root checkpoint but one, which stays.
    call = f"child:{task_id(102)}"
    assert {ns: len(ids) for ns, ids in left.items() if ":" in ns} == {call: 2, f"{call}|grand:{task_id(300)}": 1}
    agent = sorted(c["checkpoint_id"] for c in stored if c["thread_id"] == "agent")
    assert checkpoints_of(postgres_url, "agent") == agent[-2:]
    assert len(checkpoints_of(postgres_url, "other")) == len(agent)
    assert_whole(postgres_url, script)


def test_max_age_goes_by_the_time_a_checkpoint_says_or_its_id(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """Older checkpoints go, by `ts` or the time in a UUIDv6; the latest stays whatever its age, and one of no age."""
    by_time, _ = long_thread("by time", 5)
    aged(by_time, [5 * DAY, 2 * DAY, 0.5 * DAY, 3 * DAY, 4 * DAY])
    by_id = Script()
    run = Branch(by_id, "by id")
    old = uuid.UUID("1e000000-0000-6000-8000-000000000000")  # in 2020
    for name in (str(old), "1f-not-a-uuid", None, None):
        run.step({"a": [name]}, checkpoint_id=name)
    for number, (_, arguments) in enumerate(by_id.calls):
        arguments[1]["ts"] = "yesterday" if number % 2 else ""
    saver = make_saver()
    perform(saver, by_time)
    perform(saver, by_id)
    ids = [config["configurable"]["checkpoint_id"] for config in by_time.stored]

    saver.prune(["by time", "by id"], max_age=DAY)

    assert checkpoints_of(postgres_url, "by time") == [ids[2], ids[4]]
    assert str(old) not in checkpoints_of(postgres_url, "by id")
    assert len(checkpoints_of(postgres_url, "by id")) == 3
    assert_whole(postgres_url, by_time, by_id)
    # Both rules: what stays satisfies both.
    saver.prune(["by time", "by id"], max_age=DAY, keep_last=1)
    assert [len(checkpoints_of(postgres_url, name)) for name in ("by time", "by id")] == [1, 1]


@pytest.mark.parametrize("snapshot_frequency", [1, 3, 1000])
@pytest.mark.parametrize("keep_last", [1, 4])
def test_every_kept_checkpoint_of_a_delta_thread_keeps_its_state(
    make_saver: Callable[..., TieredSaver],
    monkeypatch: pytest.MonkeyPatch,
    postgres_url: str,
    snapshot_frequency: int,
    keep_last: int,
) -> None:
    """I2: what a kept checkpoint's delta channels are rebuilt from stays, forks included, and no more than that."""
    monkeypatch.setattr(retention, "MOST_REMOVED", 3)
    saver = make_saver()
    graph = delta_graph(saver, snapshot_frequency=snapshot_frequency)
    config = {"configurable": {"thread_id": "delta"}}
    for turn in range(3):
        graph.invoke({"notes": [f"in{turn}"], "rare": [], "count": 0}, config)
    history = list(graph.get_state_history(config))
    fork = graph.update_state(history[5].config, {"notes": ["forked"], "count": 10}, "first")
    graph.invoke({"notes": ["on the fork"], "rare": ["f"], "count": 0}, fork)
    history = list(graph.get_state_history(config))

    saver.prune(["delta"], keep_last=keep_last)

    for state in history[:keep_last]:
        found = graph.get_state(state.config)
        assert (found.values, found.metadata) == (state.values, state.metadata)
    if snapshot_frequency == 1000:
        # Nothing was stored whole yet: every ancestor is needed.
        assert len(checkpoints_of(postgres_url, "delta")) > keep_last
    result = graph.invoke({"notes": ["afterwards"], "rare": [], "count": 0}, config)
    assert result["notes"][: len(history[0].values["notes"])] == history[0].values["notes"]
    saver.flush()
    assert unreferenced_blobs(postgres_url) == []


def test_pending_sends_of_an_old_format_stay(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str
) -> None:
    """I2: before format 4, a kept checkpoint's pending sends are writes of its parent, which therefore stays."""
    script = Script()
    run = Branch(script, "old")
    for number in range(6):
        run.step({"a": [number]})
        run.write(task_id(number), [(TASKS, {"send": number})], "~__pregel_pull, a")
    for method, arguments in script.calls:
        if method == "put":
            arguments[1]["v"] = 2
    saver = make_saver()
    perform(saver, script)
    kept = [saver.get_tuple(config) for config in script.stored[-2:]]

    saver.prune(["old"], keep_last=2)

    evict_hot(redis_url, key_prefix)
    found = [saver.get_tuple(config) for config in script.stored]
    assert [one is not None for one in found] == [False, False, False, True, True, True]
    assert [one.checkpoint for one in found[-2:] if one] == [one.checkpoint for one in kept if one]


# --- graphs go on ----------------------------------------------------------------------------------------------------


def without_parents(value: Any) -> Any:
    """Leave out what a prune changes of a state: where its parent is."""
    if isinstance(value, dict):
        return {key: without_parents(item) for key, item in value.items() if key != "parent_config"}
    return [without_parents(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name",
    ["tool_loop", "interrupt", "interrupts_in_parallel", "nested_subgraphs", "subgraph_memory", "send",
     "failure"],
)  # fmt: skip
def test_a_graph_that_waits_resumes_after_a_pass(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """I2: an interrupted or failed run, subgraphs included, goes on as if nothing had been removed."""
    monkeypatch.setattr(retention, "MOST_REMOVED", 1)
    case = graphs.CASES[name]
    expected = []
    model, effects = graphs.runner(name, InMemorySaver(), tmp_path / "model", asynchronous=False)
    for phase in (case.begin, case.resume):
        expected.append(graphs.plain(phase(model, effects)))
    done = effects.done()
    saver = make_saver(retention_keep_last=1, retention_max_age=0.001)
    thread, effects = graphs.runner(name, saver, tmp_path / "tiered", asynchronous=False)

    begun = graphs.plain(case.begin(thread, effects))
    saver.flush()
    result = make_pass(saver._source.current())
    resumed = graphs.plain(case.resume(thread, effects))

    assert result is not None
    assert result.checkpoints > 0
    assert result.pruned_threads == 1
    assert graphs.normalised(without_parents([begun, resumed])) == graphs.normalised(without_parents(expected))
    assert effects.done() == done


class Running(TypedDict, total=False):
    messages: Annotated[list[str], operator.add]
    log: Annotated[list[str], DeltaChannel(graphs.append_all, snapshot_frequency=7)]
    count: int
    note: list[str]


class Counted(TypedDict, total=False):
    count: int
    note: list[str]


def counting_graph(saver: Any, steps: int, pause: Callable[[], None] = lambda: None) -> Any:
    """A loop of so many steps, with a list that grows and a delta channel, half of them in a subgraph."""

    def step(state: Running) -> Any:
        if state["count"] % 4 == 3:
            pause()
        return {"messages": [f"m{state['count']}"], "log": [f"l{state['count']}"], "count": state["count"] + 1}

    child = StateGraph(Counted)
    child.add_node("inner", lambda state: {"note": [f"inner {state['count']}"]})
    child.add_edge(START, "inner")
    builder = StateGraph(Running)
    builder.add_node("step", step)
    builder.add_node("child", child.compile())
    builder.add_edge(START, "step")
    builder.add_edge("step", "child")
    builder.add_conditional_edges("child", lambda state: "step" if state["count"] < steps else END, ["step", END])
    return builder.compile(checkpointer=saver)


def test_a_graph_runs_on_while_its_thread_is_pruned(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """I2, I6: pruned at many moments of its run, a graph comes to the same state, hot and in PostgreSQL."""
    monkeypatch.setattr(retention, "MOST_REMOVED", 4)
    saver, pruner = make_saver(), make_saver()
    options: Any = {"recursion_limit": 1000, "configurable": {"thread_id": "running"}}
    given = {"messages": ["in"], "log": ["in"], "count": 0}
    expected = counting_graph(InMemorySaver(), 40).invoke(given, options)
    prunes = 0

    def another_prune() -> None:
        before = prunes
        wait_until(lambda: prunes > before, 60, "another prune")

    graph = counting_graph(saver, 40, another_prune)
    running = threading.Thread(target=lambda: graph.invoke(given, options))

    running.start()
    while running.is_alive():
        pruner.prune(["running"], keep_last=2)
        prunes += 1
    running.join()

    assert prunes >= 10
    assert graph.get_state(options).values == expected
    saver.flush()
    saver.prune(["running"], keep_last=2)
    assert counting_graph(pruner, 40).get_state(options).values == expected
    # What the delta channel is rebuilt from, and the subgraph calls of that; of 160 in all.
    assert len(rows_of(postgres_url)["checkpoints"]) < 50
    assert unreferenced_blobs(postgres_url) == []


# --- bounded, repeatable ---------------------------------------------------------------------------------------------

MANY_ROWS = (
    """INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
    SELECT 'long', '', lpad(n::text, 8, '0'), CASE WHEN n > 1 THEN lpad((n - 1)::text, 8, '0') END,
        jsonb_build_object('v', 4, 'id', lpad(n::text, 8, '0'), 'ts', '', 'channel_values', '{}'::jsonb,
            'versions_seen', '{}'::jsonb, 'channel_versions', (
                SELECT jsonb_object_agg('c' || c, lpad((n - (n + c) % 10)::text, 8, '0'))
                FROM generate_series(0, 9) c)),
        '{"source": "loop", "step": 1, "parents": {}}'
    FROM generate_series(11, 5010) n""",
    """INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT DISTINCT 'long', '', v.key, v.value, 'json', convert_to(repeat('9', 200), 'UTF8')
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') v""",
    """INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob)
    SELECT 'long', '', checkpoint_id, 'task', n, 'c', 'json', '1' FROM checkpoints, generate_series(0, 1) n""",
)


def test_a_long_thread_is_pruned_in_bounded_transactions(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """I8: 5,000 checkpoints go oldest first, at most 500 in a transaction, in seconds."""
    saver = make_saver()
    saver.setup()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for statement in MANY_ROWS:
            connection.execute(statement)
    batches: list[list[str]] = []
    remove = retention.remove

    def note(cursor: Any, thread_id: str, removal: retention.Removal) -> None:
        batches.append(list(removal.ids.get("", ())))
        remove(cursor, thread_id, removal)

    monkeypatch.setattr(retention, "remove", note)
    began = time.monotonic()

    saver.prune(["long"], keep_last=10)

    assert time.monotonic() - began < 30
    assert [len(batch) for batch in batches] == [500] * 9 + [490]
    assert [name for batch in batches for name in batch] == [f"{number:08}" for number in range(11, 5001)]
    assert checkpoints_of(postgres_url, "long") == [f"{number:08}" for number in range(5001, 5011)]
    assert unreferenced_blobs(postgres_url) == []
    latest = saver.get_tuple(at("long", ""))
    assert latest is not None
    assert len(latest.checkpoint["channel_values"]) == 10


def test_a_prune_that_was_killed_goes_on_when_it_is_repeated(
    make_saver: Callable[..., TieredSaver], urls: dict[str, str], postgres_url: str
) -> None:
    """I2, I4: after a SIGKILL in a batch the thread is whole, and repetition leaves what one prune would have left."""
    script, run_ = long_thread("agent", 60)
    ids = [config["configurable"]["checkpoint_id"] for config in script.stored]
    saver = make_saver()
    perform(saver, script)
    saver.flush()

    killed = subprocess.run([sys.executable, "-c", KILLED_PRUNER], env=environment(**urls), timeout=60, check=False)

    assert killed.returncode == -signal.SIGKILL
    assert checkpoints_of(postgres_url, "agent") == ids[30:]
    assert_whole(postgres_url, script)
    # What it had journaled is adopted by whoever reads, and goes on being part of the thread's order.
    more = Script()
    run_.script = more
    run_.step({"channel 0": ["afterwards"]})
    perform(saver, more)
    saver.prune(["agent"], keep_last=3)
    saver.prune(["agent"], keep_last=3)
    assert checkpoints_of(postgres_url, "agent") == [*ids[-2:], more.stored[0]["configurable"]["checkpoint_id"]]
    assert_whole(postgres_url, script, more)


def test_nothing_unflushed_is_lost_to_a_prune(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I3: a prune comes after what was acknowledged before it, whoever holds that, and before what comes later."""
    script, run_ = long_thread("agent", 8)
    writer, pruner = make_saver(flush_linger=600.0), make_saver()
    perform(writer, script)

    pruner.prune(["agent"], keep_last=2)

    ids = [config["configurable"]["checkpoint_id"] for config in script.stored]
    assert checkpoints_of(postgres_url, "agent") == ids[-2:]
    # The writer still holds everything in memory, and flushes it late.
    writer.flush()
    assert checkpoints_of(postgres_url, "agent") == ids[-2:]
    assert_whole(postgres_url, script)
    latest = writer.get_tuple(at("agent", ""))
    assert latest is not None
    assert latest.checkpoint["channel_values"] == run_.values


def test_what_comes_between_the_plan_and_the_lock_is_seen(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """I2: a checkpoint that another program stores meanwhile, relying on a blob that was to go, keeps it."""
    script, _ = long_thread("agent", 8)
    saver = make_saver()
    perform(saver, script)
    saver.flush()
    parent = script.stored[2]
    found = saver.get_tuple(parent)
    assert found is not None
    fork = {**found.checkpoint, "id": str(uuid6())}
    prepare, prepared = retention.prepare, 0

    def prepare_and_lose_the_race(*arguments: Any) -> retention.Removal:
        nonlocal prepared
        removal = prepare(*arguments)
        prepared += 1
        if prepared == 1:
            with PostgresSaver.from_conn_string(postgres_url) as other:
                other.put(parent, fork, {"source": "fork", "step": 9, "parents": {}}, {})
        return removal

    monkeypatch.setattr(retention, "prepare", prepare_and_lose_the_race)

    saver.prune(["agent"], keep_last=2)

    assert prepared == 2
    last = script.stored[-1]["configurable"]["checkpoint_id"]
    assert checkpoints_of(postgres_url, "agent") == [last, fork["id"]]
    latest = saver.get_tuple(at("agent", ""))
    assert latest is not None
    assert latest.checkpoint["channel_values"] == found.checkpoint["channel_values"]


def test_a_record_that_is_executed_late_removes_nothing_newer(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I3: rows of later sequence numbers, written past a Redis that was away, stay whatever the rules say."""
    script, _ = long_thread("agent", 6)
    saver = make_saver()
    perform(saver, script)
    saver.flush()
    ids = [config["configurable"]["checkpoint_id"] for config in script.stored]
    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
        row = connection.execute("SELECT tiered_seq FROM checkpoints WHERE checkpoint_id = %s", (ids[3],)).fetchone()
        assert row is not None
        for later, arguments in enumerate(({"keep_last": 1}, {"idle_before": time.time() + DAY})):
            sequence, record = row["tiered_seq"] + later, MaintenanceRecord(maintenance.RETAIN, arguments)
            maintenance.execute(connection, "agent", sequence, 1, record, shard_of=lambda name: 0, statement_timeout=10)

    assert checkpoints_of(postgres_url, "agent") == ids[4:]


def test_records_of_other_versions(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """A plain prune record is executed as ever; rules that this version does not know remove nothing."""
    script, _ = long_thread("plain", 5)
    other, _ = long_thread("unknown", 5)
    saver = make_saver()
    perform(saver, script)
    perform(saver, other)
    runtime = saver._source.current()

    drivers.run(runtime, operations._maintain(runtime, {"plain": MaintenanceRecord(maintenance.PRUNE, {})}))
    record = MaintenanceRecord(maintenance.RETAIN, {"keep_first": 1})
    with pytest.raises(ThreadQuarantinedError):
        drivers.run(runtime, operations._maintain(runtime, {"unknown": record}))

    assert len(checkpoints_of(postgres_url, "plain")) == 1
    assert len(checkpoints_of(postgres_url, "unknown")) == 5
    with psycopg.connect(postgres_url) as connection:
        reasons = connection.execute("SELECT reason FROM tiered_quarantine").fetchall()
    assert "keep_first=1" in reasons[0][0]
    assert_whole(postgres_url, script, other)


@pytest.mark.parametrize(
    "arguments",
    [{"keep_last": 0}, {"keep_last": True}, {"keep_last": 1.5}, {"max_age": -1}, {"max_age": float("nan")},
     {"max_age": "1d"}, {"strategy": "delete", "keep_last": 1}, {"strategy": "delete_all", "max_age": 1}],
)  # fmt: skip
def test_rules_that_make_no_sense_prune_nothing(arguments: Any) -> None:
    """A rule out of range, or one that a strategy has no use for, is refused before anything is sent."""
    saver = TieredSaver.from_conn_string("redis://127.0.0.1:1", "postgresql://127.0.0.1:1/nowhere")
    with saver, pytest.raises(InvalidInputError, match="nothing was pruned"):
        saver.prune(["thread"], **arguments)


# --- the policy ------------------------------------------------------------------------------------------------------


def policy(saver: TieredSaver, **options: Any) -> PassResult | None:
    return make_pass(saver._source.current(), **options)


def test_a_pass_applies_every_rule_and_leaves_quarantined_threads_alone(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """A pass prunes what has too much, deletes what is idle from both tiers, and counts the same without doing it."""
    pruned, _ = long_thread("pruned", 6)
    idle, _ = long_thread("idle", 6)
    kept, _ = long_thread("kept", 3)
    refused, _ = long_thread("refused", 6)
    saver = make_saver(retention_keep_last=3, retention_delete_idle=30 * DAY)
    for script in (pruned, idle, kept, refused):
        perform(saver, script)
    saver.flush()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE tiered_threads SET quarantined = true WHERE thread_id = 'refused'")
        # Made, and written, long ago.
        for table in ("checkpoints", "checkpoint_writes"):
            connection.execute(f"UPDATE {table} SET tiered_seq = 1 WHERE thread_id = 'idle'")
        connection.execute(
            "UPDATE checkpoints SET checkpoint = checkpoint || %s WHERE thread_id = 'idle'",
            (Jsonb({"ts": "2020-02-02T02:02:02Z"}),),
        )
    others = rows_of(postgres_url)

    counted = policy(saver, dry_run=True)

    assert rows_of(postgres_url) == others
    result = policy(saver)
    assert result == counted == PassResult(4, 9, 1, 1, 0, finished=True)
    ids = {name: len(checkpoints_of(postgres_url, name)) for name in ("pruned", "idle", "kept", "refused")}
    assert ids == {"pruned": 3, "idle": 0, "kept": 3, "refused": 6}
    assert not [row for rows in rows_of(postgres_url).values() for row in rows if row["thread_id"] == "idle"]
    with redis.Redis.from_url(redis_url) as client:
        assert not [key for key in client.scan_iter(f"{{{key_prefix}:*}}:*", count=1000) if key.endswith(b"idle")]
    assert saver.get_tuple(at("idle", "")) is None
    assert policy(saver) == PassResult(3, 0, 0, 0, 0, finished=True)


def test_a_thread_that_was_resumed_is_not_idle(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I1: an old thread that a run has just written to, with or without a new checkpoint, is not deleted."""
    saver = make_saver()
    scripts = []
    for name in ("resumed", "continued"):
        script, run_ = long_thread(name, 3)
        aged(script, [3 * DAY, 3 * DAY, 3 * DAY])
        perform(saver, script)
        more = Script()
        run_.script = more
        if name == "resumed":
            run_.write(task_id(99), [("channel 0", "a human's answer")])
        else:
            run_.step({"channel 0": ["new"]})
        scripts += [script, more]
        perform(saver, more)
    rules = retention.Rules.from_now(delete_idle=DAY)
    runtime = saver._source.current()

    drivers.run(runtime, operations.retain(runtime, ["resumed", "continued"], rules))

    assert [len(checkpoints_of(postgres_url, name)) for name in ("resumed", "continued")] == [3, 4]


def test_an_idle_thread_is_complete_until_it_is_gone(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """I2: between the transactions that delete a long idle thread, its latest state can be read, delta channels too."""
    monkeypatch.setattr(retention, "MOST_REMOVED", 2)
    saver = make_saver()
    graph = delta_graph(saver, snapshot_frequency=3, writes_rare=False)
    config: Any = {"configurable": {"thread_id": "delta"}}
    for turn in range(4):
        graph.invoke({"notes": [f"in{turn}"], "count": 0}, config)
    saver.flush()
    expected = graph.get_state(config).values
    seen = []
    remove = retention.remove

    def look(cursor: Any, thread_id: str, removal: retention.Removal) -> None:
        remove(cursor, thread_id, removal)
        seen.append(delta_graph(PostgresSaver(cursor.connection), snapshot_frequency=3).get_state(config).values)

    monkeypatch.setattr(retention, "remove", look)
    runtime = saver._source.current()
    rules = retention.Rules(idle_before=time.time() + DAY)

    drivers.run(runtime, operations.retain(runtime, ["delta"], rules))

    assert len(seen) >= 2
    assert all(values == expected for values in seen)
    assert not any(rows_of(postgres_url).values())


def test_passes_take_turns_and_go_on_where_one_was_stopped(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """One process at a time makes a pass, once in an interval; what a stopped or dead one left is gone on with."""
    monkeypatch.setattr(passes, "PAGE", 2)
    saver, other = make_saver(retention_keep_last=1), make_saver(retention_keep_last=1)
    for number in range(7):
        script, _ = long_thread(f"thread {number}", 2)
        perform(saver, script)
    saver.flush()
    asked = iter([False, False, False, True])

    stopped = policy(saver, stopping=lambda: next(asked))

    assert stopped == PassResult(2, 3, 3, 0, 0, finished=False)
    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
        assert passes.take_turn(connection, "dead", 0.0) == "thread 1"
        assert policy(other) is None, "somebody else's turn"
        connection.execute("UPDATE tiered_retention SET held_until = now() - interval '1 second'")
        assert not passes.keep_turn(connection, "nobody", "")
    assert policy(other, interval=3600.0) == PassResult(5, 4, 4, 0, 0, finished=True)
    assert policy(saver, interval=3600.0) is None, "not due"
    assert policy(saver) == PassResult(7, 0, 0, 0, 0, finished=True)


def test_a_pass_waits_for_runs_and_for_redis(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    """I3: a thread that a run has leased is left alone, and nothing is removed while nobody knows what is journaled."""
    saver, other = make_saver(retention_keep_last=1), make_saver()
    for name in ("free", "leased"):
        script, _ = long_thread(name, 3)
        perform(saver, script)
    saver.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "hot", None)
        with pytest.raises(HotTierUnavailableError, match="nothing is removed"):
            policy(saver)
    assert [len(checkpoints_of(postgres_url, name)) for name in ("free", "leased")] == [3, 3]

    with other.lease("leased"):
        assert policy(saver) == PassResult(2, 2, 1, 0, 1, finished=True)

    assert [len(checkpoints_of(postgres_url, name)) for name in ("free", "leased")] == [1, 3]
    assert policy(saver) == PassResult(2, 2, 1, 0, 0, finished=True)


def test_worker_once_applies_the_policy_and_prints_what_it_removed(
    make_saver: Callable[..., TieredSaver], urls: dict[str, str], postgres_url: str
) -> None:
    """`worker --once` adopts, then makes one pass; --dry-run only counts; the environment sets rules as well."""
    saver = make_saver()
    for name in ("a", "b"):
        script, _ = long_thread(name, 4)
        aged(script, [3 * DAY, 3 * DAY, 0.1, 0])
        perform(saver, script)
    saver.flush()

    def in_process(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["worker", *arguments], env=urls)

    counted = in_process("--dry-run", "--max-age", "2d")
    assert counted.exit_code == 0, counted.stderr
    assert counted.stdout == "Retention would remove 4 checkpoints: 2 threads pruned, 0 deleted, of 2.\n"
    assert len(rows_of(postgres_url)["checkpoints"]) == 8
    once = run("worker", "--once", "--json", LANGGRAPH_TIERED_RETENTION_MAX_AGE="48h", **urls)
    assert once.returncode == 0, once.stderr
    summary = json.loads(once.stdout)
    assert (summary["removed_checkpoints"], summary["deleted_threads"]) == (4, 0)
    assert summary["retention"] == {
        "threads": 2, "checkpoints": 4, "pruned_threads": 2, "deleted_threads": 0, "skipped_threads": 0,
        "finished": True,
    }  # fmt: skip
    assert len(rows_of(postgres_url)["checkpoints"]) == 4
    assert in_process("--dry-run").exit_code == 2
    assert in_process("--max-age", "2 weeks").exit_code == 2


def test_a_running_worker_applies_the_policy_until_it_is_told_to_stop(
    make_saver: Callable[..., TieredSaver], urls: dict[str, str], postgres_url: str
) -> None:
    """A worker makes passes while it runs, logs what one removed, and ends with 0 within seconds of a signal."""
    saver = make_saver()
    script, _ = long_thread("agent", 6)
    perform(saver, script)
    saver.flush()
    worker = subprocess.Popen(
        [COMMAND, "worker", "--keep-last", "2", "--interval", "0.5"],
        env=environment(LANGGRAPH_TIERED_RETENTION_INTERVAL="0.2", **urls),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(checkpoints_of(postgres_url, "agent")) == 2, 30, message="the first pass")
        script, _ = long_thread("later", 5)
        perform(saver, script)
        saver.flush()
        wait_until(lambda: len(checkpoints_of(postgres_url, "later")) == 2, 30, message="a later pass")
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=20)
    finally:
        worker.kill()

    assert worker.returncode == 0, log
    assert time.monotonic() - began < 6
    assert "Retention removed 4 checkpoints: 1 threads pruned, 0 deleted, of 1" in log
    assert "Retention removed 3 checkpoints" in log
    assert "7 old checkpoints removed" in log
    assert saver.get_tuple(at("agent", "")) is not None


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("1.5", 1.5), ("45s", 45.0), ("90m", 5400.0),
                                               ("12h", 43200.0), (" 30D ", 30 * DAY)])  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    """A number of seconds, or one with a unit behind it, says the same in an option and in the environment."""
    assert parse_seconds(text) == seconds
    settings = TieredConfig.settings_from_env({"LANGGRAPH_TIERED_RETENTION_MAX_AGE": text})
    assert settings == {"retention_max_age": seconds}


@pytest.mark.parametrize(
    "settings",
    [{"retention_keep_last": 0}, {"retention_max_age": 0.0}, {"retention_delete_idle": -1.0},
     {"retention_interval": 0.0}, {"retention_keep_last": True}],
)  # fmt: skip
def test_retention_settings_are_checked(settings: dict[str, Any]) -> None:
    """A rule that would remove everything, or never stop looking, is refused."""
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        TieredConfig(**settings)
