"""The `langgraph-tiered` command."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from langgraph_tiered_saver.config import ENVIRONMENT_PREFIX, TieredConfig
from langgraph_tiered_saver.errors import (
    BacklogFullError,
    ColdTierRejectedError,
    ConfigurationError,
    EmbeddedServerError,
    FlushTimeoutError,
    HotTierRejectedError,
    InvalidInputError,
    TieredSaverError,
    TierUnavailableError,
)
from langgraph_tiered_saver.redaction import redact
from langgraph_tiered_saver.saver import TieredSaver

FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130

_EXIT_CODES = (
    "**Exit codes**: 0 it is done; 1 a claim or a check failed; 2 the command line or a setting cannot be used; "
    "3 a tier is unavailable, or did not take everything in time; 130 interrupted by Ctrl-C."
)
_ERROR_CODES: tuple[tuple[tuple[type[TieredSaverError], ...], int], ...] = (
    ((ConfigurationError, InvalidInputError), USAGE),
    (
        (
            TierUnavailableError,
            EmbeddedServerError,
            FlushTimeoutError,
            BacklogFullError,
            HotTierRejectedError,
            ColdTierRejectedError,
        ),
        UNAVAILABLE,
    ),
)
_DEFAULTS = TieredConfig()
_REDIS_VARIABLES = [ENVIRONMENT_PREFIX + "REDIS_URL", "REDIS_URL"]
_POSTGRES_VARIABLES = [ENVIRONMENT_PREFIX + "POSTGRES_URL", "DATABASE_URL"]

app = typer.Typer(
    name="langgraph-tiered",
    help=(
        "LangGraph checkpoints on two tiers: Redis answers, PostgreSQL keeps every version.\n\n"
        "New here? `langgraph-tiered demo` needs nothing but this package: no key, no server, no set-up."
    ),
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what is logged.")]


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


@app.command(epilog=_EXIT_CODES)
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
    with _reporting(console, debug or context.obj):
        from langgraph_tiered_saver.demo import run
        from langgraph_tiered_saver.demo_screen import Screen

        screen = Screen(console)
        outcome = run(directory, data, keep=keep, screen=screen)
        screen.outcome(outcome)
        if as_json:
            typer.echo(json.dumps(outcome.as_json(), ensure_ascii=False, indent=2))
        if outcome.failed:
            raise typer.Exit(FAILED)


@app.command(epilog=_EXIT_CODES)
def worker(
    context: typer.Context,
    redis_url: Annotated[
        str,
        typer.Option(
            envvar=_REDIS_VARIABLES,
            help="redis://, rediss:// or unix://. Better set by the environment: others can read a command line.",
        ),
    ] = "",
    postgres_url: Annotated[
        str,
        typer.Option(
            envvar=_POSTGRES_VARIABLES,
            help="postgresql://user:password@host:port/database, or any libpq connection string.",
        ),
    ] = "",
    key_prefix: Annotated[
        str | None,
        typer.Option(help=f"First part of every Redis key. Default: {_DEFAULTS.key_prefix}"),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(help="PostgreSQL schema of the tables. Default: the connection's own"),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            help=f"Seconds between two looks for orphans. Default: {_DEFAULTS.sweep_interval:g}",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Age in seconds at which an unflushed record counts as an orphan. "
            f"Default: {_DEFAULTS.orphan_grace:g}",
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
            help=f"With --once: seconds to wait for PostgreSQL. Default: {_DEFAULTS.flush_timeout:g}",
        ),
    ] = None,
    status_interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two status lines.")] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary, and each status, as a line of JSON on standard output.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Bring to PostgreSQL what processes that are gone left in the journal.

    Every saver does this beside its work; a worker does it when none runs, or so that none has to. Any number of
    workers may run. SIGTERM and Ctrl-C let it finish what is under way, and it exits with 0. What it does is logged
    on standard error, one line for each change.

    Any other setting comes from the environment, LANGGRAPH_TIERED_POSTGRES_POOL_SIZE=4 say.
    """
    console = Console(stderr=True, highlight=False)
    with _reporting(console, debug or context.obj, redis_url, postgres_url, level=logging.INFO):
        wanted = {"key_prefix": key_prefix, "postgres_schema": schema, "sweep_interval": interval,
                  "orphan_grace": grace, "flush_timeout": timeout}  # fmt: skip
        if once:
            wanted["sweep_interval"] = 0.0
        saver = _saver(redis_url, postgres_url, **wanted)
        if not once and saver.config.sweep_interval == 0:
            raise ConfigurationError("A worker that never looks does nothing: set --interval to more than 0 seconds.")
        if once:
            _work_once(saver, console, as_json=as_json)
        else:
            _work(saver, console, status_interval, as_json=as_json)


def _work_once(saver: TieredSaver, console: Console, *, as_json: bool) -> None:
    from langgraph_tiered_saver.worker import adopt_all

    with saver, Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("threads", total=None)
        summary = adopt_all(saver, lambda done, of: progress.update(task, completed=done, total=of))
    if as_json:
        typer.echo(json.dumps(summary.as_json()))
    else:
        typer.echo(f"Done in {summary.seconds:.1f} s: {summary}.")
    if summary.quarantined_threads:
        _fail(f"PostgreSQL refused records of {', '.join(map(repr, summary.quarantined_threads))} for good.", FAILED)


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


def _saver(redis_url: str, postgres_url: str, **wanted: Any) -> TieredSaver:
    """Make a saver from options, which win, and the environment."""
    for server, url, variables, option in (
        ("Redis", redis_url, _REDIS_VARIABLES, "--redis-url"),
        ("PostgreSQL", postgres_url, _POSTGRES_VARIABLES, "--postgres-url"),
    ):
        if not url:
            raise ConfigurationError(f"No URL for {server}: set {' or '.join(variables)}, or pass {option}.")
    settings = {name: value for name, value in wanted.items() if value is not None}
    return TieredSaver.from_conn_string(redis_url, postgres_url, **{**TieredConfig.settings_from_env(), **settings})


@contextlib.contextmanager
def _reporting(console: Console, debug: bool, *urls: str, level: int = logging.WARNING) -> Iterator[None]:
    """Log to the console, and turn the library's errors into one line and an exit code.

    Args:
        console: Where to log.
        debug: Let errors through, with their tracebacks, and log everything.
        *urls: URLs whose passwords must not be shown.
        level: Least severe messages of this library to log.
    """
    handler = _ConsoleHandler(console, " ".join(urls))
    root, ours, pool = (
        logging.getLogger(),
        logging.getLogger("langgraph_tiered_saver"),
        logging.getLogger("psycopg.pool"),
    )
    usual = ours.level, pool.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG if debug else level)
    # It logs each of its attempts; our own lines say when a tier goes away and when it is back.
    pool.setLevel(logging.WARNING if debug else logging.CRITICAL)
    try:
        yield
    except KeyboardInterrupt:
        _fail("Interrupted; everything it started is stopped.", INTERRUPTED)
    except TieredSaverError as error:
        if debug:
            raise
        code = next((code for kinds, code in _ERROR_CODES if isinstance(error, kinds)), FAILED)
        _fail(redact(str(error), secrets_in=" ".join(urls)), code)
    finally:
        root.removeHandler(handler)
        ours.setLevel(usual[0])
        pool.setLevel(usual[1])


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(
        f"langgraph-tiered: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    raise typer.Exit(code)


class _ConsoleHandler(logging.Handler):
    """Writes log lines above whatever moves on a console, without passwords."""

    def __init__(self, console: Console, secrets: str) -> None:
        super().__init__()
        self._console = console
        self._secrets = secrets
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        text = redact(self.format(record), secrets_in=self._secrets)
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; the entry point of `langgraph-tiered`."""
    app(prog_name="langgraph-tiered")


if __name__ == "__main__":
    main()
