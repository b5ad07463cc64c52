"""What the faults hit: two servers, the workers, and a proxy between each worker and each server."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fault.chaos.worker import Options
from tests.fault.proxy import Proxy
from tests.fault.stack import PostgresServer, RedisServer, ServerProcess, Stack
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

ROOT = Path(__file__).parents[3]
KEY_PREFIX = "chaos"
# Short times, so that much happens in a minute.
SETTINGS: dict[str, Any] = {
    "key_prefix": KEY_PREFIX,
    "shard_count": 8,
    "sweep_interval": 0.5,
    "orphan_grace": 1.0,
    "redis_timeout": 1.0,
    "postgres_timeout": 2.0,
    "postgres_statement_timeout": 4.0,
    "postgres_pool_size": 4,
    "flush_timeout": 8.0,
    "backlog_timeout": 5.0,
    "close_timeout": 15.0,
}
# Some workers hold much that PostgreSQL does not have, others little.
_LINGERS = (0.3, 0.005, 0.1)
# A fleet in which some store values whole and others as deltas, and some use bytes again.
_STORAGES = ("compact", "standard", "compact", "standard", "standard")
_CONNECTIONS = 60
_END_SECONDS = 60.0
FOLDERS = ("operations", "slots", "status", "problems", "workers")


@dataclass(frozen=True)
class Load:
    """What the workers do.

    Attributes:
        seed: Of everything.
        workers: How many processes.
        drivers: How many threads or tasks of each.
        slots: How many threads of graphs live at a time.
        think: Seconds between two turns of a driver, on average.
    """

    seed: int
    workers: int = 3
    drivers: int = 3
    slots: int = 15
    think: float = 0.05


class WorkerProcess:
    """A worker's place: the process that is there now, and its proxies, which stay.

    Attributes:
        redis: The proxy to Redis.
        postgres: The proxy to PostgreSQL.
    """

    def __init__(self, system: System, number: int) -> None:
        self._system, self.number = system, number
        self.redis = Proxy(system.redis.port)
        self.postgres = Proxy(system.postgres.port)
        self._incarnation = 0
        self._start()

    @property
    def name(self) -> str:
        """The name of the process that is there now."""
        return f"w{self.number}i{self._incarnation}"

    @property
    def log(self) -> Path:
        """Where the process's log is."""
        return self._system.directory / "workers" / f"{self.name}.log"

    def _start(self) -> None:
        load = self._system.load
        options = Options(
            name=self.name,
            directory=str(self._system.directory),
            redis_url=f"redis://127.0.0.1:{self.redis.port}/0",
            postgres_url=f"postgresql://postgres@127.0.0.1:{self.postgres.port}/postgres",
            settings={
                **SETTINGS,
                "flush_linger": _LINGERS[self.number % len(_LINGERS)],
                "storage": _STORAGES[self.number % len(_STORAGES)],
                "reuse_memory_bytes": 2**20 * (self.number % 2),
            },
            seed=f"{load.seed}/{self.name}",
            slots=load.slots,
            drivers=load.drivers,
            think=load.think,
            asynchronous=self.number % 2 == 1,
        )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fault.chaos.worker", options.as_json()],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def replace(self) -> None:
        """Kill the process with SIGKILL, and start another one in its place."""
        self.kill()
        self._incarnation += 1
        self._start()

    def restart(self) -> None:
        """Let the process end as it should, and start another one in its place."""
        self.end(_END_SECONDS)
        self._incarnation += 1
        self._start()

    def end(self, timeout: float) -> None:
        """Wait until the process has ended as it should; complain, and kill it, if it does not."""
        try:
            if code := self.wait(timeout):
                self._system.complaints.append(f"{self.name} ended with exit code {code}; see {self.log}")
        except subprocess.TimeoutExpired:
            self._system.complaints.append(f"{self.name} did not end within {timeout:g} s; see {self.log}")
            self.kill()

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it is gone."""
        self._process.kill()
        self.wait(20)

    def ask_to_end(self) -> None:
        """Tell the process to finish its turns, close its saver and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, timeout: float) -> int:
        """Tell the process to end, wait until it has, and give its exit code."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        return self._process.wait(timeout)

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return self._process.poll()

    def status(self) -> dict[str, Any]:
        """Read what the process said last about itself; empty if it has said nothing yet."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self._system.directory / "status" / f"{self.name}.json").read_bytes())
            return found
        return {}

    def progress(self) -> tuple[int, int]:
        """Give a pair that grows with every operation that was answered."""
        return self._incarnation, self.status().get("answered", 0)

    def close(self) -> None:
        """Kill the process and close the proxies."""
        self.kill()
        self.redis.close()
        self.postgres.close()


class System:
    """Both servers and all workers.

    Attributes:
        directory: Where everybody writes.
        load: What the workers do.
        redis: The server that is the hot tier now.
        postgres: The cold tier.
        workers: The workers.
        complaints: What workers did that they must not.
    """

    redis: RedisServer
    postgres: PostgresServer

    def __init__(self, directory: Path, load: Load) -> None:
        self.directory, self.load = directory, load
        self.workers: list[WorkerProcess] = []
        self.complaints: list[str] = []
        self._stack = ExitStack()
        for folder in FOLDERS:
            (directory / folder).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            servers = stack.enter_context(Stack(self.directory / "servers", max_connections=_CONNECTIONS))
            self.redis, self.postgres = servers.redis, servers.postgres
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_workers(self) -> None:
        """Start every worker, and wait until each has had an answer."""
        for number in range(self.load.workers):
            self.workers.append(WorkerProcess(self, number))
            self._stack.callback(self.workers[-1].close)
        wait_until(lambda: all(worker.progress()[1] for worker in self.workers), 60, "every worker works")

    def own(self, server: ServerProcess) -> None:
        """Close a server at the end."""
        self._stack.callback(server.close)

    # --- for the faults ----------------------------------------------------------------------------------------------

    def proxies(self, tier: str, worker: int | None) -> list[Proxy]:
        """Give the proxies between a worker, or all, and a server."""
        workers = self.workers if worker is None else [self.workers[worker]]
        return [getattr(one, tier) for one in workers]

    @contextlib.contextmanager
    def misbehaving(self, tier: str, worker: int | None, enter: Callable[[Proxy], None]) -> Iterator[None]:
        """Have proxies misbehave within the block."""
        proxies = self.proxies(tier, worker)
        for proxy in proxies:
            enter(proxy)
        try:
            yield
        finally:
            for proxy in proxies:
                proxy.heal()

    def count_sessions(self) -> int:
        """Count the savers' sessions in PostgreSQL."""
        with self.postgres.connect() as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'langgraph_tiered_saver'"
            ).fetchone()
            return int(row[0]) if row else 0

    # --- what must have happened before the next fault ---------------------------------------------------------------

    def oldest_journaled(self) -> float:
        """Give when the oldest record that Redis holds for PostgreSQL was written, in seconds of the time of day."""
        oldest = float("inf")
        with self.redis.client() as client:
            for journal in client.scan_iter(f"{{{KEY_PREFIX}:*}}:journal:*", 1000):
                for entry, _ in client.xrange(journal, count=1):
                    oldest = min(oldest, int(entry.split(b"-")[0]) / 1e6)
        return oldest

    def oldest_held(self) -> float:
        """Give when the oldest record that a living worker holds for PostgreSQL was acknowledged, by monotonic time.

        A worker that holds none counts as of its last word.
        """
        oldest = float("inf")
        for worker in self.workers:
            status = worker.status()
            lag = status["stats"].get("flush_lag_seconds", 0.0) if status else 0.0
            oldest = min(oldest, status["at"] / 1e9 - lag if status else 0.0)
        return oldest

    def last_words(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the name and the last statistics of every process that ever was."""
        for file in sorted((self.directory / "status").glob("*.json")):
            yield file.stem, json.loads(file.read_bytes())["stats"]

    def wait_for_progress(self, timeout: float) -> list[str]:
        """Wait until every worker has had an answer since now.

        Returns:
            The workers that had none.
        """
        before = {worker.number: worker.progress() for worker in self.workers}
        deadline = time.monotonic() + timeout
        waiting = list(self.workers)
        while waiting and time.monotonic() < deadline:
            time.sleep(0.02)
            waiting = [worker for worker in waiting if worker.progress() <= before[worker.number]]
        return [worker.name for worker in waiting]
