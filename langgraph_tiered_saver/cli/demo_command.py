"""`langgraph-tiered demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from langgraph_tiered_saver.cli.common import FAILED, DebugOption, JsonOption, reporting


def demo(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The files that the agent reports on. Default: the installed langgraph package.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Where the servers keep their data, and the ledger and the report are written. "
            "Default: a temporary directory, removed at the end.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Kill an agent in mid-step and resume it, on servers of its own, in seconds.

    A LangGraph tool-calling agent reports on real files. Half way it is killed with SIGKILL, in the middle of a tool
    call; another process resumes it by its thread_id. Every claim that is printed was checked in this run: no finished
    step was redone, nothing was lost, PostgreSQL has every version. It ends with what was measured.

    No API key is needed: a deterministic planner stands in for the model. All else is real, the embedded Valkey and
    PostgreSQL of the extra `embedded` included.
    """
    console = Console(stderr=as_json, highlight=False)
    with reporting(console, debug or context.obj):
        from langgraph_tiered_saver.demo import run
        from langgraph_tiered_saver.demo_screen import Screen

        screen = Screen(console)
        outcome = run(directory, data, keep=keep, screen=screen)
        screen.outcome(outcome)
        if as_json:
            typer.echo(json.dumps(outcome.as_json(), ensure_ascii=False, indent=2))
        if outcome.failed:
            raise typer.Exit(FAILED)
