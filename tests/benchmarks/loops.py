"""What an event loop gains: calls that share a connection, and large values that are serialized outside it."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any
from unittest import mock

import redis

from langgraph_tiered_saver import TieredConfig, operations
from langgraph_tiered_saver.hot import clients
from tests.benchmarks.contestants import asettle, tiered
from tests.benchmarks.report import Measurement, Outcome
from tests.benchmarks.stage import Stage, Turns
from tests.benchmarks.workload import Conversation, new_thread

_SHARED = "one connection for the loop"
_APART = "a connection for each call"
_INLINE = "in the event loop"
_THREAD = "in a thread"
_STORE = "return redis.call('SET', KEYS[1], ARGV[1])"
_MESSAGES = (100, 300, 1200)
_TICK = 0.0005  # seconds


def run_lanes(stage: Stage) -> Outcome:
    """Measure calls of a trivial script by one and by 64 coroutines, on one connection and on redis-py's pool."""
    outcome = Outcome()
    payload, rounds, calls = b"x" * 1500, stage.pick(9, 2), stage.pick(640, 64)
    with redis.Redis.from_url(stage.urls.redis) as client:
        digest: Any = client.script_load(_STORE)

    async def measure() -> Turns:
        client = clients.from_url(stage.urls.redis, TieredConfig())[1]()

        async def call(name: str) -> None:
            command = ("EVALSHA", digest, 1, "bench-lanes", payload)
            if name == _SHARED:
                await client.exchange((command,))
            else:
                await client.execute_command(*command)

        async def repeat(name: str, count: int) -> None:
            for _ in range(count):
                await call(name)

        turns = Turns(stage, "lanes", (_SHARED, _APART), rounds)
        for name in turns:
            for width in (1, 64):
                started = time.perf_counter()
                await asyncio.gather(*(repeat(name, calls // width) for _ in range(width)))
                turns.record(name, {f"calls by {width} coroutines": [calls / (time.perf_counter() - started)]})
        await client.aclose()
        return turns

    for measure_, found in asyncio.run(measure()).samples.items():
        outcome.measurements.append(Measurement(measure_, "/s", found, more_is_better=True))
    return outcome


def run_loop(stage: Stage) -> Outcome:
    """Measure the longest pause of an event loop while a long conversation is stored and read."""
    outcome = Outcome()

    async def measure(count: int) -> dict[str, Any]:
        messages = stage.writer.messages(count + 200)
        async with AsyncExitStack() as stack:
            saver = tiered(stage, stack)
            turns = Turns(stage, f"pauses at {count} messages", (_INLINE, _THREAD), stage.pick(9, 2))
            talk, config = Conversation(messages, count), new_thread()
            for name in turns:
                with mock.patch.object(operations, "LARGE", 1 if name == _THREAD else 10**12):
                    for _ in range(3):
                        step = talk.step()
                        pause, took, config = await _longest_pause(
                            saver.aput(config, step.checkpoint, step.metadata, step.new_versions)
                        )
                        read, _, _ = await _longest_pause(
                            saver.aget_tuple({"configurable": {"thread_id": config["configurable"]["thread_id"]}})
                        )
                        turns.record(name, {"aput": [pause], "aget_tuple": [read], "aput itself": [took]})
                await asettle(saver)
            return turns.samples

    for count in _MESSAGES[: stage.pick(len(_MESSAGES), 1)]:
        for what, found in asyncio.run(measure(count)).items():
            name = f"{what}, {count} messages" if what == "aput itself" else f"pause by {what}, {count} messages"
            outcome.measurements.append(Measurement(name, "ms", found))
    return outcome


async def _longest_pause(call: Any) -> tuple[float, float, Any]:
    """Run a call beside a task that wakes up all the time; the longest time that it did not, and the call's own."""
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_TICK)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(4 * _TICK)
    gaps.clear()
    started = time.perf_counter()
    result = await call
    took = time.perf_counter() - started
    await asyncio.sleep(4 * _TICK)
    ticking.cancel()
    return max(gaps), took, result
