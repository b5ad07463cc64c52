"""`langgraph-tiered quarantine`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from langgraph_tiered_saver.errors import StaleWriterError, ThreadQuarantinedError

if TYPE_CHECKING:
    from langgraph_tiered_saver.cold.quarantine import QuarantinedRecord
    from langgraph_tiered_saver.saver import TieredSaver

quarantine = typer.Typer(
    name="quarantine",
    help=(
        "See, retry or drop what PostgreSQL refused for good.\n\n"
        "When PostgreSQL refuses a record because of what is in it (a CHECK constraint, a limit of the server), "
        "and would do so for ever, the record's thread is quarantined: the record and all later ones of the "
        "thread are kept in a table as they are, and every other thread goes on. As long as Redis holds the thread it "
        "goes on too; what only PostgreSQL could answer raises ThreadQuarantinedError.\n\n"
        "Remove the reason, then `retry`. Or `drop`: the thread is then where PostgreSQL has it. Deleting the thread "
        "ends its quarantine as well.\n\n"
        "No command shows a value of a graph's state."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

ThreadArgument = Annotated[str, typer.Argument(metavar="THREAD", help="The thread's id.")]


@quarantine.command("list", epilog=EXIT_CODES)
def list_threads(
    context: typer.Context,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the quarantined threads: how much waits, since when, and why. The oldest case comes first."""
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as saver:
        found = saver.quarantined()
        if as_json:
            columns = ("thread_id", "records", "bytes", "since", "reason")
            _print_json([{name: _plain(getattr(thread, name)) for name in columns} for thread in found])
        elif not found:
            typer.echo("No thread is quarantined.")
        else:
            table = _table("Thread", "Records", "Bytes", "Since", "Reason")
            for thread in found:
                _add(table, thread.thread_id, thread.records, thread.bytes, thread.since, thread.reason)
            Console().print(table)


@quarantine.command(epilog=EXIT_CODES)
def show(
    context: typer.Context,
    thread: ThreadArgument,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List what waits of a thread, in order: kind, checkpoint, time, size, and why it was refused; never its values.

    What the thread's journal still holds joins it first.
    """
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as saver:
        records = saver.quarantined_records(thread)
        if not records:
            _not_quarantined(thread)
        if as_json:
            _print_json({"thread_id": thread, "records": _as_json(records)})
            return
        table = _table("Sequence", "Acknowledged", "Kind", "Namespace", "Checkpoint", "Bytes", "Reason")
        for record in records:
            position = record.checkpoint_ns, record.checkpoint_id
            reason = record.reason or "waits for an earlier one"
            _add(table, record.sequence, record.acknowledged, record.kind, *position, record.size, reason)
        Console().print(table)


@quarantine.command(epilog=EXIT_CODES)
def retry(
    context: typer.Context,
    thread: ThreadArgument,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write what waits of a thread to PostgreSQL, all of it in one transaction, and end its quarantine.

    If PostgreSQL refuses again nothing is changed, the reason is printed, and the exit code is 1.
    """
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as saver:
        try:
            written = saver.retry_quarantined(thread)
        except ThreadQuarantinedError as error:
            if as_json:
                _print_json({"thread_id": thread, "written": 0, "refused": str(error)})
            fail(str(error), FAILED)
        if not written:
            _not_quarantined(thread)
        if as_json:
            _print_json({"thread_id": thread, "written": written, "refused": None})
        else:
            typer.echo(f"{written} records of thread {thread!r} are in PostgreSQL now. Its quarantine has ended.")


@quarantine.command(epilog=EXIT_CODES)
def drop(
    context: typer.Context,
    thread: ThreadArgument,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove what waits of a thread for good: the thread is then where PostgreSQL has it.

    Stop runs that work on the thread first; what they add until then is lost too. What was lost is printed. Asks
    before it does anything, unless --yes is given or nobody sits at a terminal.
    """
    with _saver(context, debug, redis_url, postgres_url, key_prefix, schema) as saver:
        if sys.stdin.isatty() and not yes:
            records = saver.quarantined_records(thread)
            if records:
                typer.confirm(f"{_summary(records)} of thread {thread!r} will be lost. Go on?", abort=True, err=True)
        try:
            lost = saver.drop_quarantined(thread)
        except StaleWriterError as error:
            fail(str(error), FAILED)
        if not lost:
            _not_quarantined(thread)
        if as_json:
            _print_json({"thread_id": thread, "dropped": _as_json(lost)})
        else:
            typer.echo(f"Dropped of thread {thread!r}: {_summary(lost)}. It is where PostgreSQL has it.")


@contextlib.contextmanager
def _saver(
    context: typer.Context, debug: bool, redis_url: str, postgres_url: str, key_prefix: str | None, schema: str | None
) -> Iterator[TieredSaver]:
    with reporting(Console(stderr=True, highlight=False), debug or context.obj, redis_url, postgres_url):
        # A wrong URL must not set anything up.
        settings: dict[str, Any] = {"sweep_interval": 0.0, "auto_setup": False}
        with open_saver(redis_url, postgres_url, key_prefix=key_prefix, postgres_schema=schema, **settings) as saver:
            yield saver


def _not_quarantined(thread: str) -> None:
    fail(f"Thread {thread!r} is not quarantined.", FAILED)


def _summary(records: Sequence[QuarantinedRecord]) -> str:
    kinds = Counter(record.kind for record in records)
    size = sum(record.size for record in records)
    return f"{len(records)} records ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}; {size} bytes)"


def _as_json(records: Sequence[QuarantinedRecord]) -> list[dict[str, Any]]:
    columns = ("sequence", "acknowledged", "kind", "checkpoint_ns", "checkpoint_id", "size", "since", "reason")
    return [{name: _plain(getattr(record, name)) for name in columns} for record in records]


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


def _print_json(what: object) -> None:
    typer.echo(json.dumps(what, ensure_ascii=False))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        number = column in ("Records", "Bytes")
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _add(table: Table, *cells: object) -> None:
    texts = [f"{cell:%Y-%m-%d %H:%M:%S}Z" if isinstance(cell, datetime) else str(cell) for cell in cells]
    # A thread's id may look like markup.
    table.add_row(*map(Text, texts))
