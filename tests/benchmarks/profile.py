"""Where each microsecond of a `put` goes.

    python -m tests.benchmarks.profile [--steps 400] [--messages 20] [--json FILE]

The parts are timed inside real calls, by wrappers around the functions that make them up, whatever their arguments; a
part's time is its own, without that of the parts within it. The same steps are also stored while the flusher is held
up, while nothing is wrapped, and by the floor.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from rich import box
from rich.console import Console
from rich.table import Table

from langgraph_tiered_saver import TieredSaver, backlog, codec, operations, stats
from langgraph_tiered_saver.hot import tier
from tests.benchmarks.calls import FloorCaller, SaverCaller
from tests.benchmarks.contestants import database_of, tiered
from tests.benchmarks.flushing import paused_flusher
from tests.benchmarks.stage import Stage, open_stage
from tests.benchmarks.workload import USUAL_MESSAGES, Conversation, Step

# What a put is made of: a description, and where the function is that callers use. A part that is not there any more is
# shown as missing, and its time is in what surrounds it.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("serializer (dumps_typed)", JsonPlusSerializer, "dumps_typed"),
    ("encode_checkpoint: JSON, checks", codec, "encode_checkpoint"),
    ("records.encode: framing", operations, "encode"),
    ("HotCalls.put: keys and arguments", tier.HotCalls, "put"),
    ("tier.run: redis-py and the round trip", tier, "run"),
    ("Backlog.add", backlog.Backlog, "add"),
    ("counters", stats.Counters, "add"),
)
_ROUND = 25
_REST = "the rest: generators, driver, TieredSaver.put"


@dataclass
class Clock:
    """Times nested parts; each one's own time only."""

    own: dict[str, list[float]] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)
    _now: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                inner = self._inner.pop()
                self._now[name] = self._now.get(name, 0.0) + took - inner
                if self._inner:
                    self._inner[-1] += took

        return timed

    def lap(self, total: float) -> None:
        """End a call that took so many seconds in all."""
        for name, took in {**self._now, _REST: total - sum(self._now.values())}.items():
            self.own.setdefault(name, []).append(took)
        self._now.clear()


@contextmanager
def _wrapped(clock: Clock) -> Iterator[None]:
    found = [(name, owner, attribute, getattr(owner, attribute, None)) for name, owner, attribute in PARTS]
    try:
        for name, owner, attribute, function in found:
            if function is not None:
                setattr(owner, attribute, clock.wrap(name, function))
        yield
    finally:
        for _, owner, attribute, function in found:
            if function is not None:
                setattr(owner, attribute, function)


class Profile:
    """Measures, in rounds that take turns."""

    def __init__(self, stage: Stage, saver: TieredSaver, client: Any, messages: int) -> None:
        self._stage, self._saver, self._client = stage, saver, client
        self._first = max(1, messages - _ROUND // 2)
        self._messages = stage.writer.messages(self._first + _ROUND + 1)
        self._ours, self._floor = SaverCaller(saver), FloorCaller(client)
        self._serde = JsonPlusSerializer()
        self.clock = Clock()
        self.times: dict[str, list[float]] = {}
        self.server: dict[str, list[float]] = {}

    def _steps(self) -> tuple[Step, list[Step]]:
        conversation = Conversation(self._messages, self._first)
        return conversation.step(), conversation.steps(_ROUND)

    def _round(self, caller: SaverCaller | FloorCaller, name: str) -> None:
        first, steps = self._steps()
        caller.begin(first)
        self._client.config_resetstat()
        self.times.setdefault(name, []).extend(caller.put(step) for step in steps)
        calls = self._client.info("commandstats")
        scripts = [calls[key] for key in ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_fcall") if key in calls]
        if name != "TieredSaver":  # the flusher's scripts would be among them
            self.server.setdefault(name, []).append(sum(s["usec"] for s in scripts) / max(1, len(steps)) / 1e6)

    def _profiled(self) -> None:
        first, steps = self._steps()
        self._ours.begin(first)
        with _wrapped(self.clock):
            for step in steps:
                self.clock.lap(self._ours.put(step))

    def _serializer(self) -> None:
        for step in self._steps()[1]:
            started = time.perf_counter()
            self._serde.dumps_typed(step.messages)
            self.times.setdefault("serializer", []).append(time.perf_counter() - started)

    def run(self, rounds: int) -> None:
        """Measure so many rounds of each kind."""
        database = database_of(self._saver)
        with self._stage.bar("profiling put", rounds) as bar:
            for _ in range(rounds):
                self._round(self._ours, "TieredSaver")
                self._saver.flush()
                with paused_flusher(database):
                    self._round(self._ours, "flusher held up")
                    self._profiled()
                self._saver.flush()
                self._round(self._floor, "floor")
                self._serializer()
                bar.advance()

    def rows(self) -> list[tuple[str, float]]:
        """Give each figure with its name, in seconds."""
        medians = {name: statistics.median(found) for name, found in self.times.items()}
        parts = {name: statistics.median(found) for name, found in self.clock.own.items()}
        rows = [("put", medians["TieredSaver"])]
        rows += [("  the flusher's share", medians["TieredSaver"] - medians["flusher held up"])]
        rows += [("  put while the flusher is held up", medians["flusher held up"])]
        names = [name for name, _, _ in PARTS] + [_REST]
        rows += [(f"    {name}", parts.get(name, float("nan"))) for name in names]
        rows += [("    (difference to the call without timers)", medians["flusher held up"] - sum(parts.values()))]
        rows += [("floor", medians["floor"]), ("    serializer", medians["serializer"])]
        rows += [("    one raw script call", medians["floor"] - medians["serializer"])]
        server = {name: statistics.median(found) for name, found in self.server.items()}
        rows += [("inside Redis: our script", server["flusher held up"])]
        rows += [("inside Redis: the floor's script", server["floor"])]
        return rows


def main(
    steps: Annotated[int, typer.Option(help="Puts of each kind.")] = 400,
    messages: Annotated[int, typer.Option(min=1, help="Messages in the state, on average.")] = USUAL_MESSAGES,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, in seconds.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the messages' text.")] = 1,
) -> None:
    """Show where each microsecond of a put goes: every part of it, the flusher's share, and the floor beside it."""
    with open_stage(Console(stderr=True), quick=False, seed=seed) as stage, ExitStack() as stack:
        saver = tiered(stage, stack)
        client = stack.enter_context(redis.Redis.from_url(stage.urls.redis, protocol=2))
        profile = Profile(stage, saver, client, messages)
        profile.run(max(1, steps // _ROUND))
    rows = profile.rows()
    whole = rows[0][1]
    table = Table(title=f"A put of {messages} messages", box=box.SIMPLE_HEAD, caption="medians")
    for name in ("part", "µs", "of the put"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, seconds in rows:
        cells = (f"{seconds * 1e6:,.1f}", f"{seconds / whole:.0%}") if seconds == seconds else ("not found", "")
        table.add_row(name, *cells)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({name.strip(): seconds for name, seconds in rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
