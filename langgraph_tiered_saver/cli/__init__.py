"""The `langgraph-tiered` command."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from langgraph_tiered_saver.cli.common import (
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    UNAVAILABLE,
    USAGE,
    DebugOption,
    JsonOption,
)
from langgraph_tiered_saver.cli.demo_command import demo
from langgraph_tiered_saver.cli.quarantine_command import quarantine
from langgraph_tiered_saver.cli.storage_command import storage
from langgraph_tiered_saver.cli.verify_command import verify
from langgraph_tiered_saver.cli.worker_command import worker

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "UNAVAILABLE",
    "USAGE",
    "DebugOption",
    "JsonOption",
    "app",
    "demo",
    "main",
    "quarantine",
    "storage",
    "verify",
    "worker",
]

app = typer.Typer(
    name="langgraph-tiered",
    help=(
        "LangGraph checkpoints on two tiers: Redis answers, PostgreSQL keeps every version.\n\n"
        "New here? `langgraph-tiered demo` needs nothing but this package: no key, no server, no set-up."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"langgraph-tiered {importlib.metadata.version('langgraph-tiered-saver')}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: DebugOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj = debug


for command in (demo, worker, verify):
    app.command(epilog=EXIT_CODES)(command)
app.add_typer(quarantine)
app.add_typer(storage)


def main() -> None:
    """Run the command; the entry point of `langgraph-tiered`."""
    app(prog_name="langgraph-tiered")
