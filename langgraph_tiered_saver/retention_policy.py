"""The retention policy: passes over all threads that remove what the settings `retention_*` do not keep."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph_tiered_saver import drivers, operations
from langgraph_tiered_saver.cold import passes, retention
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    HotTierUnavailableError,
    SaverClosedError,
    StaleWriterError,
    ThreadQuarantinedError,
    TieredSaverError,
)
from langgraph_tiered_saver.runtime import Runtime

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0  # seconds between two looks whether a pass is due; one small statement each
_STOP_TIMEOUT = 2.0  # seconds to wait for the thread that is being pruned


@dataclass(frozen=True)
class PassResult:
    """What a pass removed, or would remove.

    Attributes:
        threads: Threads it looked at.
        checkpoints: Checkpoints removed, those of deleted threads included.
        pruned_threads: Threads that lost some of their checkpoints.
        deleted_threads: Threads that were idle for too long, and are gone.
        skipped_threads: Threads that came under quarantine, or that a run holds the lease of; they were left alone.
        finished: It came to the last thread. Otherwise the next pass goes on where this one was stopped.
    """

    threads: int = 0
    checkpoints: int = 0
    pruned_threads: int = 0
    deleted_threads: int = 0
    skipped_threads: int = 0
    finished: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        removed = (
            f"{self.checkpoints} checkpoints: {self.pruned_threads} threads pruned, {self.deleted_threads} deleted"
        )
        skipped = f", {self.skipped_threads} left alone" if self.skipped_threads else ""
        return f"{removed}{skipped}, of {self.threads}"

    def plus(self, **more: int) -> PassResult:
        """Add to some of the figures."""
        return dataclasses.replace(self, **{name: getattr(self, name) + by for name, by in more.items()})


def is_set(config: TieredConfig) -> bool:
    """Whether the settings remove anything."""
    return any((config.retention_keep_last, config.retention_max_age, config.retention_delete_idle))


def make_pass(
    runtime: Runtime,
    *,
    interval: float = 0.0,
    dry_run: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[PassResult], None] = lambda result: None,
) -> PassResult | None:
    """Apply the policy to all threads, or to those that an unfinished pass did not come to.

    Args:
        runtime: The tiers.
        interval: Seconds that must have gone by since a pass was finished, by any process.
        dry_run: Count only; takes nobody's turn, and sees what PostgreSQL has.
        stopping: Is asked before each thread whether to stop.
        progress: Is told how it stands after each thread that was pruned, and each page of them.

    Returns:
        What was removed; None if another process is at it, or was within the interval.

    Raises:
        TieredSaverError: a tier could not be used, or Redis is not trusted. The next pass goes on from there.
    """
    if not runtime.ready:
        runtime.open()
    config = runtime.config
    rules = retention.Rules.from_now(config.retention_keep_last, config.retention_max_age, config.retention_delete_idle)
    if dry_run:
        return _Pass(runtime, rules, None, stopping, progress).run("")
    holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    came_to = runtime.cold(lambda connection: passes.take_turn(connection, holder, interval))
    if came_to is None:
        return None
    with _ending_turn(runtime, holder) as end:
        result = _Pass(runtime, rules, holder, stopping, progress).run(came_to)
        end(result.finished)
    return result


@contextmanager
def _ending_turn(runtime: Runtime, holder: str) -> Iterator[Callable[[bool], None]]:
    finished = False

    def end(how: bool) -> None:
        nonlocal finished
        finished = how

    try:
        yield end
    finally:
        # Where PostgreSQL is away, the turn ends by itself.
        with suppress(TieredSaverError):
            runtime.cold(lambda connection: passes.end_turn(connection, holder, finished=finished))


def _check_hot(runtime: Runtime) -> None:
    # Past Redis nobody can tell whether a journal still holds something, which must come first.
    if runtime.hot is None:
        raise HotTierUnavailableError("Redis is away; nothing is removed until it is back and trusted.")


class _Pass:
    """One pass; without a holder it only counts."""

    def __init__(
        self,
        runtime: Runtime,
        rules: retention.Rules,
        holder: str | None,
        stopping: Callable[[], bool],
        progress: Callable[[PassResult], None],
    ) -> None:
        self._runtime = runtime
        self._rules = rules
        self._holder = holder
        self._stopping = stopping
        self._progress = progress
        self._renewed = time.monotonic()
        self._result = PassResult()

    def run(self, after: str) -> PassResult:
        """Look at every thread after one, page by page."""
        while True:
            page = self._runtime.cold(partial(passes.next_threads, after=after, rules=self._rules))
            if not page.threads:
                return dataclasses.replace(self._result, finished=True)
            for name in page.candidates:
                if self._stopping() or not self._keep_turn(after):
                    return self._result
                self._apply(name)
            after = page.last
            self._result = self._result.plus(threads=page.threads)
            self._progress(self._result)
            if not self._keep_turn(after, now=True):
                return self._result

    def _apply(self, name: str) -> None:
        plan = self._runtime.cold(partial(retention.read_plan, name, self._rules))
        if not plan.count:
            return
        if self._holder is not None:
            _check_hot(self._runtime)
            try:
                drivers.run(self._runtime, operations.retain(self._runtime, [name], self._rules))
            except (ThreadQuarantinedError, StaleWriterError):
                self._result = self._result.plus(skipped_threads=1)
                return
        self._result = self._result.plus(
            checkpoints=plan.count, pruned_threads=not plan.whole, deleted_threads=plan.whole
        )
        self._progress(self._result)

    def _keep_turn(self, came_to: str, *, now: bool = False) -> bool:
        if self._holder is None or not (now or time.monotonic() - self._renewed > passes.TURN_SECONDS / 4):
            return True
        self._renewed = time.monotonic()
        holder = self._holder
        return self._runtime.cold(lambda connection: passes.keep_turn(connection, holder, came_to))


class Retention:
    """Makes passes in a thread of its own, whenever one is due and no other process makes it.

    Attributes:
        removed_checkpoints: How many checkpoints all passes removed.
        deleted_threads: How many threads they removed whole.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.removed_checkpoints = 0
        self.deleted_threads = 0
        self._runtime = runtime
        self._stopping = threading.Event()
        self._healthy = True
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start, if the settings remove anything."""
        if is_set(self._runtime.config):
            self._thread = threading.Thread(target=self._run, name="langgraph-tiered-retention", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the thread that is being pruned; waits for at most two seconds."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT)

    def _run(self) -> None:
        interval = self._runtime.config.retention_interval
        wait = 0.0
        while not self._stopping.wait(wait * random.uniform(0.9, 1.1)):  # noqa: S311 - jitter
            wait = min(interval, _LONGEST_WAIT)
            try:
                self._note(make_pass(self._runtime, interval=interval, stopping=self._stopping.is_set))
            except SaverClosedError:
                return
            except TieredSaverError as error:
                if self._healthy and not self._stopping.is_set():
                    self._healthy = False
                    logger.warning("Retention has stopped and will be tried again: %s", error)
            except Exception:
                logger.exception("Retention met an unexpected error and goes on")

    def _note(self, result: PassResult | None) -> None:
        if not self._healthy:
            self._healthy = True
            logger.warning("Retention goes on")
        if result is not None:
            self.removed_checkpoints += result.checkpoints
            self.deleted_threads += result.deleted_threads
            if result.checkpoints:
                logger.info("Retention removed %s", result)
