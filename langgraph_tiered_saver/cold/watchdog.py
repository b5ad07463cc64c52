"""Bounding how long a server that has stopped answering can hold a thread.

PostgreSQL's own `statement_timeout` needs a server that runs, and libpq waits for ever for one that does not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg


class Watchdog:
    """Cuts connections whose work takes too long; whoever waits on one then gets an `OperationalError`.

    Its thread starts with the first work, and sleeps while nothing is due.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._deadlines: dict[psycopg.Connection[Any], float] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def guard(self, connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
        """Allow some work on a connection this many seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            sooner = deadline < min(self._deadlines.values(), default=float("inf"))
            self._deadlines[connection] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="langgraph-tiered-watchdog", daemon=True)
                self._thread.start()
            elif sooner:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadlines.pop(connection, None)

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._deadlines.clear()
            self._thread = None
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._thread is threading.current_thread():
                now = time.monotonic()
                for connection in [c for c, deadline in self._deadlines.items() if deadline <= now]:
                    del self._deadlines[connection]
                    _cut(connection)
                # With nothing to guard, a look now and then costs less than a notification for every guard.
                due = min(self._deadlines.values(), default=now + 60.0)
                self._changed.wait(max(0.0, due - now))


def _cut(connection: psycopg.Connection[Any]) -> None:
    """Shut the socket down, which wakes whoever waits on it; the descriptor stays libpq's to close."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
