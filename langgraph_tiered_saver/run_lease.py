"""`TieredSaver.lease`: the context manager that holds a thread's run lease."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING

from langgraph_tiered_saver import drivers, operations
from langgraph_tiered_saver.errors import InvalidInputError, StaleWriterError
from langgraph_tiered_saver.leases import HeldLease
from langgraph_tiered_saver.names import check_index_entry, text_of
from langgraph_tiered_saver.operations import Blocking, Operation, Wait
from langgraph_tiered_saver.runtime import Runtime

if TYPE_CHECKING:
    from typing_extensions import Self

_SHORTEST_TTL = 0.1
_LONGEST_TTL = 24 * 3600.0
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 0.5  # seconds between two attempts to take a lease that is held


class RunLease:
    """The right to be the only one that writes to a thread, for as long as the `with` block runs.

    Made by `TieredSaver.lease`. It can be used with `with` and with `async with`, and again once it was left. A thread
    in the background renews it three times in its `ttl`.

    Attributes:
        thread_id: The thread.
        ttl: Seconds after which it ends if this process can renew it no more.
        wait: Seconds to wait for a lease that another run holds.
    """

    def __init__(self, current: Callable[[], Runtime], thread_id: str, ttl: float, wait: float) -> None:
        """Check the arguments; nothing is asked yet."""
        if thread_id is None or thread_id == "":
            raise InvalidInputError("lease needs a thread_id; nothing was done.")
        self.thread_id = text_of(thread_id, "thread_id")
        check_index_entry(self.thread_id)
        if type(ttl) not in (int, float) or not _SHORTEST_TTL <= ttl <= _LONGEST_TTL:
            raise InvalidInputError(f"ttl={ttl!r} must be {_SHORTEST_TTL:g} to {_LONGEST_TTL:g} seconds.")
        if type(wait) not in (int, float) or not 0 <= wait < math.inf:
            raise InvalidInputError(f"wait={wait!r} must be a number of seconds, 0 or more.")
        self.ttl = float(ttl)
        self.wait = float(wait)
        self._current = current
        self._entered: tuple[Runtime, HeldLease] | None = None
        self._last: HeldLease | None = None
        self._pid = os.getpid()

    @property
    def token(self) -> str:
        """What names this holder in both tiers; `""` before the block is entered."""
        return self._last.token if self._last is not None else ""

    @property
    def held(self) -> bool:
        """Whether this process still holds it, as far as it can tell without asking; a forked child never does."""
        return self._last is not None and self._pid == os.getpid() and self._last.held

    @property
    def lost_reason(self) -> str | None:
        """Why it was lost; None if it was not. Once it is, every write of this process to the thread is refused."""
        return self._last.lost_reason if self._last is not None else None

    def __enter__(self) -> Self:
        runtime = self._begin()
        try:
            drivers.run(runtime, self._take(runtime))
        except BaseException:
            self._go_away()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if (entered := self._leave()) is not None:
            runtime, lease = entered
            runtime.leases.release(lease)

    async def __aenter__(self) -> Self:
        runtime = self._begin()
        try:
            await drivers.arun(runtime, self._take(runtime))
        except BaseException:
            # A call that runs in another thread may still take it.
            self._go_away()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if (entered := self._leave()) is not None:
            runtime, lease = entered
            await drivers.arun(runtime, _release(runtime, lease))

    def __repr__(self) -> str:
        state = "held" if self.held else "lost" if self.lost_reason else "not held"
        return f"{type(self).__name__}(thread_id={self.thread_id!r}, {state})"

    def _begin(self) -> Runtime:
        if self._entered is not None and self._pid == os.getpid():
            raise InvalidInputError("This lease is in use; make another one with saver.lease(thread_id).")
        self._pid, self._entered, self._last = os.getpid(), None, None
        return self._current()

    def _take(self, runtime: Runtime) -> Operation[None]:
        """Take the lease, waiting for it if that is wanted."""
        yield from operations.ready(runtime)
        deadline = time.monotonic() + self.wait
        pause = _FIRST_PAUSE
        while True:
            lease = runtime.leases.reserve(self.thread_id, self.ttl)
            if lease is not None:
                self._entered, self._last = (runtime, lease), lease
                if (yield from operations.take_lease(runtime, lease)):
                    return
                self._entered, self._last = None, None
                runtime.leases.cancel(lease)
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._refusal(ours=lease is None)
            yield Wait([Future()], min(pause * (0.5 + secrets.randbelow(1000) / 1000), left))
            pause = min(2 * pause, _LAST_PAUSE)

    def _refusal(self, *, ours: bool) -> StaleWriterError:
        who = "This process" if ours else "Another run"
        waited = f", and did not give it up within {self.wait:g} s" if self.wait else ""
        hint = (
            "Leases do not nest: use the one that is held, or let the other run in this process end first."
            if ours
            else "Try again later, with wait= longer than the other run takes."
        )
        return StaleWriterError(
            f"{who} holds the lease of thread {self.thread_id!r:.80}{waited}. {hint}", thread_id=self.thread_id
        )

    def _go_away(self) -> None:
        if self._entered is not None:
            (runtime, lease), self._entered, self._last = self._entered, None, None
            runtime.leases.abandon(lease)

    def _leave(self) -> tuple[Runtime, HeldLease] | None:
        entered, self._entered = self._entered, None
        # A forked child's copy of the lease is its parent's; and a saver that was closed has given it up.
        return entered if entered is not None and self._pid == os.getpid() and not entered[1].given_up else None


def _release(runtime: Runtime, lease: HeldLease) -> Operation[None]:
    yield Blocking(lambda: runtime.leases.release(lease))
