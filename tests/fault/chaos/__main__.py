"""`python -m tests.fault.chaos`: run the chaos suite and say what came of it."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fault.chaos.run import HEADLINES, Result, Run
from tests.fault.chaos.schedule import KINDS, matching
from tests.fault.chaos.system import Load

_SHOWN = 20
console = Console(soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def show(result: Result) -> None:
    """Print a result."""
    found = result.as_json()
    table = Table(title=f"Chaos, seed {result.load.seed}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("faults injected for", f"{result.minutes:.1f} min, {result.seconds:.0f} s in all")
    table.add_row("workers, threads", f"{result.load.workers}, {result.threads}")
    table.add_row("operations", f"{found['operations']:,}")
    for name, count in found["acknowledged"].items():
        table.add_row(f"acknowledged {name}", f"{count:,}")
    table.add_row("faults", _listed(found["faults"]))
    table.add_row("errors raised", _listed(found["errors"]))
    table.add_row("late reads, allowed", str(result.verdict.late))
    for name, count in result.problems.items():
        style = "bold red" if count else "green"
        table.add_row(name, f"[{style}]{count}[/{style}]")
    console.print(table)
    for problem in result.verdict.problems[:_SHOWN]:
        console.print(f"{problem.kind}: {problem.thread_id} {problem.detail}", style="red", markup=False)
    if len(result.verdict.problems) > _SHOWN:
        console.print(f"... and {len(result.verdict.problems) - _SHOWN} more")
    if not result.ok:
        console.print(f"Logs, schedule and result: {result.directory}", markup=False)


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long to inject faults.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Replays a schedule; random if not given.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many processes run graphs.")] = 3,
    drivers: Annotated[int, typer.Option(min=1, help="How many threads or tasks each has.")] = 3,
    slots: Annotated[int, typer.Option(min=1, help="How many threads of graphs live at a time.")] = 15,
    scale: Annotated[float, typer.Option(help="What the schedule's times are multiplied by.")] = 1.0,
    only: Annotated[list[str] | None, typer.Option(help="Only kinds of faults that match, 'postgres_*' say.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the logs though everything held.")] = False,
) -> None:
    """Run graphs in several processes while servers, processes and connections fail, and compare.

    The exit code is 0 if nothing acknowledged was lost, nothing deleted came back, and no read was stale.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = Load(random.SystemRandom().randrange(10**6) if seed is None else seed, workers, drivers, slots)
    kinds = matching(only or ())
    if not kinds:
        raise typer.BadParameter(f"no kind of fault matches; there are {', '.join(KINDS)}", param_hint="--only")
    console.print(f"seed {load.seed}", highlight=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=minutes * 60)
        run = Run(
            load,
            minutes * 60,
            scale=scale,
            kinds=kinds,
            keep=keep,
            tell=lambda text: progress.console.print(text, markup=False),
        )
        done = threading.Event()

        def look_on() -> None:
            while not done.wait(0.2):
                elapsed = min(minutes * 60, time.monotonic() - run.began)
                progress.update(task, completed=elapsed, description=run.doing)

        watcher = threading.Thread(target=look_on, daemon=True)
        watcher.start()
        try:
            result = run.perform()
        finally:
            done.set()
            watcher.join()
    show(result)
    if file is not None:
        file.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    headline = ", ".join(f"{name} {result.problems[name]}" for name in HEADLINES)
    console.print(f"{'passed' if result.ok else 'FAILED'}: seed {load.seed}, {headline}", highlight=False)
    raise typer.Exit(0 if result.ok else 1)


if __name__ == "__main__":
    app()
