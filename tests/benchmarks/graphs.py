"""Whole runs of a real graph: one of 100 steps, 64 at once in one event loop, and one over a network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from langchain_core.messages import AnyMessage
from langgraph.graph import StateGraph

from tests.benchmarks.contestants import EVERYBODY, Saver, asettle, open_async_savers, open_savers, settle
from tests.benchmarks.delay import Network, added_latency
from tests.benchmarks.report import MEMORY, POSTGRES, Measurement, Outcome
from tests.benchmarks.stage import Stage, Turns, Urls
from tests.benchmarks.workload import USUAL_MESSAGES, State, agent_graph, new_thread

_STEPS = 100
_GRAPHS = 64
_STEPS_OF_MANY = 10
_REDIS_DELAY, _POSTGRES_DELAY = 0.0005, 0.005  # seconds added to each round trip
_MODES = ("sync", "async")
_IN_PLOT = ("invoke, sync", "ainvoke, async")


class Agent:
    """A graph, and what its runs begin with: a state of 8 KB, to which each step appends a message."""

    def __init__(self, messages: Sequence[AnyMessage], steps: int) -> None:
        self.messages = messages
        self.steps = steps
        self.graph: StateGraph[State] = agent_graph(messages, steps)
        self._input: Any = {"messages": list(messages[: len(messages) - steps])}

    def invoke(self, saver: Saver, durability: Any) -> float:
        """Run it on a new thread; the seconds it took until `invoke` returned."""
        runnable = self.graph.compile(checkpointer=saver)
        config = {**new_thread(), "recursion_limit": 10_000}
        started = time.perf_counter()
        state = runnable.invoke(self._input, config, durability=durability)
        took = time.perf_counter() - started
        assert len(state["messages"]) == len(self.messages)
        return took

    async def ainvoke(self, saver: Saver, durability: Any) -> float:
        """Do what `invoke` does, in an event loop."""
        runnable = self.graph.compile(checkpointer=saver)
        config = {**new_thread(), "recursion_limit": 10_000}
        started = time.perf_counter()
        state = await runnable.ainvoke(self._input, config, durability=durability)
        took = time.perf_counter() - started
        assert len(state["messages"]) == len(self.messages)
        return took

    async def many(self, saver: Saver, count: int) -> float:
        """Run so many at once; all their steps in a second."""
        runnable = self.graph.compile(checkpointer=saver)
        configs: list[Any] = [{**new_thread(), "recursion_limit": 10_000} for _ in range(count)]
        started = time.perf_counter()
        await asyncio.gather(*(runnable.ainvoke(self._input, config) for config in configs))
        return count * self.steps / (time.perf_counter() - started)


def _agent(stage: Stage, steps: int) -> Agent:
    return Agent(stage.writer.messages(USUAL_MESSAGES + steps), steps)


def _whole_runs(
    stage: Stage, what: str, agent: Agent, rounds: int, modes: Sequence[str], urls: Urls | None = None
) -> dict[str, Measurement]:
    """Measure whole runs, synchronous and asynchronous, in some durability modes."""
    with ExitStack() as stack:
        savers = open_savers(stage, stack, urls=urls)
        turns = Turns(stage, f"{what}, invoke", list(savers), rounds)
        for name in turns:
            for mode in modes:
                turns.record(name, {f"invoke, {mode}": [agent.invoke(savers[name], mode)]})
                settle(savers[name])
    samples = dict(turns.samples)

    async def measure() -> None:
        async with AsyncExitStack() as stack:
            savers = await open_async_savers(stage, stack, urls=urls)
            turns = Turns(stage, f"{what}, ainvoke", list(savers), rounds)
            for name in turns:
                for mode in modes:
                    turns.record(name, {f"ainvoke, {mode}": [await agent.ainvoke(savers[name], mode)]})
                    await asettle(savers[name])
        samples.update(turns.samples)

    asyncio.run(measure())
    return {
        measure: Measurement(f"{what}, {measure}", "ms", found, in_plot=measure in _IN_PLOT)
        for measure, found in samples.items()
    }


def run_graph(stage: Stage) -> Outcome:
    """Measure a graph of 100 steps, in both durability modes."""
    outcome = Outcome()
    agent = _agent(stage, stage.pick(_STEPS, 20))
    found = _whole_runs(stage, f"{agent.steps}-step graph", agent, stage.pick(9, 2), _MODES)
    for measure, measurement in found.items():
        outcome.measurements.append(measurement)
        if measure.endswith(", sync"):
            outcome.compare(measurement, MEMORY, 1.4)
            outcome.compare(measurement, POSTGRES, 0.4)
        else:
            outcome.compare(measurement, MEMORY, 1.25)
    return outcome


def run_concurrent(stage: Stage) -> Outcome:
    """Measure 64 graphs at once in one event loop, with LangGraph's default durability."""
    outcome = Outcome()
    agent, count = _agent(stage, stage.pick(_STEPS_OF_MANY, 5)), _GRAPHS

    async def measure() -> Turns:
        async with AsyncExitStack() as stack:
            savers = await open_async_savers(stage, stack, EVERYBODY)
            turns = Turns(stage, f"{count} graphs at once", list(savers), stage.pick(5, 1))
            for name in turns:
                turns.record(name, {"steps": [await agent.many(savers[name], count)]})
                await asettle(savers[name])
        return turns

    turns = asyncio.run(measure())
    measurement = Measurement(
        f"{count} graphs at once", "/s", turns.samples["steps"], more_is_better=True, in_plot=True
    )
    outcome.measurements.append(measurement)
    outcome.compare(measurement, POSTGRES, 2.2, at_least=True)
    outcome.compare(measurement, MEMORY, 0.75, at_least=True)
    return outcome


def run_network(stage: Stage) -> Outcome:
    """Measure the graph of 100 steps with a network between the agent and the servers."""
    outcome = Outcome()
    agent = _agent(stage, stage.pick(_STEPS, 10))
    with Network(stage.urls, _REDIS_DELAY, _POSTGRES_DELAY) as urls:
        added = added_latency(stage.urls, urls)
        found = _whole_runs(stage, f"{agent.steps} steps, network", agent, stage.pick(5, 1), ("sync",), urls)
    outcome.notes.append(
        f"The network adds {added.redis * 1e3:.2f} ms to a round trip to Redis and {added.postgres * 1e3:.2f} ms "
        "to one to PostgreSQL (measured; wanted: 0.50 and 5.00)."
    )
    for measurement in found.values():
        outcome.measurements.append(measurement)
        outcome.compare(measurement, POSTGRES, 0.2)
    return outcome
