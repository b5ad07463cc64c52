"""The benchmark suite: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.benchmarks import calls, flushing, graphs, growth, loops, plot
from tests.benchmarks.contestants import absentees
from tests.benchmarks.report import Outcome, as_json, show
from tests.benchmarks.stage import about, open_stage

BENCHMARKS = {
    "calls": (calls.run, "put, put_writes and get_tuple of the latest, sync and async, against the floor"),
    "graph": (graphs.run_graph, 'whole runs of a 100-step graph, durability="sync" and "async"'),
    "concurrent": (graphs.run_concurrent, "64 graphs at once in one event loop, steps per second"),
    "network": (graphs.run_network, "the 100-step graph with 0.5 ms to Redis and 5 ms to PostgreSQL"),
    "flush": (flushing.run_flush, "flush throughput of 1 KB states, and the lag at half of that load"),
    "cold": (flushing.run_cold, "get_tuple of old versions and list of 100, on the same database"),
    "long": (growth.run_long, "put less the serializer's own time, at 2,000 messages against 20"),
    "traffic": (growth.run_traffic, "bytes to Redis per step at 2,000 messages"),
    "size": (growth.run_size, "PostgreSQL after a 400-step conversation of growing messages"),
    "lanes": (loops.run_lanes, "calls of an event loop that share a connection, and calls that do not"),
    "loop": (loops.run_loop, "how long an event loop stands still while a long conversation is stored and read"),
}

_HELP = (
    "Measure TieredSaver beside its peers, in one run on embedded servers, and judge the project's targets.\n\n"
    "Everybody stores the same steps with the same serializer on connections of the same kind. They take turns in "
    "short rounds, in an order drawn by lot, so that a slow minute of the machine hits all; figures are medians, and "
    "what counts are their ratios. The floor is the serializer's own work plus one raw script call with the same bytes "
    "(put), or one raw HGETALL plus the serializer's own loading (get).\n\n"
    "**Benchmarks** (all of them take about ten minutes on two cores):\n\n"
    + "\n".join(f"- `{name}`: {text}" for name, (_, text) in BENCHMARKS.items())
    + "\n\nBeside it: `python -m tests.benchmarks.profile` (where each microsecond of a put goes) and "
    "`python -m tests.benchmarks.soak` (whether memory stays flat for an hour)."
)

_QUIET = 0.9
_WIDTH = 130  # of tables that no terminal shows

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=_HELP)
def main(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Run this benchmark; can be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small rounds, to see that everything works; the figures mean little.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file, in seconds, bytes and 1/s.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the picture for the README to this file (.png or .svg).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides the messages' text and whose turn is next.")] = 1,
) -> None:
    """Run the benchmarks."""
    errors = Console(stderr=True)
    if unknown := sorted(set(only or ()) - set(BENCHMARKS)):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}", param_hint="--only")
    if plot_file is not None:
        try:
            plot.check()
        except plot.PlotUnavailableError as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from None
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    described, outcome = about(), Outcome(notes=list(absentees().values()))
    if quick:
        outcome.notes.append("--quick: a few small rounds; these figures mean little.")
    with open_stage(errors, quick=quick, seed=seed) as stage:
        for name in only or BENCHMARKS:
            with stage.clean():
                outcome.add(BENCHMARKS[name][0](stage))
        outcome.notes += stage.notes
        described |= {"share_of_a_core": stage.share, "load_average_after": os.getloadavg()[0]}
        if stage.share < _QUIET:
            outcome.notes.append(
                f"A busy thread got {stage.share:.0%} of a core: the machine did other things meanwhile, which costs "
                "those most who wait for other processes. Ratios of a quieter run are better ones."
            )
    output = Console()
    show(outcome, output if output.is_terminal else Console(width=_WIDTH))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(outcome, {**described, "quick": quick, "seed": seed}), indent=1) + "\n")
    if plot_file is not None:
        caption = f"Python {described['python']}, {described['cpus']} cores, servers on the same machine"
        try:
            plot.draw(outcome, plot_file, caption)
        except plot.PlotUnavailableError as error:
            errors.print(str(error), style="red", markup=False)
            raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
