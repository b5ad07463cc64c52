"""`langgraph-tiered storage`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from langgraph_tiered_saver.cli.common import (
    EXIT_CODES,
    FAILED,
    DebugOption,
    JsonOption,
    PostgresOption,
    PrefixOption,
    RedisOption,
    SchemaOption,
    fail,
    open_saver,
    reporting,
)

if TYPE_CHECKING:
    from langgraph_tiered_saver.conversion import Converted
    from langgraph_tiered_saver.saver import TieredSaver


class To(str, Enum):
    """What can be converted to."""

    COMPACT = "compact"
    STANDARD = "standard"


storage = typer.Typer(
    name="storage",
    help=(
        "See how PostgreSQL stores values, and convert what is stored.\n\n"
        'With `storage="standard"` every value is stored whole, in PostgresSaver\'s own tables. With '
        '`storage="compact"` a value that grew is stored as what it adds to the one before it. Plain PostgresSaver '
        "on the tables would then leave such channels out, without a word: give it the schema of the views instead "
        "(`show` names it), as its `search_path`.\n\n"
        "What a saver writes follows its own setting; every saver reads both."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@storage.command(epilog=EXIT_CODES)
def show(
    context: typer.Context,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell how values are stored, how many each way, and what they take. Reads every row's length."""
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as (saver, _):
        from langgraph_tiered_saver.conversion import show as look

        state = look(saver)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(state)))
        return
    typer.echo(f"Storage: {state.storage}. {state.whole_values} values are stored whole, {state.deltas} as deltas.")
    typer.echo(f"Whole values take {_size(state.whole_disk_bytes)}, deltas {_size(state.delta_disk_bytes)}.")
    if state.deltas:
        typer.echo(f"The deltas' {_size(state.delta_bytes)} make values of {_size(state.made_bytes)}.")
    if state.views is not None:
        typer.echo(f"Whole values for PostgresSaver and SQL are in the views of schema {state.views!r}.")
    if state.storage == "compact":
        typer.echo("There may be deltas: do not let plain PostgresSaver use the tables themselves.")


@storage.command(epilog=EXIT_CODES)
def convert(
    context: typer.Context,
    to: Annotated[To, typer.Option("--to", help="What to convert to.", show_choices=True)],
    threads: Annotated[list[str] | None, typer.Argument(metavar="THREAD", help="Default: all threads")] = None,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Store the values that are there in the other way, thread by thread, while graphs run.

    Each transaction is small and leaves every value readable. Killed at any moment, it goes on when it is run again.
    Set LANGGRAPH_TIERED_STORAGE, or `storage=`, for what savers write from now on; do that first.

    The room of rows that were replaced is used again after autovacuum, and given back to the file system only by
    VACUUM FULL checkpoint_blobs, or tiered_deltas, which locks the table.

    The exit code is 1 if a value cannot be rebuilt; it stays as it is, and `langgraph-tiered verify` names it.
    """
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as (saver, console):
        from langgraph_tiered_saver.conversion import convert as run

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("threads", total=None)

            def report(done: Converted, of: int) -> None:
                progress.update(task, completed=done.threads, total=of, description=f"{done.versions} values; threads")

            done = run(saver, to.value, threads or None, progress=report)
    if as_json:
        typer.echo(json.dumps({"to": to.value, **done.as_json()}))
    else:
        typer.echo(
            f"{done.threads} threads: {done.versions} values are stored {_way(to)} now, in {_size(done.bytes_after)} "
            f"instead of {_size(done.bytes_before)} before compression."
        )
        if done.standard:
            typer.echo("There are no deltas any more: plain PostgresSaver may use the tables.")
        elif to is To.STANDARD and not threads and not done.damaged:
            typer.echo("There are deltas still, or again: a saver with storage='compact' writes.")
    if done.damaged:
        fail(f"{done.damaged} values cannot be rebuilt and stay deltas. See `langgraph-tiered verify`.", FAILED)


@contextlib.contextmanager
def _saver(
    context: typer.Context, debug: bool, redis_url: str, postgres_url: str, key_prefix: str | None, schema: str | None
) -> Iterator[tuple[TieredSaver, Console]]:
    console = Console(stderr=True, highlight=False)
    with reporting(console, debug or context.obj, redis_url, postgres_url):
        # A wrong URL must not set anything up; what is written is nobody's record.
        wanted = {"sweep_interval": 0.0, "auto_setup": False, "storage": "standard"}
        with open_saver(redis_url, postgres_url, key_prefix=key_prefix, postgres_schema=schema, **wanted) as saver:
            yield saver, console


def _way(to: To) -> str:
    return "as deltas" if to is To.COMPACT else "whole"


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
