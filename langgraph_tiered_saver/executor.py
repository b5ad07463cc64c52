"""Threads for asynchronous callers of the cold tier.

Not `concurrent.futures.ThreadPoolExecutor`: an interpreter that exits waits for its threads, and one of ours may be
waiting for a server that does not answer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class DaemonExecutor:
    """Runs functions in a bounded number of daemon threads, which start when they are needed."""

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads = 0
        self._closed = False

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function; the future gives its result or error.

        Raises:
            RuntimeError: the executor was shut down.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor was shut down")
            self._work.put((future, function))
            if not self._idle.acquire(blocking=False) and self._threads < self._max_workers:
                self._threads += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def shutdown(self) -> None:
        """Let the threads end after what was submitted; does not wait."""
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 - it is the caller's, who gets it
                    future.set_exception(error)
            # Nothing may keep the result alive while this thread waits.
            del item, future, function
            self._idle.release()
