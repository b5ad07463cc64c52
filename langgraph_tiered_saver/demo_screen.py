"""What `langgraph-tiered demo` shows: on a terminal with moving bars, elsewhere in plain lines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from langgraph_tiered_saver.demo_agent import Seen, counted

Show = Callable[..., None]

_LARGEST_SHOWN = 3


@dataclass(frozen=True)
class Claim:
    """Something the demo says of itself, and whether it is true.

    Attributes:
        text: The claim.
        holds: Whether the check came out true.
        detail: What the check saw.
    """

    text: str
    holds: bool
    detail: str


@dataclass
class Outcome:
    """What came of the demo.

    Attributes:
        claims: What was checked.
        figures: What was measured; each name ends with its unit, or is a count.
        report: What the agent wrote, in Markdown.
        thread_id: The agent's thread.
        seconds: How long all of it took, servers included.
        kept: Where the data lies, if it was kept.
    """

    claims: Sequence[Claim]
    figures: Mapping[str, float]
    report: str
    thread_id: str
    seconds: float = 0.0
    kept: Path | None = None

    @property
    def failed(self) -> list[Claim]:
        """The claims that are not true."""
        return [claim for claim in self.claims if not claim.holds]

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return {
            "ok": not self.failed,
            "claims": [asdict(claim) for claim in self.claims],
            "figures": {name: round(value, 3) for name, value in self.figures.items()},
            "thread_id": self.thread_id,
            "report": self.report,
            "seconds": round(self.seconds, 2),
            "kept": str(self.kept) if self.kept else None,
        }


class Screen:
    """Shows the demo as it goes on a console, whatever that is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        utf8 = console.encoding.lower().startswith("utf")
        self._good, self._bad = ("✓", "✗") if utf8 else ("ok", "FAILED")

    def title(self, files: str) -> None:
        """Say what will happen."""
        self._console.print("[bold]langgraph-tiered demo[/]")
        self._console.print(
            f"An agent reports on {escape(files)}, is killed with SIGKILL half way, and is resumed by another "
            "process. A deterministic planner stands in for the model, so no API key is needed; the LangGraph graph, "
            "its tools, the two servers, the processes and the kill are real.\n"
        )

    def servers(self, seconds: float, home: Path) -> None:
        """Say that the servers run."""
        self._line("servers", f"Valkey and PostgreSQL, started in {seconds:.1f} s in {home}")

    @contextlib.contextmanager
    def progress(self, name: str, calls: int) -> Iterator[Show]:
        """Show an agent's progress.

        Yields:
            A function that takes the number of results so far, the step, and `killed=True` at a sudden end.
        """
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield self._plain_progress(name, calls)
            return
        bar = BarColumn(bar_width=None)
        columns = (
            TextColumn(f"  [bold]{name:<11}[/]"),
            bar,
            TextColumn("{task.completed}/{task.total} tool calls"),
            TextColumn("step {task.fields[step]}"),
        )
        with Progress(*columns, console=self._console, expand=True) as progress:
            task = progress.add_task("", total=calls, step=0)

            def show(done: int, step: int, *, killed: bool = False) -> None:
                if killed:
                    bar.complete_style = "red"
                progress.update(task, completed=done, step=step, refresh=killed)

            yield show

    def _plain_progress(self, name: str, calls: int) -> Show:
        shown = -1

        def show(done: int, step: int, *, killed: bool = False) -> None:
            nonlocal shown
            quarter = 4 * done // calls
            if quarter > shown or killed:
                shown = quarter
                self._line(name, f"{done} of {calls} tool calls, step {step}")

        return show

    def killed(self, held: Mapping[str, Any] | None, seen: Seen, journal: int) -> None:
        """Say where the first agent was killed, and what another process sees of it."""
        call = held or {}
        number = str(call.get("call", "")).rpartition("-")[2]
        self._line(
            "SIGKILL",
            f"in the middle of step {call.get('step')}, where it was held: tool call {number} has run "
            f"({call.get('what')}), and its result is not acknowledged yet",
            style="bold red",
        )
        self._line(
            "seen now",
            f"by another process: the checkpoint of step {seen.step} and {counted(seen.on_top, 'result')} on top of "
            f"it, {len(seen.results)} in all; {counted(journal, 'record')} not in PostgreSQL yet",
        )

    def checking(self) -> None:
        """Say that the checks begin."""
        self._console.print("\n[bold]Checked[/]")

    def outcome(self, outcome: Outcome) -> None:
        """Show the claims, the report, the figures and what to try next."""
        grid = Table.grid(padding=(0, 1, 0, 0))
        for claim in outcome.claims:
            mark, style = (self._good, "green") if claim.holds else (self._bad, "bold red")
            grid.add_row(f"[{style}]{mark}[/]", f"{escape(claim.text)} [dim]({escape(claim.detail)})[/]")
        self._indented(grid)
        self._console.print("\n[bold]The agent's report[/]")
        self._report(outcome.report)
        self._console.print()
        self._console.print(_table(outcome.figures))
        self._console.print("\n[bold]The next thing to try[/]")
        self._next(outcome)
        if outcome.failed:
            does = "claim does" if len(outcome.failed) == 1 else "claims do"
            self._console.print(f"\n[bold red]{len(outcome.failed)} {does} not hold:[/]")
            for claim in outcome.failed:
                self._console.print(f"  {escape(claim.text)} ({escape(claim.detail)})")

    def _report(self, report: str) -> None:
        lines = report.splitlines()
        rows = [line.strip("|").split("|") for line in lines[4:]]
        biggest = sorted(rows, key=lambda row: -int(row[-5]))[:_LARGEST_SHOWN]
        self._indented(escape(lines[0]))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for row in biggest:
            about = row[-1].strip()
            grid.add_row(
                f"{int(row[-5]):,} lines", escape("|".join(row[:-5]).strip() + (f": {about}" if about else ""))
            )
        self._indented(grid)

    def _next(self, outcome: Outcome) -> None:
        self._line("your agent", "graph = builder.compile(checkpointer=TieredSaver.local())")
        self._line("", "or, with servers of your own, TieredSaver.from_conn_string(redis_url, postgres_url)")
        self._line("notebook", "notebooks/01_quickstart.ipynb")
        self._line("README.md", "what each failure can cost, coming from PostgresSaver, settings")
        if outcome.kept:
            self._line("this run", f"TieredSaver.local({str(outcome.kept)!r}) opens thread {outcome.thread_id!r} again")
        else:
            self._line("your files", "langgraph-tiered demo --keep --directory YOUR_PROJECT")
        self._console.print(f"\nDone in {outcome.seconds:.1f} s; the servers are stopped.")

    def _line(self, head: str, text: str, *, style: str = "bold") -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=10)
        grid.add_column(overflow="fold")
        grid.add_row(f"[{style}]{head}[/]", escape(text))
        self._indented(grid)

    def _indented(self, what: RenderableType) -> None:
        self._console.print(Padding(what, (0, 0, 0, 2), expand=False))


def _table(figures: Mapping[str, float]) -> Table:
    state = f"{figures['messages']} messages, {figures['message_bytes'] / 1024:.0f} KiB"
    parsing = f"{figures['deserialization_median_ms']:.1f} ms of it to deserialize them"
    again = f"the {figures['repeated_in_flight_calls']} tool call in flight at the kill ran again"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  Measured", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("how", style="dim")
    for name, value, how in (
        ("steps", f"{figures['steps']}", f"checkpoints acknowledged; {figures['tool_calls']} tool calls"),
        ("hot read, median", _ms(figures["hot_read_median_ms"]), f"the final state: {state}, {parsing}"),
        ("hot write, median", _ms(figures["hot_write_median_ms"]), "put, serializing included, in the busy agents"),
        ("cold read, median", _ms(figures["cold_read_median_ms"]), "the versions just before it, from PostgreSQL"),
        ("flush lag, median", _ms(figures["flush_lag_median_ms"]),
         f"PostgreSQL behind Redis, at each checkpoint; at most {figures['flush_lag_max_ms']:.0f} ms"),
        ("versions in PostgreSQL", f"{figures['versions_in_postgresql']}", "counted by PostgresSaver"),
        ("redone steps", f"{figures['redone_steps']}", again),
    ):  # fmt: skip
        table.add_row("  " + name, value, how)
    return table


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms"
