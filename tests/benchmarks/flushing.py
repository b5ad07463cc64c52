"""How fast PostgreSQL catches up, and how far it is behind under load; cold reads, which only it can answer."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack

import psycopg
from langchain_core.runnables import RunnableConfig

from langgraph_tiered_saver import TieredSaver
from tests.benchmarks.contestants import Saver, async_postgres_at, database_of, postgres, postgres_at, tiered
from tests.benchmarks.report import OURS, POSTGRES, Measurement, Outcome, Target
from tests.benchmarks.stage import Stage, Turns
from tests.benchmarks.workload import USUAL_MESSAGES, Conversation, Step, new_thread

_THREADS = 200
_SMALL_MESSAGES, _SMALL_BYTES = 2, 512  # a state of 1 KB
_SAMPLING = 0.005  # seconds between two looks at the lag
_LAG_LIMIT = 0.25
_VERSIONS = 100
_GETS = 25  # in one turn


@contextlib.contextmanager
def paused_flusher(database: str) -> Iterator[None]:
    """Keep every flush of a database from committing, without touching the saver: a lock holds its first INSERT up."""
    with psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE checkpoint_blobs, checkpoints, checkpoint_writes IN EXCLUSIVE MODE")
        yield
        connection.rollback()


class _Crowd:
    """Threads that take turns in making steps, with a state of 1 KB each."""

    def __init__(self, stage: Stage) -> None:
        self._messages = stage.writer.messages(40, _SMALL_BYTES)
        self._conversations = [Conversation(self._messages, 1, window=_SMALL_MESSAGES) for _ in range(_THREADS)]
        self._configs = [new_thread() for _ in range(_THREADS)]
        self._said = [0] * _THREADS
        self._next = 0

    def put(self, saver: Saver) -> float:
        """Make the next thread's next step; the seconds that storing it took."""
        number = self._next
        self._next = (number + 1) % _THREADS
        if self._said[number] == len(self._messages):
            self._conversations[number] = Conversation(self._messages, 1, window=_SMALL_MESSAGES)
            self._configs[number], self._said[number] = new_thread(), 0
        self._said[number] += 1
        step = self._conversations[number].step()
        started = time.perf_counter()
        self._configs[number] = saver.put(self._configs[number], step.checkpoint, step.metadata, step.new_versions)
        return time.perf_counter() - started


def run_flush(stage: Stage) -> Outcome:
    """Measure the flush throughput, and the lag at half of that load."""
    outcome = Outcome()
    records, others = stage.pick(6000, 500), stage.pick(1000, 200)
    with ExitStack() as stack:
        saver, peer = tiered(stage, stack), postgres(stage, stack)
        database = database_of(saver)
        crowds = {OURS: _Crowd(stage), POSTGRES: _Crowd(stage)}
        turns = Turns(stage, "flush", [OURS, POSTGRES], stage.pick(7, 2))
        for name in turns:
            if name == POSTGRES:
                took = sum(crowds[name].put(peer) for _ in range(others))
                turns.record(name, {"throughput": [others / took]})
            else:
                with paused_flusher(database):
                    acknowledged = sum(crowds[name].put(saver) for _ in range(records))
                    left = saver.stats().backlog_records
                    started = time.perf_counter()
                saver.flush()
                drained = left / (time.perf_counter() - started)
                turns.record(name, {"throughput": [drained], "acknowledged": [records / acknowledged]})
        throughput = Measurement(
            "1 KB states durable in PostgreSQL", "/s", turns.samples["throughput"], more_is_better=True
        )
        outcome.measurements.append(throughput)
        outcome.compare(
            throughput, POSTGRES, 6.0, at_least=True, what="flush throughput", note="against its put in a loop"
        )
        most = statistics.median(value for found in turns.samples["acknowledged"][OURS] for value in found)
        _measure_lag(stage, outcome, saver, throughput.median(OURS) / 2, most)
    return outcome


def _measure_lag(stage: Stage, outcome: Outcome, saver: TieredSaver, half: float, most: float) -> None:
    """Judge the lag at half of the flush throughput, or at all that one thread can put if that is less."""
    seconds = stage.pick(10, 1)
    for rate, judged in ((half, True), (most / 2, False)):
        lags, reached = _lag_under_load(stage, saver, rate, seconds)
        p99, median = statistics.quantiles(lags, n=100)[98], statistics.median(lags)
        described = f"at {reached:,.0f} puts/s of 1 KB: lag p99 {p99 * 1e3:.0f} ms, median {median * 1e3:.0f} ms"
        if not judged:
            outcome.notes.append(f"{described} (half of what one thread puts while nothing is flushed)")
            continue
        note = described
        if reached < 0.95 * rate:
            note += f"; {rate:,.0f}/s was wanted, but one thread puts no more while everything is flushed"
        outcome.targets.append(Target("lag p99 at half of that load", p99, _LAG_LIMIT, unit="ms", note=note))


def _lag_under_load(stage: Stage, saver: TieredSaver, rate: float, seconds: float) -> tuple[list[float], float]:
    """Put at a constant rate, or as fast as it goes.

    Returns:
        How far PostgreSQL was behind, in seconds, every few milliseconds; and the rate that was reached.
    """
    crowd, lags, over = _Crowd(stage), [0.0], threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLING):
            lags.append(saver.stats().flush_lag_seconds)

    sampler = threading.Thread(target=sample)
    sampler.start()
    count, slices = 0, 20
    started = time.perf_counter()
    with stage.bar(f"lag at {rate:,.0f} puts/s", slices) as bar:
        while (now := time.perf_counter() - started) < seconds:
            if count < now * rate:
                crowd.put(saver)
                count += 1
                if count % max(1, int(rate * seconds / slices)) == 0:
                    bar.advance()
            else:
                time.sleep(max(0.0, count / rate - now))
        reached = count / (time.perf_counter() - started)
    over.set()
    sampler.join()
    saver.flush()
    return lags, reached


def run_cold(stage: Stage) -> Outcome:
    """Measure reads that only PostgreSQL can answer, on the very same rows."""
    outcome = Outcome()
    rounds, gets = stage.pick(15, 2), stage.pick(_GETS, 5)
    with ExitStack() as stack:
        saver = tiered(stage, stack)
        database = database_of(saver)
        thread, configs = _history(stage, saver)
        savers: dict[str, Saver] = {OURS: saver, POSTGRES: postgres_at(database, stack)}
        turns = Turns(stage, "cold reads, sync", list(savers), rounds)
        for name in turns:
            took = [_timed_get(savers[name], config) for config in stage.random.sample(configs, gets)]
            turns.record(name, {"get_tuple": took, "list": [_timed_list(savers[name], thread)]})
        samples = {f"{measure}, sync": found for measure, found in turns.samples.items()}

        async def measure() -> None:
            async with AsyncExitStack() as loop_stack:
                peers: dict[str, Saver] = {OURS: saver, POSTGRES: await async_postgres_at(database, loop_stack)}
                turns = Turns(stage, "cold reads, async", list(peers), rounds)
                for name in turns:
                    took = [await _atimed_get(peers[name], config) for config in stage.random.sample(configs, gets)]
                    turns.record(name, {"get_tuple": took, "list": [await _atimed_list(peers[name], thread)]})
                samples.update({f"{measure}, async": found for measure, found in turns.samples.items()})

        asyncio.run(measure())
    for what in ("get_tuple, sync", "get_tuple, async", "list, sync", "list, async"):
        label = what.replace("list", f"list of {_VERSIONS}")
        measurement = Measurement(f"cold {label}", "µs" if "get" in what else "ms", samples[what])
        outcome.measurements.append(measurement)
        outcome.compare(measurement, POSTGRES, 1.1)
    return outcome


def _history(stage: Stage, saver: TieredSaver) -> tuple[RunnableConfig, list[RunnableConfig]]:
    """Store a thread of 100 versions of 8 KB; its address, and those of its older versions."""
    messages = stage.writer.messages(USUAL_MESSAGES + _VERSIONS)
    conversation = Conversation(messages, USUAL_MESSAGES, window=USUAL_MESSAGES)
    thread = config = new_thread()
    configs: list[RunnableConfig] = []
    for step in conversation.steps(_VERSIONS):
        config = _put(saver, config, step)
        configs.append(config)
    saver.flush()
    return thread, configs[10:-10]


def _put(saver: Saver, config: RunnableConfig, step: Step) -> RunnableConfig:
    config = saver.put(config, step.checkpoint, step.metadata, step.new_versions)
    saver.put_writes(config, step.writes, f"task-{step.checkpoint['id']}", "~__pregel_pull, agent")
    return config


def _timed_get(saver: Saver, config: RunnableConfig) -> float:
    started = time.perf_counter()
    found = saver.get_tuple(config)
    took = time.perf_counter() - started
    assert found is not None
    assert len(found.checkpoint["channel_values"]["messages"]) == USUAL_MESSAGES
    return took


async def _atimed_get(saver: Saver, config: RunnableConfig) -> float:
    started = time.perf_counter()
    found = await saver.aget_tuple(config)
    took = time.perf_counter() - started
    assert found is not None
    return took


def _timed_list(saver: Saver, config: RunnableConfig) -> float:
    started = time.perf_counter()
    found = list(saver.list(config))
    took = time.perf_counter() - started
    assert len(found) == _VERSIONS
    return took


async def _atimed_list(saver: Saver, config: RunnableConfig) -> float:
    started = time.perf_counter()
    found = [each async for each in saver.alist(config)]
    took = time.perf_counter() - started
    assert len(found) == _VERSIONS
    return took
