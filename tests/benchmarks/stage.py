"""Where contestants meet: the servers of one run, a database for each, and turns in short interleaved rounds."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from langgraph_tiered_saver.embedded import EmbeddedServers
from tests.benchmarks.workload import Writer

_PACKAGES = ("langgraph", "langgraph-checkpoint", "langgraph-checkpoint-postgres", "langgraph-checkpoint-plainredis",
             "langgraph-checkpoint-aws", "redis", "hiredis", "psycopg", "valkey")  # fmt: skip

_FEELING = 0.03  # seconds


@dataclass(frozen=True)
class Urls:
    """How contestants reach the two servers; all the same way."""

    redis: str
    postgres: str

    def redis_database(self, number: int) -> str:
        """Give a numbered database of Redis, so that contestants' keys are apart."""
        return urlunsplit(urlsplit(self.redis)._replace(path=f"/{number}"))

    def database(self, name: str) -> str:
        """Give a database of PostgreSQL."""
        return urlunsplit(urlsplit(self.postgres)._replace(path=f"/{name}"))


class Stage:
    """What the benchmarks of one run share.

    Attributes:
        urls: The servers.
        quick: Fewer and smaller rounds, to see that everything works; the figures mean little.
        random: Decides whose turn is next.
        writer: Writes messages.
        notes: What must be known to read the figures.
    """

    def __init__(self, servers: EmbeddedServers, progress: Progress, *, quick: bool, seed: int) -> None:
        self.urls = Urls(servers.redis_url, servers.postgres_url)
        self.quick = quick
        self.random = random.Random(seed)
        self.writer = Writer(seed)
        self.notes: list[str] = []
        self._progress = progress
        self._shares: list[float] = []

    def pick(self, usual: int, quick: int) -> int:
        """Choose an amount of work."""
        return quick if self.quick else usual

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty PostgreSQL database, give its name, and drop it at the end."""
        name = f"bench_{uuid.uuid4().hex}"
        with psycopg.connect(self.urls.postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            try:
                yield name
            finally:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        """Leave nothing in Redis, and no dirty pages in PostgreSQL, to those who come next."""
        try:
            yield
        finally:
            with redis.Redis.from_url(self.urls.redis, protocol=2, socket_timeout=60) as client:
                client.flushall()
            with psycopg.connect(self.urls.postgres, autocommit=True) as connection:
                connection.execute("CHECKPOINT")

    def feel(self) -> None:
        """Find out how much of a core a busy thread gets now, beside whatever else this machine does."""
        started, worked = time.perf_counter(), time.thread_time()
        while (took := time.perf_counter() - started) < _FEELING:
            pass
        self._shares.append((time.thread_time() - worked) / took)

    @property
    def share(self) -> float:
        """The part of a core that a busy thread got, on average; near 1 on a machine that does nothing else."""
        return statistics.fmean(self._shares) if self._shares else 1.0

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        """Show a progress bar."""
        task = self._progress.add_task(what, total=total)
        yield Bar(self._progress, task)
        self._progress.update(task, completed=total)


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, by: int = 1) -> None:
        """Go on."""
        self._progress.advance(self._task, by)


class Turns:
    """Whose turn it is, round after round in an order drawn by lot, and what was measured.

    A first round, which warms everything up, is not kept.

    Attributes:
        samples: By measure, contestant and round.
    """

    def __init__(self, stage: Stage, what: str, contestants: Sequence[str], rounds: int) -> None:
        self._stage, self._what, self._contestants, self._rounds = stage, what, list(contestants), rounds
        self._warming = True
        self.samples: dict[str, dict[str, list[list[float]]]] = {}

    def __iter__(self) -> Iterator[str]:
        """Give the contestants in their turns."""
        with self._stage.bar(self._what, (self._rounds + 1) * len(self._contestants)) as bar:
            for number in range(self._rounds + 1):
                self._warming = number == 0
                self._stage.feel()
                for name in self._stage.random.sample(self._contestants, len(self._contestants)):
                    yield name
                    bar.advance()

    def record(self, contestant: str, measured: Mapping[str, Sequence[float]]) -> None:
        """Keep what was measured in a turn."""
        for measure, values in {} if self._warming else measured.items():
            by_contestant = self.samples.setdefault(measure, {name: [] for name in self._contestants})
            by_contestant[contestant].append(list(values))


@contextlib.contextmanager
def open_stage(console: Console, *, quick: bool, seed: int, progress: bool = True) -> Iterator[Stage]:
    """Start servers of this run's own, with progress bars on a console unless the caller shows its own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiered-bench-", ignore_cleanup_errors=True))
        servers = stack.enter_context(EmbeddedServers.start(f"{folder}/servers"))
        bars = Progress(*columns, console=console)
        if progress:
            stack.enter_context(bars)
        yield Stage(servers, bars, quick=quick, seed=seed)


def about() -> dict[str, Any]:
    """Describe the machine and the versions, for the JSON file."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "packages": versions,
    }
