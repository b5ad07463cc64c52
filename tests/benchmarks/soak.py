"""Whether memory stays flat: puts at a constant rate for an hour, over conversations that grow and are pruned.

    python -m tests.benchmarks.soak --minutes 60 --rate 200

Exit code 1 if the resident memory grew, or if the rate could not be kept.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import psutil
import redis
import typer
from langchain_core.messages import AnyMessage
from langchain_core.runnables import RunnableConfig
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from langgraph_tiered_saver import TieredSaver
from tests.benchmarks.contestants import tiered
from tests.benchmarks.stage import open_stage
from tests.benchmarks.workload import Conversation, new_thread

_MIB = 2**20
_KEPT_MESSAGES = 10  # of a conversation whose older messages are dropped
_LONGEST = 60  # steps of a conversation, at most
_PRUNE_EVERY = 2.0  # seconds
_DELETED = 0.2  # of the conversations that end; the others go on, pruned
_KEPT_RATE = 0.95


@dataclass(frozen=True)
class Sample:
    """A look at everything that could grow.

    Attributes:
        seconds: Since the beginning.
        puts: So far.
        rss_bytes: Resident memory of this process.
        redis_bytes: Redis' `used_memory`.
        backlog_records: Acknowledged and not in PostgreSQL yet.
        backlog_bytes: Their size.
        lag_seconds: Age of the oldest.
    """

    seconds: float
    puts: int
    rss_bytes: int
    redis_bytes: int
    backlog_records: int
    backlog_bytes: int
    lag_seconds: float


@dataclass(frozen=True)
class Fit:
    """A straight line through the memory samples of the last two thirds.

    Attributes:
        bytes_per_second: Its slope.
        start: Its value where they begin.
        seconds: How long they last.
    """

    bytes_per_second: float
    start: float
    seconds: float

    @property
    def growth(self) -> float:
        """By which part of its value the memory grew over that time."""
        return self.bytes_per_second * self.seconds / self.start

    @property
    def mib_per_hour(self) -> float:
        """The slope in MiB an hour."""
        return self.bytes_per_second * 3600 / _MIB


def fit(samples: Sequence[Sample]) -> Fit | None:
    """Fit a line through the last two thirds, in which the process has settled; None if there are too few."""
    last = samples[len(samples) // 3 :]
    if len(last) < 3:
        return None
    seconds = [sample.seconds for sample in last]
    slope, intercept = statistics.linear_regression(seconds, [float(sample.rss_bytes) for sample in last])
    return Fit(slope, intercept + slope * seconds[0], seconds[-1] - seconds[0])


class Talk:
    """One conversation: it grows by a message each step, loses its older messages at times, and ends."""

    def __init__(self, messages: Sequence[AnyMessage], chance: random.Random) -> None:
        self._messages, self._chance = messages, chance
        self.config: RunnableConfig = new_thread()
        self.begin(new=True)

    @property
    def thread_id(self) -> str:
        """Its thread."""
        found: str = self.config["configurable"]["thread_id"]
        return found

    def begin(self, *, new: bool) -> None:
        """Begin, in a thread of its own, or again in the one it has."""
        if new:
            self.config = new_thread()
        # A window is what an agent that trims its messages has; without one, the state grows to the end.
        window = _KEPT_MESSAGES if self._chance.random() < 0.5 else None
        self._left = self._chance.randint(_LONGEST // 3, _LONGEST)
        self._conversation = Conversation(self._messages, 1, window=window)

    def put(self, saver: TieredSaver) -> bool:
        """Store the next step; whether the conversation has ended with it."""
        step = self._conversation.step()
        self.config = saver.put(self.config, step.checkpoint, step.metadata, step.new_versions)
        self._left -= 1
        return self._left == 0


class Soak:
    """Puts at a constant rate, and looks at what could grow."""

    def __init__(self, saver: TieredSaver, client: Any, talks: list[Talk], seed: int) -> None:
        self._saver, self._client, self._talks = saver, client, talks
        self._chance = random.Random(seed)
        self._process = psutil.Process()
        self._ended: list[Talk] = []
        self._pruned_at = 0.0
        self.puts = 0
        self.samples: list[Sample] = []

    def step(self) -> None:
        """Store one step of some conversation that has not ended."""
        talk = self._chance.choice(self._talks)
        if talk.put(self._saver):
            self._talks.remove(talk)
            self._ended.append(talk)
        self.puts += 1

    def tidy(self, seconds: float) -> None:
        """Now and then delete or prune the conversations that have ended, and let them begin again."""
        if seconds - self._pruned_at < _PRUNE_EVERY and len(self._talks) > len(self._ended):
            return
        self._pruned_at = seconds
        deleted = [talk for talk in self._ended if self._chance.random() < _DELETED]
        kept = [talk for talk in self._ended if talk not in deleted]
        if deleted:
            self._saver.prune([talk.thread_id for talk in deleted], strategy="delete")
        if kept:
            self._saver.prune([talk.thread_id for talk in kept], strategy="keep_latest")
        for talk in self._ended:
            talk.begin(new=talk in deleted)
        self._talks += self._ended
        self._ended = []

    def look(self, seconds: float, file: TextIO) -> Sample:
        """Take a sample, and write it as a line of JSON."""
        stats = self._saver.stats()
        sample = Sample(
            round(seconds, 3),
            self.puts,
            self._process.memory_info().rss,
            int(self._client.info("memory")["used_memory"]),
            stats.backlog_records,
            stats.backlog_bytes,
            round(stats.flush_lag_seconds, 4),
        )
        self.samples.append(sample)
        file.write(json.dumps(asdict(sample)) + "\n")
        file.flush()
        return sample

    def run(self, seconds: float, rate: float, every: float, progress: Progress, file: TextIO) -> float:
        """Go on for so many seconds; the rate that was reached."""
        task = progress.add_task("soak", total=seconds, now="")
        started = time.monotonic()
        looked = -every
        while (now := time.monotonic() - started) < seconds:
            if now - looked >= every:
                looked = now
                sample = self.look(now, file)
                text = f"{sample.rss_bytes / _MIB:.0f} MiB here, {sample.redis_bytes / _MIB:.0f} in Redis, "
                text += f"backlog {sample.backlog_records}, lag {sample.lag_seconds * 1e3:.0f} ms"
                progress.update(task, completed=now, now=text)
            if self.puts < now * rate:
                self.step()
                self.tidy(now)
            else:
                time.sleep(max(0.0, self.puts / rate - now))
        reached = self.puts / (time.monotonic() - started)
        self.look(time.monotonic() - started, file)
        progress.update(task, completed=seconds)
        return reached


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    rate: Annotated[float, typer.Option(help="Puts per second.")] = 200.0,
    threads: Annotated[int, typer.Option(min=2, help="Conversations at the same time.")] = 300,
    every: Annotated[float, typer.Option(help="Seconds between two samples.")] = 5.0,
    output: Annotated[Path, typer.Option("--output", help="File for the samples, as JSON lines.")] = Path("soak.jsonl"),
    limit: Annotated[float, typer.Option(help="Growth of the resident memory that counts as flat, in percent.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Decides the messages' text and whose turn is next.")] = 1,
) -> None:
    """Put at a constant rate for a long time, and look whether this process's memory stays flat.

    Conversations grow to 60 steps, half of them with a window of 10 messages. Those that end are deleted or pruned to
    their latest checkpoint, and begin again. The memory is judged by a straight line through the last two thirds of the
    samples. Exit code 0: flat; 1: it grew, or the rate was not kept.
    """
    errors = Console(stderr=True)
    with open_stage(errors, quick=False, seed=seed, progress=False) as stage, ExitStack() as stack:
        saver = tiered(stage, stack)
        client = stack.enter_context(redis.Redis.from_url(stage.urls.redis, protocol=2))
        chance = random.Random(seed)
        messages = stage.writer.messages(_LONGEST + 1)
        soak = Soak(saver, client, [Talk(messages, chance) for _ in range(threads)], seed)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[now]}"))  # fmt: skip
        progress = stack.enter_context(Progress(*columns, console=errors))
        reached = soak.run(minutes * 60, rate, every, progress, stack.enter_context(output.open("w")))
    found = fit(soak.samples)
    flat = found is not None and found.growth * 100 < limit
    kept = reached >= _KEPT_RATE * rate
    _show(soak.samples, reached, rate, found, flat=flat, kept=kept)
    raise typer.Exit(0 if flat and kept else 1)


def _show(samples: Sequence[Sample], reached: float, rate: float, found: Fit | None, *, flat: bool, kept: bool) -> None:
    table = Table(title="Soak", box=box.SIMPLE_HEAD)
    for name in ("", "first", "median", "most", "last"):
        table.add_column(name, justify="right" if name else "left")
    for name, field, scale in (
        ("resident memory, MiB", "rss_bytes", 1 / _MIB),
        ("Redis' memory, MiB", "redis_bytes", 1 / _MIB),
        ("backlog, records", "backlog_records", 1),
        ("lag, ms", "lag_seconds", 1e3),
    ):
        values = [getattr(sample, field) * scale for sample in samples]
        shown = (values[0], statistics.median(values), max(values), values[-1])
        table.add_row(name, *(f"{value:,.1f}" for value in shown))
    console = Console()
    console.print(table)
    console.print(
        f"{reached:,.0f} puts/s of {rate:,.0f} wanted: {'kept' if kept else 'NOT kept'}.", style="" if kept else "red"
    )
    if found is None:
        console.print("Too few samples to judge the memory: run longer, or sample more often.", style="red")
        return
    verdict = f"{'flat' if flat else 'NOT flat'}: {found.growth:+.1%} over the last {found.seconds / 60:.1f} minutes"
    console.print(f"Memory is {verdict}, {found.mib_per_hour:+.1f} MiB/h.", style="green" if flat else "red")


if __name__ == "__main__":
    typer.run(main)
