"""`langgraph-tiered worker`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from langgraph_tiered_saver.cli.common import (
    DEFAULTS,
    FAILED,
    DebugOption,
    PostgresOption,
    PrefixOption,
    RedisOption,
    SchemaOption,
    fail,
    open_saver,
    reporting,
)
from langgraph_tiered_saver.config import parse_seconds
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.retention_policy import PassResult, is_set
from langgraph_tiered_saver.saver import TieredSaver


def _seconds(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number of seconds, nor one with s, m, h or d behind it.") from None
    if not seconds > 0:
        raise typer.BadParameter("it must be more than 0.")
    return seconds


def worker(
    context: typer.Context,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    interval: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            help=f"Seconds between two looks for orphans. Default: {DEFAULTS.sweep_interval:g}",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"Age in seconds at which an unflushed record counts as an orphan. Default: {DEFAULTS.orphan_grace:g}",
        ),
    ] = None,
    once: Annotated[
        bool,
        typer.Option("--once", help="Adopt everything that is unflushed now, whatever its age, then exit."),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"With --once: seconds to wait for PostgreSQL. Default: {DEFAULTS.flush_timeout:g}",
        ),
    ] = None,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, help="Retention: leave so many of the newest checkpoints of each namespace. Default: all"),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            parser=_seconds,
            metavar="DURATION",
            help="Retention: remove older checkpoints, except the latest of each namespace. Default: never",
        ),
    ] = None,
    delete_idle: Annotated[
        float | None,
        typer.Option(
            parser=_seconds,
            metavar="DURATION",
            help="Retention: delete threads whose newest checkpoint is older. Default: never",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what retention would remove, remove nothing, and exit.")
    ] = False,
    status_interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two status lines.")] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary, and each status, as a line of JSON on standard output.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Bring to PostgreSQL what processes that are gone left in the journal, and remove what is too old.

    Every saver does this beside its work; a worker does it when none runs, or so that none has to. Any number of
    workers may run. SIGTERM and Ctrl-C let it finish what is under way, and it exits with 0. What it does is logged
    on standard error, one line for each change.

    Retention is off unless one of its options is given. Then one worker at a time makes a pass over all threads, once
    in LANGGRAPH_TIERED_RETENTION_INTERVAL seconds (3600), or once with --once. It leaves what a thread needs to go on:
    the latest checkpoint of each namespace and what that is rebuilt from. A DURATION is a number of seconds, or one
    that ends in m, h or d: 90m, 12h, 30d.

    Any other setting comes from the environment, LANGGRAPH_TIERED_POSTGRES_POOL_SIZE=4 say.
    """
    console = Console(stderr=True, highlight=False)
    with reporting(console, debug or context.obj, redis_url, postgres_url, level=logging.INFO):
        wanted = {"key_prefix": key_prefix, "postgres_schema": schema, "sweep_interval": interval,
                  "orphan_grace": grace, "flush_timeout": timeout, "retention_keep_last": keep_last,
                  "retention_max_age": max_age, "retention_delete_idle": delete_idle}  # fmt: skip
        if once or dry_run:
            wanted["sweep_interval"] = 0.0
        saver = open_saver(redis_url, postgres_url, **wanted)
        if dry_run and not is_set(saver.config):
            raise ConfigurationError("There is nothing to count: pass --keep-last, --max-age or --delete-idle.")
        if not (once or dry_run) and saver.config.sweep_interval == 0:
            raise ConfigurationError("A worker that never looks does nothing: set --interval to more than 0 seconds.")
        if dry_run:
            _count(saver, console, as_json=as_json)
        elif once:
            _work_once(saver, console, as_json=as_json)
        else:
            _work(saver, console, status_interval, as_json=as_json)


def _count(saver: TieredSaver, console: Console, *, as_json: bool) -> None:
    with saver, _progress(console) as progress:
        result = _retain(saver, progress, dry_run=True)
    if as_json:
        typer.echo(json.dumps({"retention": result and result.as_json()}))
    else:
        typer.echo(f"Retention would remove {result}.")


def _work_once(saver: TieredSaver, console: Console, *, as_json: bool) -> None:
    from langgraph_tiered_saver.worker import adopt_all

    with saver, _progress(console) as progress:
        task = progress.add_task("adopting", total=None)
        summary = adopt_all(saver, lambda done, of: progress.update(task, completed=done, total=of))
        retaining = is_set(saver.config)
        result = _retain(saver, progress, dry_run=False) if retaining else None
    if result is not None:
        summary = dataclasses.replace(
            summary, removed_checkpoints=result.checkpoints, deleted_threads=result.deleted_threads
        )
    if as_json:
        retention = {"retention": result and result.as_json()} if retaining else {}
        typer.echo(json.dumps({**summary.as_json(), **retention}))
    else:
        typer.echo(f"Done in {summary.seconds:.1f} s: {summary}.")
        if retaining:
            typer.echo(f"Retention removed {result}." if result else "Another worker applies the retention policy.")
    if summary.quarantined_threads:
        fail(f"PostgreSQL refused records of {', '.join(map(repr, summary.quarantined_threads))} for good.", FAILED)


def _progress(console: Console) -> Progress:
    return Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), console=console,
                    transient=True, disable=not console.is_terminal)  # fmt: skip


def _retain(saver: TieredSaver, progress: Progress, *, dry_run: bool) -> PassResult | None:
    from langgraph_tiered_saver.worker import retain_all

    task = progress.add_task("retention", total=None)

    def show(result: PassResult) -> None:
        progress.update(task, completed=result.threads, description=f"retention: {result.checkpoints} checkpoints")

    return retain_all(saver, show, dry_run=dry_run)


def _work(saver: TieredSaver, console: Console, status_interval: float, *, as_json: bool) -> None:
    from langgraph_tiered_saver.worker import Status, StopSignal, serve

    with contextlib.ExitStack() as stack:
        stack.callback(saver.close)
        stop = stack.enter_context(StopSignal())
        log = logging.getLogger("langgraph_tiered_saver.worker")
        report: Callable[[Status], None]
        if as_json:
            report = _print_status
        elif console.is_terminal:
            line = stack.enter_context(console.status("The worker runs. Ctrl-C stops it."))
            status_interval = min(status_interval, 1.0)

            def report(status: Status) -> None:
                line.update(f"{status.seconds:.0f} s: {status}. Ctrl-C stops it.")
        else:

            def report(status: Status) -> None:
                log.info("Status: %s", status)

        final = serve(saver, stop, status_interval, report)
        if as_json:
            _print_status(final)


def _print_status(status: Any) -> None:
    typer.echo(json.dumps(status.as_json()))
