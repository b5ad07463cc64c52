"""`langgraph-tiered verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from langgraph_tiered_saver.cli.common import (
    FAILED,
    DebugOption,
    PostgresOption,
    PrefixOption,
    RedisOption,
    SchemaOption,
    open_saver,
    reporting,
)

if TYPE_CHECKING:
    from langgraph_tiered_saver.verify import Problem


def verify(
    context: typer.Context,
    threads: Annotated[list[str] | None, typer.Argument(metavar="THREAD", help="Default: all threads")] = None,
    redis_url: RedisOption = "",
    postgres_url: PostgresOption = "",
    key_prefix: PrefixOption = None,
    schema: SchemaOption = None,
    notes: Annotated[bool, typer.Option("--notes", help="Show what is worth knowing though nothing is wrong.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each problem, and a summary, as a line of JSON on standard output.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Compare the tiers and list what is wrong, without changing anything.

    Checks that every blob which a checkpoint references exists, that those which are stored as deltas can be rebuilt,
    and that every parent exists that was not pruned; the journals' order; what is hot against what is in PostgreSQL;
    deletions; how far each thread is durable; and the quarantine.
    Safe while graphs run: what looks wrong is looked at again. The exit code is 1 if something is wrong.
    """
    console = Console(stderr=True, highlight=False)
    with reporting(console, debug or context.obj, redis_url, postgres_url):
        from langgraph_tiered_saver.verify import check

        found = {True: 0, False: 0}
        looked_at = 0
        saver = open_saver(redis_url, postgres_url, key_prefix=key_prefix, postgres_schema=schema, sweep_interval=0.0)
        with saver, Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("threads", total=None)

            def show(done: int, of: int) -> None:
                nonlocal looked_at
                looked_at = done
                progress.update(task, completed=done, total=of)

            for problem in check(saver, threads or None, notes=notes, progress=show):
                found[problem.is_note] += 1
                _print(problem, as_json=as_json)
        if as_json:
            typer.echo(json.dumps({"threads": looked_at, "problems": found[False], "notes": found[True]}))
        else:
            typer.echo(f"{looked_at} threads: {found[False] or 'no'} problems.")
        if found[False]:
            raise typer.Exit(FAILED)


def _print(problem: Problem, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(problem.as_json(), ensure_ascii=False))
        return
    where = [f"thread {problem.thread_id!r}"]
    if problem.checkpoint_id:
        where.append(f"namespace {problem.checkpoint_ns!r}, checkpoint {problem.checkpoint_id}")
    kind = "Note" if problem.is_note else "Problem"
    typer.echo(f"{kind} ({problem.kind}) in {', '.join(where)}: {problem.what}.\n    What to do: {problem.advice}.")
