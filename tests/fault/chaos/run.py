"""One run: a workload, faults, peace, and a verdict."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph_tiered_saver import TieredSaver, TieredSaverError, errors
from langgraph_tiered_saver.worker import adopt_all
from tests.fault.chaos.audit import read_audit
from tests.fault.chaos.faults import inject
from tests.fault.chaos.operations import read_log
from tests.fault.chaos.oracle import (
    INCOMPLETE,
    LOST,
    RAISED,
    RESURRECTED,
    STALE,
    Judge,
    Outage,
    Partition,
    Problem,
    Verdict,
)
from tests.fault.chaos.schedule import KINDS, Step, schedule
from tests.fault.chaos.system import ROOT, SETTINGS, Load, System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# What a reader may miss of a process that cannot reach Redis: the poll interval, and the time one poll takes.
LATE_SECONDS = 1.5
_RECOVERY_SECONDS = 6.0  # a process may take so long to notice that a tier is well again: a pause, and a time-out
_UNFLUSHED_SECONDS = 10.0  # what was acknowledged so long before a process was stopped may not be flushed
_SETTLE_SECONDS = 40.0
_PROGRESS_SECONDS = 40.0
_CLOSE_SECONDS = 60.0
_DRAINS = 5
_TYPED = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"CancelledError"}
HEADLINES = (LOST, STALE, RESURRECTED, INCOMPLETE, RAISED)


@dataclass
class Result:
    """What a run gave.

    Attributes:
        load: What the workers did; the seed is in it.
        minutes: How long faults were injected.
        directory: Where the logs are, if they were kept.
        verdict: The oracle's.
        faults: How often each kind was injected.
        threads: How many threads of graphs there were.
        seconds: How long all of it took.
    """

    load: Load
    minutes: float
    directory: Path
    verdict: Verdict = field(default_factory=Verdict)
    faults: Counter[str] = field(default_factory=Counter)
    threads: int = 0
    seconds: float = 0.0

    @property
    def problems(self) -> Counter[str]:
        """How many problems there are of each kind; the four that matter most are always there."""
        found = Counter(problem.kind for problem in self.verdict.problems)
        return Counter({name: found.get(name, 0) for name in (*HEADLINES, *sorted(found))})

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return not self.verdict.problems

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        counts = self.verdict.counts
        return {
            "ok": self.ok,
            "seed": self.load.seed,
            "minutes": round(self.minutes, 2),
            "workers": self.load.workers,
            "seconds": round(self.seconds, 1),
            "threads": self.threads,
            "operations": counts["operations"],
            "acknowledged": {
                "checkpoints": counts["put acknowledged"],
                "writes": counts["writes acknowledged"],
                "deletes": counts["delete acknowledged"],
                "reads": counts["get acknowledged"] + counts["list acknowledged"],
            },
            "faults": dict(sorted(self.faults.items())),
            "errors": dict(self.verdict.errors.most_common()),
            "late_reads_of_a_partition": self.verdict.late,
            **self.problems,
            "problems": [problem.as_json() for problem in self.verdict.problems[:200]],
            "directory": None if self.ok else str(self.directory),
        }


class Run:
    """A run under way.

    Attributes:
        result: What is known so far.
        doing: What happens now, for who looks on.
    """

    def __init__(
        self,
        load: Load,
        seconds: float,
        *,
        scale: float = 1.0,
        kinds: Sequence[str] = tuple(KINDS),
        keep: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a run.

        Args:
            load: What the workers do, with the seed.
            seconds: How long to inject faults.
            scale: What the schedule's times are multiplied by.
            kinds: The kinds of faults to choose from.
            keep: Keep the logs though everything held.
            tell: Is told each step and what comes of it.
        """
        self.load, self.seconds, self.keep, self.tell = load, seconds, keep, tell
        self._steps = schedule(load.seed, load.workers, scale=scale, kinds=kinds)
        self.doing = "starting"
        self.began = time.monotonic()
        self.result = Result(load, seconds / 60, Path(tempfile.mkdtemp(prefix="tiered-chaos-")))
        self._partitions: list[Partition] = []
        self._outages: list[Outage] = []
        self._worker_killed = 0.0  # seconds of the time of day
        self._redis_hit = 0.0  # seconds of monotonic time

    @property
    def directory(self) -> Path:
        """Where everything of the run is."""
        return self.result.directory

    def perform(self) -> Result:
        """Do all of it."""
        try:
            with System(self.directory, self.load) as system:
                self._work(system)
                self._finish(system)
                found = self._audit(system)
            self.doing = "judging"
            self._judge(found)
        except KeyboardInterrupt:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        except Exception:
            self.tell(f"The run itself failed while {self.doing}; logs and schedule: {self.directory}")
            raise
        finally:
            self._keep_logs_only()
        self.result.seconds = time.monotonic() - self.began
        (self.directory / "result.json").write_text(json.dumps(self.result.as_json(), indent=1))
        if self.result.ok and not self.keep:
            shutil.rmtree(self.directory)
        return self.result

    def _keep_logs_only(self) -> None:
        servers = self.directory / "servers"
        for log in servers.glob("*/*.log"):
            log.replace(self.directory / f"{log.parent.name}.log")
        shutil.rmtree(servers, ignore_errors=True)

    def _problem(self, kind: str, detail: str) -> None:
        self.tell(f"{kind}: {detail}")
        self.result.verdict.problems.append(Problem(kind, "", detail, time.monotonic_ns()))

    # --- the faults --------------------------------------------------------------------------------------------------

    def _work(self, system: System) -> None:
        with TieredSaver.from_conn_string(system.redis.url, system.postgres.url, **SETTINGS) as saver:
            saver.setup()
        system.postgres.raise_in_writes("", 0)  # makes what it needs while nobody writes
        system.start_workers()
        deadline = time.monotonic() + self.seconds
        with (self.directory / "schedule.jsonl").open("w") as file:
            for number, step in enumerate(self._steps):
                if time.monotonic() >= deadline:
                    break
                self._wait_until_safe(system, step)
                began = time.monotonic_ns()
                self.doing = " around ".join(_describe(fault) for fault in step.faults)
                self.tell(f"{time.monotonic() - self.began:6.1f} s  {self.doing}")
                self._perform(system, step)
                line = {"step": number, "began": began, "ended": time.monotonic_ns()}
                file.write(json.dumps({**line, "faults": [fault.as_json() for fault in step.faults]}) + "\n")
                file.flush()
                self.doing = "peace"
                time.sleep(step.peace)
                for name in system.wait_for_progress(_PROGRESS_SECONDS):
                    self._problem("stuck", f"{name} had no answer within {_PROGRESS_SECONDS:g} s after {line}")

    def _perform(self, system: System, step: Step) -> None:
        began = time.monotonic_ns()
        hit = [
            frozenset() if fault.worker is None else frozenset({system.workers[fault.worker].name})
            for fault in step.faults
        ]
        with ExitStack() as stack:
            for fault in step.faults:
                self.result.faults[fault.kind] += 1
                stack.enter_context(inject(system, fault))
            time.sleep(max(fault.seconds for fault in step.faults))
        noticed = time.monotonic_ns() + int(_RECOVERY_SECONDS * 1e9)
        for fault, names in zip(step.faults, hit, strict=True):
            # To a worker that was stopped, both tiers seem to have been.
            tiers = ("redis", "postgres") if fault.takes == "stopped worker" else (fault.takes,)
            self._outages += [Outage(tier, began, noticed) for tier in tiers]
            if fault.takes in ("worker", "ended worker"):
                self._worker_killed = time.time()
            elif fault.takes == "redis":
                self._redis_hit = time.monotonic()
                if names:
                    self._partitions.append(Partition(began, noticed, names))
            elif names and any(other.takes == "redis" for other in step.faults):
                # It was stopped, or cut off from PostgreSQL, so that it could not bring there what was not flushed,
                # while nobody could rely on Redis. Nothing of it may be lost, but nobody waits for it long.
                self._partitions.append(Partition(began - int(_UNFLUSHED_SECONDS * 1e9), noticed, names, noticed))

    def _wait_until_safe(self, system: System, step: Step) -> None:
        """Wait until the step takes nothing that was left in one place only, by a fault before it."""
        self.doing = "waiting until the next fault takes nothing that is in one place only"
        takes = {fault.takes for fault in step.faults}
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            # A killed worker's records are in Redis only, until somebody has adopted them.
            safe = "redis" not in takes or system.oldest_journaled() > self._worker_killed
            # What Redis may have lost is in the workers' memory only, until they have flushed it.
            if safe and (not takes & {"worker", "ended worker"} or system.oldest_held() > self._redis_hit):
                return
            time.sleep(0.05)
        self._problem("stuck", f"records of before a fault were not in PostgreSQL after {_SETTLE_SECONDS:g} s")

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, system: System) -> None:
        """Let the workers close, and bring everything that is left to PostgreSQL."""
        self.doing = "letting the workers finish"
        for worker in system.workers:
            worker.ask_to_end()
        for worker in system.workers:
            worker.end(_CLOSE_SECONDS)
        for text in system.complaints:
            self._problem("crashed", text)
        for name, stats in system.last_words():
            if count := stats.get("lost_records"):
                self._problem(LOST, f"{name} counted {count} records as lost")
        self.doing = "draining"
        try:
            self._drain(system)
        except TieredSaverError as error:
            self._problem("stuck", f"draining failed: {type(error).__name__}: {error}")

    def _drain(self, system: System) -> None:
        settings = {**SETTINGS, "sweep_interval": 0.0, "flush_timeout": 30.0}
        with TieredSaver.from_conn_string(system.redis.url, system.postgres.url, **settings) as saver:
            for _ in range(_DRAINS):
                status = adopt_all(saver, lambda *_: None)
                if not status.unflushed_threads:
                    break
            else:
                self._problem("stuck", f"{status.unflushed_threads} threads have unflushed records after draining")
            for name in status.quarantined_threads:
                self._problem("quarantined", name)

    def _audit(self, system: System) -> Path:
        self.doing = "reading what is stored"
        output = self.directory / "found.jsonl"
        options = {
            "redis_url": system.redis.url,
            "postgres_url": system.postgres.url,
            "settings": {**SETTINGS, "sweep_interval": 0.0},
            "operations": str(self.directory / "operations"),
            "output": str(output),
        }
        with (self.directory / "audit.log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "tests.fault.chaos.audit", json.dumps(options)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            self._problem(
                "crashed", f"the audit ended with exit code {done.returncode}; see {self.directory}/audit.log"
            )
        return output

    def _judge(self, found: Path) -> None:
        verdict = self.result.verdict
        seen = 0
        for thread_id, stored in read_audit(found) if found.exists() else ():
            entries = read_log(self.directory / "operations" / f"{thread_id}.jsonl")
            judge = Judge(thread_id, entries, self._partitions, int(LATE_SECONDS * 1e9), self._outages)
            verdict.add(judge.judge(stored))
            seen += 1
        self.result.threads = len(list((self.directory / "operations").glob("*.jsonl")))
        if seen != self.result.threads:
            self._problem("crashed", f"only {seen} of {self.result.threads} threads were audited")
        for name, count in verdict.errors.items():
            if name.split()[1] not in _TYPED:
                self._problem("untyped", f"{count} calls raised {name}")
        for log in sorted((self.directory / "workers").glob("*.log")):
            if "Traceback" in log.read_text(errors="replace"):
                self._problem("reported", f"{log} holds a traceback")
        verdict.problems += _reported(sorted((self.directory / "problems").glob("*.jsonl")))


def _reported(files: Iterable[Path]) -> list[Problem]:
    """Read what workers reported: exceptions that are not of ours, and states that contradict themselves."""
    return [
        Problem("reported", entry["thread"], f"{file.stem}: {entry['text']}", entry["at"])
        for file in files
        for entry in map(json.loads, file.read_text().splitlines())
    ]


def _describe(fault: Any) -> str:
    parts = [fault.kind.replace("_", " ")]
    if fault.worker is not None:
        parts.append(f"(worker {fault.worker})")
    if fault.seconds:
        parts.append(f"for {fault.seconds:.1f} s")
    return " ".join(parts)
