"""What the commands share: options, exit codes, and how errors and the log are shown."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

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

EXIT_CODES = (
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
DEFAULTS = TieredConfig()
_REDIS_VARIABLES = [ENVIRONMENT_PREFIX + "REDIS_URL", "REDIS_URL"]
_POSTGRES_VARIABLES = [ENVIRONMENT_PREFIX + "POSTGRES_URL", "DATABASE_URL"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what is logged.")]


RedisOption = Annotated[
    str,
    typer.Option(
        "--redis-url",
        envvar=_REDIS_VARIABLES,
        help="redis://, rediss:// or unix://. Better set by the environment: others can read a command line.",
    ),
]
PostgresOption = Annotated[
    str,
    typer.Option(
        "--postgres-url",
        envvar=_POSTGRES_VARIABLES,
        help="postgresql://user:password@host:port/database, or any libpq connection string.",
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option("--key-prefix", help=f"First part of every Redis key. Default: {DEFAULTS.key_prefix}"),
]
SchemaOption = Annotated[
    str | None,
    typer.Option("--schema", help="PostgreSQL schema of the tables. Default: the connection's own"),
]


def open_saver(redis_url: str, postgres_url: str, **wanted: Any) -> TieredSaver:
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
def reporting(console: Console, debug: bool, *urls: str, level: int = logging.WARNING) -> Iterator[None]:
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
        fail("Interrupted; everything it started is stopped.", INTERRUPTED)
    except TieredSaverError as error:
        if debug:
            raise
        code = next((code for kinds, code in _ERROR_CODES if isinstance(error, kinds)), FAILED)
        fail(redact(str(error), secrets_in=" ".join(urls)), code)
    finally:
        root.removeHandler(handler)
        ours.setLevel(usual[0])
        pool.setLevel(usual[1])


def fail(message: str, code: int) -> None:
    """Print an error and exit."""
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
