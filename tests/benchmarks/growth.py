"""What a step of a long conversation costs: time, bytes to Redis, and rows in PostgreSQL."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import redis
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_tiered_saver import TieredConfig
from tests.benchmarks.contestants import EVERYBODY, Saver, database_of, open_savers, postgres, settle, tiered
from tests.benchmarks.report import MEMORY, OURS, POSTGRES, Measurement, Outcome, Target
from tests.benchmarks.stage import Stage, Turns
from tests.benchmarks.workload import USUAL_MESSAGES, Conversation, Step, agent_graph, new_thread, task_ids

_LONG = 2000
_OVERHEAD = 2048  # bytes that a step may send beside what it added
_BIG_MESSAGE = 1024
_SIZE_STEPS = 400
_COMPACT = 'TieredSaver, storage="compact"'

# Of all that is not PostgreSQL's own: tables with their TOAST and indexes, whatever schema they are in.
_SIZE = """
SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
"""


class _Talk:
    """A conversation of one saver that goes on: each step appends a message."""

    def __init__(self, saver: Saver, make: Callable[[], Conversation]) -> None:
        self._saver, self._make = saver, make
        self._tasks = task_ids()
        self.begin()

    def begin(self) -> None:
        """Begin a new thread."""
        self._conversation = self._make()
        self._config: RunnableConfig = new_thread()
        self.put(self._conversation.step())

    def step(self) -> Step:
        """Make the next step."""
        return self._conversation.step()

    def put(self, step: Step) -> float:
        """Store a step; the seconds it took."""
        started = time.perf_counter()
        self._config = self._saver.put(self._config, step.checkpoint, step.metadata, step.new_versions)
        return time.perf_counter() - started

    def put_writes(self, step: Step) -> None:
        """Store what a task wrote on the step."""
        self._saver.put_writes(self._config, step.writes, next(self._tasks), "~__pregel_pull, agent")


def run_long(stage: Stage) -> Outcome:
    """Measure `put` less the serializer's own time, with few and with many messages in the state."""
    outcome = Outcome()
    rounds, steps = stage.pick(13, 2), stage.pick(6, 2)
    messages = stage.writer.messages(_LONG + (rounds + 1) * steps + 1)
    serde = JsonPlusSerializer()
    with ExitStack() as stack:
        savers = open_savers(stage, stack, (MEMORY, OURS, POSTGRES))
        many = {name: _Talk(saver, lambda: Conversation(messages, _LONG)) for name, saver in savers.items()}
        few = {name: _Talk(saver, lambda: Conversation(messages, USUAL_MESSAGES)) for name, saver in savers.items()}
        turns = Turns(stage, f"put at {_LONG:,} messages", list(savers), rounds)
        for name in turns:
            few[name].begin()
            measured: dict[str, list[float]] = {}
            for talk, count in ((few[name], USUAL_MESSAGES), (many[name], _LONG)):
                settle(savers[name])
                for _ in range(steps // 2):
                    # Whoever comes second finds the messages in the processor's cache, so each order is taken once.
                    both = [_less_serializing(talk, savers[name], serde, serializer_first=f) for f in (False, True)]
                    measured.setdefault(f"rest {count}", []).append(sum(rest for rest, _ in both) / 2)
                    measured.setdefault(f"whole {count}", []).extend(whole for _, whole in both)
            turns.record(name, measured)
    rest: dict[int, Measurement] = {}
    for count in (USUAL_MESSAGES, _LONG):
        whole = Measurement(f"put at {count:,} messages", "µs", turns.samples[f"whole {count}"])
        rest[count] = Measurement(f"less serializing, {count:,}", "µs", turns.samples[f"rest {count}"])
        outcome.measurements += [whole, rest[count]]
    growth = {name: rest[_LONG].median(name) / rest[USUAL_MESSAGES].median(name) for name in savers}
    what = f"put less serializing, {_LONG:,} / {USUAL_MESSAGES} messages"
    note = f"{POSTGRES}'s is {growth[POSTGRES]:.1f} x"
    outcome.targets.append(Target(what, growth[OURS], 3.0, note=note))
    return outcome


def _less_serializing(
    talk: _Talk, saver: Saver, serde: JsonPlusSerializer, *, serializer_first: bool
) -> tuple[float, float]:
    """Store the next step, and serialize the same messages alone; what goes on in the background ends in between.

    Returns:
        The seconds of the put less those of the serializer, and those of the put.
    """
    step = talk.step()
    serializing = _serialize(serde, step) if serializer_first else 0.0
    took = talk.put(step)
    settle(saver)
    if not serializer_first:
        serializing = _serialize(serde, step)
    return took - serializing, took


def _serialize(serde: JsonPlusSerializer, step: Step) -> float:
    started = time.perf_counter()
    serde.dumps_typed(step.messages)
    return time.perf_counter() - started


def run_traffic(stage: Stage) -> Outcome:
    """Count the bytes that Redis receives for a step, the flusher's included."""
    outcome = Outcome()
    steps = stage.pick(20, 4)
    messages = stage.writer.messages(_LONG + steps + 1)
    serde = JsonPlusSerializer()
    added = sum(len(serde.dumps_typed(message)[1]) for message in messages[_LONG : _LONG + steps]) / steps
    names = tuple(name for name in EVERYBODY if name not in (MEMORY, POSTGRES))
    samples: dict[int, dict[str, list[list[float]]]] = {}
    with ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(stage.urls.redis, protocol=2))
        savers = open_savers(stage, stack, names)
        with stage.bar("bytes to Redis", 2 * len(savers)) as bar:
            for count in (USUAL_MESSAGES, _LONG):
                for name, saver in savers.items():
                    talk = _Talk(saver, lambda count=count: Conversation(messages, count))  # type: ignore[misc]
                    settle(saver)
                    before = _received(client)
                    for _ in range(steps):
                        step = talk.step()
                        talk.put(step)
                        talk.put_writes(step)
                    settle(saver)
                    samples.setdefault(count, {})[name] = [[(_received(client) - before) / steps]]
                    bar.advance()
    for count, found in samples.items():
        outcome.measurements.append(Measurement(f"to Redis per step at {count:,} messages", "bytes", found))
    note = f"a step (put and put_writes) added a message of {added:,.0f} bytes; the target is 2 x that + 2 KB"
    value = samples[_LONG][OURS][0][0]
    what = f"bytes to Redis per step at {_LONG:,} messages"
    outcome.targets.append(Target(what, value, 2 * added + _OVERHEAD, unit="bytes", note=note))
    return outcome


def _received(client: Any) -> int:
    return int(client.info("stats")["total_net_input_bytes"])


def run_size(stage: Stage) -> Outcome:
    """Measure what one long conversation occupies in PostgreSQL."""
    outcome = Outcome()
    steps = stage.pick(_SIZE_STEPS, 30)
    messages = stage.writer.messages(steps + 1, _BIG_MESSAGE)
    graph = agent_graph(messages, steps)
    openers: dict[str, Callable[[ExitStack], Saver]] = {
        POSTGRES: lambda stack: postgres(stage, stack),
        OURS: lambda stack: tiered(stage, stack),
    }
    has_compact = any(field.name == "storage" for field in dataclasses.fields(TieredConfig))
    if has_compact:
        openers[_COMPACT] = lambda stack: tiered(stage, stack, storage="compact")
    sizes: dict[str, list[list[float]]] = {}
    with stage.bar(f"size of a {steps}-step conversation", len(openers)) as bar:
        for name, open_saver in openers.items():
            with ExitStack() as stack:
                saver: Any = open_saver(stack)
                with psycopg.connect(database_of(saver), autocommit=True) as connection:
                    empty = connection.execute(_SIZE).fetchone()
                run: Any = graph.compile(checkpointer=saver)
                config = {**new_thread(), "recursion_limit": 10_000}
                state = run.invoke({"messages": messages[:1]}, config, durability="async")
                assert len(state["messages"]) == steps + 1
                settle(saver)
                with psycopg.connect(database_of(saver), autocommit=True) as connection:
                    row = connection.execute(_SIZE).fetchone()
                assert row is not None
                assert empty is not None
                sizes[name] = [[float(row[0] - empty[0])]]
            bar.advance()
    measurement = Measurement(f"PostgreSQL after {steps} steps", "MiB", sizes)
    outcome.measurements.append(measurement)
    outcome.targets.append(
        Target(
            f"PostgreSQL size after {steps} steps, compact / {POSTGRES}",
            measurement.ratio(_COMPACT, POSTGRES) if has_compact else None,
            0.05,
            note="" if has_compact else 'this version has no storage="compact"',
        )
    )
    return outcome
