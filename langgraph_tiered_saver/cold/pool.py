"""Connections of the cold tier, and what PostgreSQL's errors mean."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from langgraph_tiered_saver.cold.watchdog import Watchdog
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    ColdTierRejectedError,
    ColdTierUnavailableError,
    ConfigurationError,
    TieredSaverError,
)
from langgraph_tiered_saver.redaction import redact

logger = logging.getLogger(__name__)

# A process that stands still in a transaction, or whose machine is gone, would keep its locks until TCP gives up. After
# so many seconds PostgreSQL ends its session instead; what it was about to write, it writes again.
MOST_IDLE = 5.0
BOUND = """
SELECT set_config('idle_in_transaction_session_timeout', %s, true),
    set_config('statement_timeout', coalesce(%s, current_setting('statement_timeout')), true)"""

T = TypeVar("T")
Connection = psycopg.Connection[DictRow]
Pool = ConnectionPool[Connection]

# The server's own statement_timeout, where it works, gives the better message; so it goes first.
_WATCHDOG_GRACE = 1.0
_RECONNECT_TIMEOUT = 2.0
_RETRY_PAUSE = (0.02, 0.1)  # seconds
_CHECK_TIMEOUT = 2  # seconds to connect when it is only asked whether the server answers; libpq takes no less

# SQLSTATE classes and codes of refusals that pass by themselves or by an operator's hand.
_PASSING_CLASSES = ("08", "40", "53", "57", "58")
_PASSING_CODES = ("25006", "55P03", "25P03")
_AWAY_CLASSES = ("08", "57P")
_AWAY_CODES = ("53300",)
# Data that PostgreSQL will never take: the record is at fault, not the server.
_POISON_CLASSES = ("21", "22", "23", "44", "54", "P0")


def connection_options(config: TieredConfig) -> dict[str, Any]:
    """Give the arguments that our own connections are made with."""
    return {
        "autocommit": True,
        "row_factory": dict_row,
        "prepare_threshold": 0,
        "connect_timeout": max(2, math.ceil(config.postgres_timeout)),
        "application_name": "langgraph_tiered_saver",
        "keepalives_idle": 30,
    }


def check_url(url: str) -> None:
    """Check a connection string without connecting.

    Raises:
        ConfigurationError: libpq cannot read it. Its password is not repeated.
    """
    if not isinstance(url, str) or not url.strip():
        raise ConfigurationError("The PostgreSQL URL is empty. Pass postgresql://user:password@host:port/database.")
    if not _is_readable(url):
        # Not raised while libpq's error is handled: that error shows the URL, or a piece of it.
        raise ConfigurationError(
            "The PostgreSQL URL cannot be read, or one of its options is unknown. Percent-encode special characters of "
            "the user name and password, and leave out a driver's name (+psycopg, +asyncpg); the form is "
            "postgresql://user:password@host:port/database, or any libpq connection string."
        )


def _is_readable(url: str) -> bool:
    try:
        found = conninfo_to_dict(url)
    except (psycopg.Error, ValueError):
        return False
    if not url.startswith(("postgresql://", "postgres://")):
        return True
    # A password that was not percent-encoded ends early, and its rest becomes part of something else.
    rest = "".join(str(found.get(name) or "") for name in ("host", "dbname", "user"))
    ports = str(found.get("port") or "0").split(",")
    return set("@ ").isdisjoint(rest) and all(port.isdigit() for port in ports if port)


# Our pools' open connections, for `leave_to_parent`.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def make_pool(
    url: str,
    config: TieredConfig,
    options: dict[str, Any] | None = None,
    configure_first: Callable[[Connection], None] | None = None,
) -> Pool:
    """Make a pool, without connecting.

    Args:
        url: Connection string.
        config: Pool size, time-outs and schema.
        options: Connection arguments; ours if None.
        configure_first: What else a new connection needs.
    """

    def configure(connection: Connection) -> None:
        _connections.add(connection)
        if configure_first is not None:
            configure_first(connection)
        set_search_path(connection, config.postgres_schema)

    return cast(
        "Pool",
        ConnectionPool(
            url,
            kwargs=connection_options(config) if options is None else options,
            min_size=1,
            max_size=config.postgres_pool_size,
            timeout=config.postgres_timeout,
            # The pool waits longer after each failure; giving up lets the next caller try at once.
            reconnect_timeout=_RECONNECT_TIMEOUT,
            configure=configure,
            open=False,
            name="langgraph_tiered_saver",
        ),
    )


def leave_to_parent() -> None:
    """In a forked child: let go of the parent's connections without a word to the server.

    libpq says goodbye when a connection is freed, at the latest when the child exits, and the parent's session would
    end. What the child says now goes nowhere.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for connection in list(_connections):
        if not connection.closed:
            os.dup2(nowhere, connection.fileno())
    _connections.clear()
    os.close(nowhere)


def set_search_path(connection: Connection, schema: str | None) -> None:
    """Let unqualified names mean the tables of a schema; the library's statements are unqualified."""
    if schema is not None:
        path = sql.Identifier(schema).as_string(connection)
        connection.execute("SELECT set_config('search_path', %s, false)", (path,))
        if not connection.autocommit:
            connection.commit()


class ColdPool:
    """Lends connections, each in autocommit mode and with the right `search_path`.

    psycopg_pool replaces connections that broke; a call that met a broken one is made again, which is harmless because
    everything the cold tier does is idempotent.

    Attributes:
        broken: The breaker: why PostgreSQL is away, or None. It opens when PostgreSQL has been away for
            `postgres_timeout`, for which calls wait; from then on they fail at once.
    """

    broken: TieredSaverError | None

    def __init__(self, pool: Pool, config: TieredConfig, *, ours: bool) -> None:
        self._pool = pool
        self._config = config
        self._ours = ours
        self._opened = False
        self._watchdog = Watchdog()
        self._checking = threading.Lock()
        self.broken = None
        self._refusal: psycopg.Error | None = None
        self._failing_since: float | None = None

    def run(self, work: Callable[[Connection], T], *, bounded: bool = True, probing: bool = False) -> T:
        """Run a function on a connection.

        Args:
            work: The function.
            bounded: It may take `postgres_statement_timeout` seconds.
            probing: Try even while the breaker is open.

        Raises:
            ColdTierUnavailableError: PostgreSQL cannot be reached, did not answer in time, or the pool had no
                connection in time.
            ColdTierRejectedError: PostgreSQL refused a statement for good.
        """
        if not probing:
            self.refuse_if_broken()
        deadline = time.monotonic() + self._config.postgres_timeout
        try:
            while True:
                try:
                    with self.connection(statements=1 if bounded else 0) as connection:
                        return work(connection)
                except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                    # A server that went away and came back left every idle connection of the pool dead, and one that
                    # restarts is back within the time that a caller gives it.
                    if not self._opened or self.broken or not is_away(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(random.uniform(*_RETRY_PAUSE))  # noqa: S311 - jitter
        except psycopg.Error as error:
            raise self.translate(error) from error

    @contextmanager
    def connection(self, *, statements: int = 1) -> Iterator[Connection]:
        """Borrow a connection; psycopg's own errors come through.

        Args:
            statements: How many times `postgres_statement_timeout` it may be used; then it is cut. 0: no bound.
        """
        try:
            with self._borrow(statements) as connection:
                yield connection
        except psycopg.Error as error:
            self._notice(error)
            raise
        self._answered()

    @contextmanager
    def _borrow(self, statements: int) -> Iterator[Connection]:
        if not self._opened:
            self._open()
        seconds = self._config.postgres_statement_timeout * statements
        with ExitStack() as stack:
            connection = stack.enter_context(self._pool.connection(timeout=self._config.postgres_timeout))
            if seconds:
                stack.enter_context(self._watchdog.guard(connection, seconds + _WATCHDOG_GRACE))
            if self._ours:
                yield connection
                return
            autocommit, rows = connection.autocommit, connection.row_factory
            connection.autocommit, connection.row_factory = True, dict_row
            path = None
            try:
                if self._config.postgres_schema:
                    path = connection.execute("SELECT current_setting('search_path') AS path").fetchone()
                    set_search_path(connection, self._config.postgres_schema)
                yield connection
            finally:
                if not connection.closed:
                    if path is not None:
                        connection.execute("SELECT set_config('search_path', %s, false)", (path["path"],))
                    connection.autocommit, connection.row_factory = autocommit, rows

    # --- the breaker ---------------------------------------------------------------------------------------------

    def refuse_if_broken(self) -> None:
        """Raise at once what is known to be so.

        Raises:
            ColdTierUnavailableError: PostgreSQL is away.
        """
        broken = self.broken
        if broken is not None:
            raise type(broken)(*broken.args) from broken

    def answers(self) -> bool:
        """Ask on a connection of its own whether PostgreSQL is there, within two seconds; no pool makes that wait."""
        conninfo, options = self._pool.conninfo, self._pool.kwargs
        if not isinstance(conninfo, str) or not isinstance(options, dict):
            return True  # only the pool itself can connect
        try:
            psycopg.connect(conninfo, **{**options, "connect_timeout": _CHECK_TIMEOUT}).close()
        except psycopg.Error as error:
            self._refusal = error
            return False
        return True

    def _notice(self, error: psycopg.Error) -> None:
        """Open the breaker if PostgreSQL has been away for as long as a caller waits for it, and still is."""
        if not is_away(error):
            return
        with self._checking:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = now
            waited = isinstance(error, PoolTimeout) or now - self._failing_since >= self._config.postgres_timeout
            if self.broken is not None or not waited:
                return
            if self.answers():
                self._failing_since = None
            else:
                self._break(self._refusal or error)
                logger.warning("%s", self.broken)

    def _break(self, error: psycopg.Error) -> None:
        if self.broken is None:
            self.broken = self.translate(error)

    def _answered(self) -> None:
        self._failing_since = None
        if self.broken is not None:
            self.broken = None
            logger.warning("PostgreSQL answers again")

    def translate(self, error: psycopg.Error) -> TieredSaverError:
        """Turn a psycopg error into ours."""
        text = redact(str(error), secrets_in=self._pool.conninfo if isinstance(self._pool.conninfo, str) else "")
        text = " ".join(text.split()) or type(error).__name__
        if is_passing(error):
            return ColdTierUnavailableError(
                f"PostgreSQL is not available ({type(error).__name__}: {text}). Acknowledged records are safe in the "
                "journal. Check the PostgreSQL URL, the password and that the server runs; the call can be repeated."
            )
        return ColdTierRejectedError(
            f"PostgreSQL refused a statement ({type(error).__name__}: {text}). Acknowledged records are safe in the "
            "journal. Check the tables (setup()) and the user's rights."
        )

    def close(self) -> None:
        """Close the pool if it is ours."""
        self._watchdog.stop()
        if self._ours and self._opened:
            self._pool.close(timeout=self._config.close_timeout)

    def _open(self) -> None:
        if self._ours and self._pool.closed:
            # The pool would only say that it had no connection in time; this says why, at once.
            options = self._pool.kwargs
            try:
                psycopg.connect(str(self._pool.conninfo), **(options if isinstance(options, dict) else {})).close()
            except UnicodeError:
                raise ConfigurationError("The host name in the PostgreSQL URL is not one; correct it.") from None
            except psycopg.Error as error:
                self._break(error)
                raise
            self._pool.open()
        self._opened = True


def is_away(error: psycopg.Error) -> bool:
    """Whether the server, or the way to it, seems to be away."""
    state = error.sqlstate
    if state is None:
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    return state.startswith(_AWAY_CLASSES) or state in _AWAY_CODES


def is_passing(error: psycopg.Error) -> bool:
    """Whether trying again later can succeed."""
    state = error.sqlstate
    if state is None:
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    return state.startswith(_PASSING_CLASSES) or state in _PASSING_CODES


def is_poison(error: psycopg.Error) -> bool:
    """Whether the data is at fault, so that the same record will be refused for ever."""
    if isinstance(error, psycopg.DataError) and error.sqlstate is None:
        return True
    return error.sqlstate is not None and error.sqlstate.startswith(_POISON_CLASSES)


def is_missing_schema(error: psycopg.Error) -> bool:
    """Whether tables or columns are missing, as after the database was created anew."""
    return isinstance(
        error,
        (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName),
    )


def set_timeouts(connection: Connection, seconds: float) -> None:
    """Bound the current transaction, in one round trip.

    Args:
        connection: In a transaction.
        seconds: For every statement; 0 leaves the server's setting. How long locks outlast a process that stands still
            between two statements is `MOST_IDLE`.
    """
    connection.execute(BOUND, (str(int(MOST_IDLE * 1000)), str(int(seconds * 1000)) if seconds else None))
