"""`langgraph-tiered demo`: an agent is killed with SIGKILL in mid-step, resumed by another process, and checked.

Everything is real but the model, for which a deterministic planner stands in: the graph, its tools and files, the
two servers, the processes, the kill. Each claim that is printed was checked in this run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import langgraph.graph
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_tiered_saver import demo_agent
from langgraph_tiered_saver.config import ENVIRONMENT_PREFIX
from langgraph_tiered_saver.demo_agent import Seen, counted
from langgraph_tiered_saver.demo_screen import Claim, Outcome, Screen
from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.errors import ConfigurationError, TieredSaverError
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.saver import TieredSaver

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_FILES = 200
_AGENT_SECONDS = 120.0  # until an agent that does not end by itself is killed
_HOT_READS, _COLD_READS = 100, 20


class DemoError(TieredSaverError):
    """An agent's process did something else than the demo asked of it."""


class Agent:
    """An agent's process, and what it has told so far.

    Attributes:
        steps: Steps in which it did something.
        checkpoints: Checkpoints that were acknowledged to it: their ids and steps, oldest first.
        results: Tool calls whose results were acknowledged to it.
        holding: What it is in the middle of, if it waits to be killed there.
        final: What it told at its end.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.steps: set[int] = set()
        self.checkpoints: dict[str, int] = {}
        self.results: set[str] = set()
        self.holding: dict[str, Any] | None = None
        self.began: dict[str, Any] = {}
        self.final: dict[str, Any] = {}
        self.write_seconds: list[float] = []
        self.lags: list[float] = []
        self._side_by_side: set[str] = set()
        self._log = log
        with log.open("wb") as errors:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the agent.
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment, cwd=log.parent, start_new_session=True,
            )  # fmt: skip
        self._watchdog = threading.Timer(_AGENT_SECONDS, self.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.communicate()

    def listen(self) -> Iterator[None]:
        """Take in what the agent tells, until it ends."""
        assert self.process.stdout is not None  # noqa: S101 - a pipe
        for line in self.process.stdout:
            if line.endswith("\n"):
                self._take(json.loads(line))
                yield

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "began":
            self.began = event
        elif kind == "planned":
            self._side_by_side = set(event["calls"])
            self.steps.add(event["step"])
        elif kind == "executed":
            self.steps.add(event["step"])
        elif kind == "results":
            self.results.update(event["calls"])
        elif kind == "holding":
            self.holding = event
        elif kind == "checkpoint":
            self.checkpoints[event["id"]] = event["step"]
            self.write_seconds.append(event["seconds"])
            self.lags.append(event["lag"])
        elif kind == "finished":
            self.final = event

    def is_in_mid_step(self) -> bool:
        """Whether it is in the middle of a tool call, with all else of that step and before acknowledged."""
        if self.holding is None:
            return False
        beside = self._side_by_side - {self.holding["call"]}
        return beside <= self.results and self.holding["step"] - 1 in self.checkpoints.values()

    def failure(self, what: str) -> DemoError:
        """The error that says what happened and how its log ends."""
        self.process.wait()
        end = self._log.read_text("utf-8", errors="replace").splitlines()[-12:]
        return DemoError("\n".join([f"{self.name} {what} (exit status {self.process.returncode}).", *end]))


def run(directory: Path | None, data: Path | None, *, keep: bool, screen: Screen) -> Outcome:
    """Run the demo; everything it started is stopped when it returns or raises.

    Args:
        directory: The files that the agent reports on; the installed langgraph package if None.
        data: Where the servers keep their data; a temporary directory if None.
        keep: Keep the temporary directory.
        screen: Shows what happens.

    Raises:
        ConfigurationError: a directory cannot be used, or the extra `embedded` is not installed.
        EmbeddedServerError: a server did not start.
        DemoError: an agent failed, or did not get as far as it should.
    """
    began = time.perf_counter()
    package = Path(langgraph.graph.__file__).parents[1]
    root = (directory or package).expanduser().resolve()
    names = demo_agent.find_files(root, _MOST_FILES)
    if not names:
        raise ConfigurationError(f"{root} holds no text files to report on; name another --directory.")
    if data and data.expanduser().resolve().is_relative_to(root):
        raise ConfigurationError(f"--data {data} lies among the files to report on, and changes; name another place.")
    files = counted(len(names), "file")
    where = f"of the installed {root.name} package" if directory is None else f"in {root}"
    screen.title(f"{'the first ' if len(names) == _MOST_FILES else ''}{files} {where}")
    with _interruptible() as defer_interrupts, _home(data, keep=keep) as home, EmbeddedServers.start(home) as servers:
        work = home / "demo" / f"demo-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)
        # No sweep: this process only looks. Who adopts what the first agent leaves is the second one.
        with TieredSaver.from_conn_string(servers.redis_url, servers.postgres_url, sweep_interval=0) as saver:
            saver.setup()
            screen.servers(time.perf_counter() - began, home)
            outcome = _Demo(root, work, servers, saver, screen, len(names)).run()
        (work / "report.md").write_text(outcome.report + "\n", "utf-8")
        defer_interrupts()
    outcome.seconds = time.perf_counter() - began
    outcome.kept = home if keep or data else None
    return outcome


class _Demo:
    def __init__(
        self, root: Path, work: Path, servers: EmbeddedServers, saver: TieredSaver, screen: Screen, files: int
    ) -> None:
        self.root, self.work, self.servers, self.saver, self.screen = root, work, servers, saver, screen
        self.thread, self.ledger = work.name, work / "ledger.jsonl"
        self.config: RunnableConfig = {"configurable": {"thread_id": self.thread}}
        self.calls, self.hold = demo_agent.calls_for(files), demo_agent.middle_call(files)

    def run(self) -> Outcome:
        with self._agent("agent 1", "--hold", self.hold) as first, self.screen.progress(first.name, self.calls) as show:
            for _ in first.listen():
                show(len(first.results), max(first.steps, default=0))
                if first.is_in_mid_step():
                    break
            else:
                raise first.failure("ended before it could be killed")
            first.process.kill()
            for _ in first.listen():  # what it told before it died
                pass
            first.process.wait()
            show(len(first.results), max(first.steps), killed=True)
        seen = Seen.of(self.saver.get_tuple(self.config))
        self.screen.killed(first.holding, seen, self._journal_records())
        with self._agent("agent 2") as second, self.screen.progress(second.name, self.calls) as show:
            show(len(first.results), seen.step)
            for _ in second.listen():
                show(len(first.results | second.results), max(second.steps, default=seen.step))
            if not second.final:
                raise second.failure("did not finish")
        return self._check(first, second, seen)

    def _agent(self, name: str, *arguments: str) -> Agent:
        command = [sys.executable, "-m", demo_agent.__name__, "--directory", str(self.root), "--most",
                   str(_MOST_FILES), "--thread", self.thread, "--ledger", str(self.ledger), *arguments]  # fmt: skip
        # By the environment, because everybody may read a process's arguments and the URL holds a password.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
        environment |= {
            ENVIRONMENT_PREFIX + "REDIS_URL": self.servers.redis_url,
            ENVIRONMENT_PREFIX + "POSTGRES_URL": self.servers.postgres_url,
            "LANGSMITH_TRACING": "false",
            "LANGCHAIN_TRACING_V2": "false",
        }
        return Agent(name, command, environment, self.work / f"{name.replace(' ', '-')}.log")

    def _journal_records(self) -> int:
        runtime = self.saver._source.current()  # noqa: SLF001 - no public call tells
        return int(tier.run(runtime.client, runtime.calls.journal(self.thread, 0, 0, None))[0])

    def _check(self, first: Agent, second: Agent, seen: Seen) -> Outcome:
        self.screen.checking()
        with PostgresSaver.from_conn_string(self.servers.postgres_url) as plain:
            cold, versions = plain.get_tuple(self.config), _ids(plain.list(self.config))
        left = self._journal_records()
        hot, history = self.saver.get_tuple(self.config), _ids(self.saver.list(self.config))
        if hot is None or cold is None:
            raise second.failure("left no checkpoint")
        report = str(cold.checkpoint["channel_values"]["messages"][-1].content)
        figures, genuine = self._measure(hot, history[1:])

        before, after = (self._executed_by(agent) for agent in (first, second))
        everything = {demo_agent.call_name(number) for number in range(1, self.calls + 1)}
        in_flight = {first.holding["call"]} if first.holding else set()
        again = set(before) & set(after)
        redone = first.results & set(after)
        redone_steps = {step for step in second.steps if step <= seen.step}
        went_on = min(second.steps, default=-1)
        acknowledged = {*first.checkpoints, *second.checkpoints}
        adopted = second.final["adopted_records"]
        lost = second.final["lost_records"] + self.saver.stats().lost_records
        claims = [
            Claim(
                f"Agent 1 was ended by SIGKILL in the middle of step {seen.step + 1}",
                first.process.returncode == -signal.SIGKILL and not in_flight & first.results,
                f"return code {first.process.returncode}",
            ),
            Claim(
                "Another process saw every acknowledged step and result at once",
                # Checkpoint ids sort by time.
                seen.checkpoint_id == max(first.checkpoints) and seen.results == first.results,
                f"{counted(len(first.checkpoints), 'checkpoint')}, {counted(len(first.results), 'result')}",
            ),
            Claim(
                f"Agent 2 went on at step {seen.step + 1}, the one after the last acknowledged",
                bool(second.began.get("resumed")) and went_on == seen.step + 1,
                f"its first step was {went_on}",
            ),
            Claim(
                "No finished step was redone, and no acknowledged tool call ran twice",
                not redone_steps and not redone and again <= in_flight and {*before, *after} == everything
                and set(before.values()) | set(after.values()) == {1},
                f"{len(redone_steps)} and {len(redone)}; the {len(again)} in flight at the kill ran again",
            ),
            Claim(
                "The report equals one computed directly, without the agent",
                report == demo_agent.report_directly(self.root, _MOST_FILES),
                f"{len(report)} characters",
            ),
            Claim(
                "A plain PostgresSaver reads the same final state",
                (hot.config, hot.checkpoint, hot.metadata, hot.parent_config)
                == (cold.config, cold.checkpoint, cold.metadata, cold.parent_config),
                counted(figures["messages"], "message"),
            ),
            Claim(
                "PostgreSQL has every acknowledged version, and so has the history",
                set(versions) == acknowledged and history == versions,
                f"{len(acknowledged)} acknowledged, {len(versions)} in PostgreSQL, {len(history)} in the history",
            ),
            Claim("Nothing was lost, and nothing is left in the journal", not lost and not left,
                  f"agent 2 brought {counted(adopted, 'record')} of agent 1 to PostgreSQL"),
            Claim("The reads below were answered by the tiers they name", genuine, "by the saver's own counters"),
        ]  # fmt: skip
        lags = [*first.lags, *second.lags]
        figures |= {
            "steps": len(acknowledged),
            "tool_calls": self.calls,
            "hot_write_median_ms": 1e3 * statistics.median([*first.write_seconds, *second.write_seconds]),
            "flush_lag_median_ms": 1e3 * statistics.median(lags),
            "flush_lag_max_ms": 1e3 * max(lags),
            "versions_in_postgresql": len(versions),
            "redone_steps": len(redone_steps),
            "redone_tool_calls": len(redone),
            "adopted_records": adopted,
            "lost_records": lost,
            "repeated_in_flight_calls": len(again),
        }
        return Outcome(claims, figures, report, self.thread)

    def _executed_by(self, agent: Agent) -> Counter[str]:
        """Count a process's executions of each tool call, by the ledger of side effects."""
        entries = map(json.loads, self.ledger.read_text("utf-8").splitlines())
        return Counter(entry["call"] for entry in entries if entry["pid"] == agent.process.pid)

    def _measure(self, hot: CheckpointTuple, older: Sequence[str]) -> tuple[dict[str, float], bool]:
        """Time reads of the final state from Redis, and of the versions just before it from PostgreSQL.

        Returns:
            The figures, and whether each read was answered by the tier it was meant for.
        """
        addresses: list[RunnableConfig] = [
            {"configurable": {"thread_id": self.thread, "checkpoint_ns": "", "checkpoint_id": id}}
            for id in older[:_COLD_READS]
        ]
        messages = self.saver.serde.dumps_typed(hot.checkpoint["channel_values"]["messages"])
        start = self.saver.stats()
        hot_seconds, parsing = [], []
        for _ in range(_HOT_READS):
            hot_seconds.append(_seconds(self.saver.get_tuple, self.config))
            parsing.append(_seconds(self.saver.serde.loads_typed, messages))
        middle = self.saver.stats()
        cold_seconds = [_seconds(self.saver.get_tuple, address) for address in addresses]
        end = self.saver.stats()
        genuine = middle.hot_hits - start.hot_hits == _HOT_READS and middle.cold_reads == start.cold_reads
        genuine = genuine and end.cold_reads - middle.cold_reads == len(addresses) and end.hot_hits == middle.hot_hits
        return {
            "messages": len(hot.checkpoint["channel_values"]["messages"]),
            "message_bytes": len(messages[1]),
            "hot_read_median_ms": 1e3 * statistics.median(hot_seconds),
            "cold_read_median_ms": 1e3 * statistics.median(cold_seconds),
            "deserialization_median_ms": 1e3 * statistics.median(parsing),
        }, genuine


def _ids(found: Iterable[CheckpointTuple]) -> list[str]:
    return [version.checkpoint["id"] for version in found]


def _seconds(work: Callable[[Any], object], argument: Any) -> float:
    began = time.perf_counter()
    work(argument)
    return time.perf_counter() - began


@contextlib.contextmanager
def _home(data: Path | None, *, keep: bool) -> Iterator[Path]:
    """Give the servers' directory, and remove it afterwards if it is temporary."""
    home = (data or Path(tempfile.mkdtemp(prefix="langgraph-tiered-demo-"))).expanduser().absolute()
    try:
        yield home
    finally:
        if data is None and not keep:
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: once, so that nothing interrupts the cleaning up.

    Yields:
        A function from whose call on nothing interrupts any more.
    """
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if threading.current_thread() is not threading.main_thread():
        usual = {}  # only the main thread may change them

    def ignore() -> None:
        for number in usual:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(*_: object) -> None:
        ignore()
        raise KeyboardInterrupt

    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield ignore
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
