"""How long an agent waits for one call of its checkpointer: `put`, `put_writes`, `get_tuple` of the latest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Protocol

import redis
import redis.asyncio as aioredis
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from tests.benchmarks.contestants import EVERYBODY, THROUGH, Saver, asettle, open_async_savers, open_savers, settle
from tests.benchmarks.report import FLOOR, POSTGRES, Measurement, Outcome
from tests.benchmarks.stage import Stage, Turns
from tests.benchmarks.workload import USUAL_MESSAGES, Conversation, Step, new_thread, task_ids

OPERATIONS = ("put", "put_writes", "get_tuple")
_FLOOR_LIMITS = {"put": 1.25, "put_writes": 1.3, "get_tuple": 1.25}
# A state of 20 messages on average: a thread begins with 15, and its last step has 25.
_AROUND = 5
_THREADS = 4  # in one turn
_IN_PLOT = ("put, sync", "put_writes, sync", "get_tuple, sync", "put, async")

_STORE = "return redis.call('HSET', KEYS[1], 'value', ARGV[1])"


class Caller(Protocol):
    """One who stores steps; each call gives the seconds it took."""

    def begin(self, step: Step) -> None:
        """Begin a thread; not measured."""

    def put(self, step: Step) -> float:
        """Store a step."""

    def put_writes(self, step: Step) -> float:
        """Store what a task wrote on the step."""

    def get_tuple(self, step: Step) -> float:
        """Read the step, the latest of its thread."""

    def settle(self) -> None:
        """Let what goes on in the background end."""


class SaverCaller:
    """Calls a saver."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._tasks = task_ids()
        self._config: RunnableConfig = {}
        self._thread: RunnableConfig = {}

    def begin(self, step: Step) -> None:
        self._config = self._thread = new_thread()
        self.put(step)

    def put(self, step: Step) -> float:
        started = time.perf_counter()
        self._config = self._saver.put(self._config, step.checkpoint, step.metadata, step.new_versions)
        return time.perf_counter() - started

    def put_writes(self, step: Step) -> float:
        task = next(self._tasks)
        started = time.perf_counter()
        self._saver.put_writes(self._config, step.writes, task, "~__pregel_pull, agent")
        return time.perf_counter() - started

    def get_tuple(self, step: Step) -> float:
        started = time.perf_counter()
        found = self._saver.get_tuple(self._thread)
        took = time.perf_counter() - started
        assert found is not None
        assert len(found.checkpoint["channel_values"]["messages"]) == len(step.messages)
        return took

    def settle(self) -> None:
        settle(self._saver)


class FloorCaller:
    """The least that anybody who stores in Redis must do: the serializer, and one raw call with the same bytes."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._serde = JsonPlusSerializer()
        self._digest = client.script_load(_STORE)

    def begin(self, step: Step) -> None:
        self.put(step)

    def put(self, step: Step) -> float:
        rest = step.rest()
        started = time.perf_counter()
        self._client.evalsha(self._digest, 1, "floor", self._serde.dumps_typed(step.messages)[1] + rest)
        return time.perf_counter() - started

    def put_writes(self, step: Step) -> float:
        started = time.perf_counter()
        data = b"".join(self._serde.dumps_typed(value)[1] for _, value in step.writes)
        self._client.evalsha(self._digest, 1, "floor", data)
        return time.perf_counter() - started

    def get_tuple(self, step: Step) -> float:
        self._client.hset("floor", mapping=_hash(self._serde, step))
        started = time.perf_counter()
        found = self._client.hgetall("floor")
        self._serde.loads_typed(("msgpack", found[b"value"]))
        return time.perf_counter() - started

    def settle(self) -> None:
        """Nothing goes on in the background."""


class AsyncSaverCaller:
    """Calls a saver from an event loop."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._tasks = task_ids()
        self._config: RunnableConfig = {}
        self._thread: RunnableConfig = {}

    async def begin(self, step: Step) -> None:
        self._config = self._thread = new_thread()
        await self.put(step)

    async def put(self, step: Step) -> float:
        started = time.perf_counter()
        self._config = await self._saver.aput(self._config, step.checkpoint, step.metadata, step.new_versions)
        return time.perf_counter() - started

    async def put_writes(self, step: Step) -> float:
        task = next(self._tasks)
        started = time.perf_counter()
        await self._saver.aput_writes(self._config, step.writes, task, "~__pregel_pull, agent")
        return time.perf_counter() - started

    async def get_tuple(self, step: Step) -> float:
        started = time.perf_counter()
        found = await self._saver.aget_tuple(self._thread)
        took = time.perf_counter() - started
        assert found is not None
        assert len(found.checkpoint["channel_values"]["messages"]) == len(step.messages)
        return took

    async def settle(self) -> None:
        await asettle(self._saver)


class AsyncFloorCaller:
    """The floor, on an asynchronous client."""

    def __init__(self, client: Any, digest: str) -> None:
        self._client = client
        self._serde = JsonPlusSerializer()
        self._digest = digest

    async def begin(self, step: Step) -> None:
        await self.put(step)

    async def put(self, step: Step) -> float:
        rest = step.rest()
        started = time.perf_counter()
        await self._client.evalsha(self._digest, 1, "floor", self._serde.dumps_typed(step.messages)[1] + rest)
        return time.perf_counter() - started

    async def put_writes(self, step: Step) -> float:
        started = time.perf_counter()
        data = b"".join(self._serde.dumps_typed(value)[1] for _, value in step.writes)
        await self._client.evalsha(self._digest, 1, "floor", data)
        return time.perf_counter() - started

    async def get_tuple(self, step: Step) -> float:
        await self._client.hset("floor", mapping=_hash(self._serde, step))
        started = time.perf_counter()
        found = await self._client.hgetall("floor")
        self._serde.loads_typed(("msgpack", found[b"value"]))
        return time.perf_counter() - started

    async def settle(self) -> None:
        """Nothing goes on in the background."""


def _hash(serde: JsonPlusSerializer, step: Step) -> dict[str, bytes]:
    return {"value": serde.dumps_typed(step.messages)[1], "rest": step.rest()}


class _Threads:
    """The steps of the threads of a turn, the same for everybody."""

    def __init__(self, stage: Stage) -> None:
        first, last = USUAL_MESSAGES - _AROUND, USUAL_MESSAGES + _AROUND
        self._messages = stage.writer.messages(last)
        self._first, self._count = first, last - first

    def __iter__(self) -> Iterator[tuple[Step, list[Step]]]:
        """Give each thread's first step, and those that are measured."""
        for _ in range(_THREADS):
            conversation = Conversation(self._messages, self._first)
            yield conversation.step(), conversation.steps(self._count)


def _turn(caller: Caller, threads: _Threads) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for first, steps in threads:
        caller.begin(first)
        for step in steps:
            took["put"].append(caller.put(step))
            took["get_tuple"].append(caller.get_tuple(step))
            took["put_writes"].append(caller.put_writes(step))
    caller.settle()
    return took


async def _async_turn(caller: AsyncSaverCaller | AsyncFloorCaller, threads: _Threads) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for first, steps in threads:
        await caller.begin(first)
        for step in steps:
            took["put"].append(await caller.put(step))
            took["get_tuple"].append(await caller.get_tuple(step))
            took["put_writes"].append(await caller.put_writes(step))
    await caller.settle()
    return took


def run(stage: Stage) -> Outcome:
    """Measure."""
    outcome, threads = Outcome(), _Threads(stage)
    names = (*EVERYBODY[:2], THROUGH, *EVERYBODY[2:])
    rounds = stage.pick(15, 2)
    with ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(stage.urls.redis, protocol=2))
        callers: dict[str, Caller] = {FLOOR: FloorCaller(client)}
        callers |= {name: SaverCaller(saver) for name, saver in open_savers(stage, stack, names).items()}
        turns = Turns(stage, "calls, sync", list(callers), rounds)
        for name in turns:
            turns.record(name, _turn(callers[name], threads))
    _judge(outcome, turns, "sync")
    turns = asyncio.run(_run_async(stage, names, rounds, threads))
    _judge(outcome, turns, "async")
    return outcome


async def _run_async(stage: Stage, names: tuple[str, ...], rounds: int, threads: _Threads) -> Turns:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(aioredis.Redis.from_url(stage.urls.redis, protocol=2))
        callers: dict[str, AsyncSaverCaller | AsyncFloorCaller] = {
            FLOOR: AsyncFloorCaller(client, await client.script_load(_STORE))
        }
        savers = await open_async_savers(stage, stack, names)
        callers |= {name: AsyncSaverCaller(saver) for name, saver in savers.items()}
        turns = Turns(stage, "calls, async", list(callers), rounds)
        for name in turns:
            turns.record(name, await _async_turn(callers[name], threads))
    return turns


def _judge(outcome: Outcome, turns: Turns, how: str) -> None:
    for operation in OPERATIONS:
        measurement = Measurement(
            f"{operation}, {how}", "µs", turns.samples[operation], in_plot=f"{operation}, {how}" in _IN_PLOT
        )
        outcome.measurements.append(measurement)
        outcome.compare(measurement, FLOOR, _FLOOR_LIMITS[operation])
        if operation == "put":
            outcome.compare(measurement, POSTGRES, 0.5)
