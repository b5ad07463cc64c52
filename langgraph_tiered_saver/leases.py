"""Run leases: at most one run works on a thread, and who lost its lease cannot write any more.

PostgreSQL records who holds a thread's lease; the scripts look at a copy in Redis, so that the fence costs a write
nothing. Taking a lease needs every tier that is there to agree: Redis first, then PostgreSQL; Redis alone while
PostgreSQL is away, and PostgreSQL alone while Redis is not trusted. Each tier goes by its own clock. Whoever opens a
generation brings Redis' copy up to date.

A lease that has ended is lost, even if nobody took it, because somebody without a lease may have written since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from langgraph_tiered_saver.cold import direct, leases
from langgraph_tiered_saver.cold.pool import ColdPool, Connection
from langgraph_tiered_saver.cold.watchdog import Watchdog
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    ColdTierUnavailableError,
    HotTierUnavailableError,
    TieredSaverError,
    stale_writer,
)
from langgraph_tiered_saver.executor import DaemonExecutor
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.clients import SyncRedis

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RENEWALS = 3  # in the time that a lease lasts
_RETRIES = 12  # in that time, after a renewal that failed
_HELD_ELSEWHERE = "another run has taken it"
_ENDED = "it ended before it could be renewed"
_CUT_GRACE = 0.5  # seconds after a statement's own time-out until its connection is cut
# Names nobody, so every write that carries it is refused.
_NOBODY = "nobody"


class Outcome(Enum):
    """What came of an attempt to take a lease."""

    HELD = "held"
    REFUSED = "refused"
    MOVED = "moved"


@dataclass(eq=False)
class HeldLease:
    """A lease that this process holds, or tries to take.

    Attributes:
        thread_id: The thread.
        ttl: Seconds until it ends unless it is renewed.
        token: Names the holder.
        lost_reason: Why it is lost; None if it is not.
    """

    thread_id: str
    ttl: float
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    lost_reason: str | None = None
    busy: threading.Lock = field(default_factory=threading.Lock, repr=False)
    held_since: float = float("-inf")  # of the last renewal, by the monotonic clock, before it was asked for
    due: float = float("inf")  # when it must be renewed next
    generation: int = 0  # in which Redis knew it last
    asked: bool = False  # PostgreSQL may have it
    recorded: bool = False  # PostgreSQL has it
    given_up: bool = False

    @property
    def held(self) -> bool:
        """Whether nobody else can have it, as far as this process can tell."""
        return self.lost_reason is None and not self.given_up and time.monotonic() < self.held_since + self.ttl


class LeaseKeeper:
    """Takes, renews and gives up the leases of one process.

    One thread renews them all. A PostgreSQL that hangs holds up another one, so that Redis is told in time.
    """

    def __init__(
        self,
        client: SyncRedis,
        pool: ColdPool,
        config: TieredConfig,
        tokens: dict[str, str],
        *,
        hot: Callable[[], tier.HotCalls | None],
        cold: Callable[[Callable[[Connection], bool]], bool],
        lose: Callable[[TieredSaverError, tier.HotCalls], None],
    ) -> None:
        """Prepare; nothing is asked yet, and no thread is started.

        Args:
            client: Synchronous client of the hot tier.
            pool: The cold tier.
            config: Settings.
            tokens: By thread, what the calls of the hot tier, and writes past it, carry.
            hot: Gives the calls of the trusted generation, or None.
            cold: Runs a function on a connection to the cold tier.
            lose: Is told of a failure of the hot tier.
        """
        self._client = client
        self._pool = pool
        self._config = config
        self._tokens = tokens
        self._hot = hot
        self._cold_run = cold
        self._lose_hot = lose
        self._watchdog = Watchdog()
        self._executor = DaemonExecutor(1, "langgraph-tiered-leases-cold")
        self._following: Future[None] | None = None
        self._changed = threading.Condition(threading.Lock())
        self._leases: dict[str, HeldLease] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._pid = os.getpid()

    # --- taking and giving up ------------------------------------------------------------------------------------

    def reserve(self, thread_id: str, ttl: float) -> HeldLease | None:
        """Begin to take a thread's lease; None if this process has it, or tries to take it, already."""
        with self._changed:
            if thread_id in self._leases:
                return None
            lease = self._leases[thread_id] = HeldLease(thread_id, ttl)
        return lease

    def attempt(self, lease: HeldLease, hot: tier.HotCalls | None, closed: int | None) -> Outcome:
        """Try once to take a lease that was reserved; blocking.

        Args:
            lease: The lease.
            hot: The calls of the trusted generation; None to ask PostgreSQL alone.
            closed: The closed generation, if `hot` is None.

        Returns:
            `MOVED` if the way was not the right one any more; it is tried again.

        Raises:
            ColdTierUnavailableError, ColdTierRejectedError, HotTierRejectedError: a tier could not be asked.
        """
        with lease.busy:
            if lease.given_up:
                return Outcome.REFUSED
            began = time.monotonic()
            if hot is None:
                try:
                    held = lease.recorded = self._take_cold(lease, closed)
                    if held and self._is_late(lease, began):
                        began = time.monotonic()
                        held = lease.recorded = self._still_recorded(lease)
                except direct.GenerationMovedError:
                    return Outcome.MOVED
            else:
                try:
                    held = self._ask_hot(hot, "acquire", lease) == 1 and self._confirm(lease, hot)
                    if held and self._is_late(lease, began):
                        # PostgreSQL, or finding that it is away, took so long that Redis may have forgotten the lease.
                        began = time.monotonic()
                        held = self._ask_hot(hot, "acquire", lease) == 1
                        if not held:
                            self._drop_cold(lease)
                except HotTierUnavailableError as error:
                    self._lose_hot(error, hot)
                    return Outcome.MOVED
            if held:
                self._begin(lease, began)
        return Outcome.HELD if held else Outcome.REFUSED

    @staticmethod
    def _is_late(lease: HeldLease, began: float) -> bool:
        return time.monotonic() > began + lease.ttl / _RENEWALS

    def _confirm(self, lease: HeldLease, hot: tier.HotCalls) -> bool:
        """Have PostgreSQL agree to a lease that Redis has given."""
        try:
            held = lease.recorded = self._take_cold(lease)
        except ColdTierUnavailableError as error:
            logger.info("PostgreSQL is not asked for the lease of thread %.80r: %s", lease.thread_id, error)
            held = True
        except TieredSaverError:
            self._drop_hot(lease)
            raise
        if held:
            lease.generation = hot.generation
        else:
            self._drop_hot(lease)
        return held

    def _begin(self, lease: HeldLease, began: float) -> None:
        with self._changed:
            if self._leases.get(lease.thread_id) is lease:
                self._tokens[lease.thread_id] = lease.token
                self._note_renewal(lease, began)
                self._wake()

    def release(self, lease: HeldLease) -> None:
        """Give a lease up, in both tiers if they can be reached; it ends by itself where they cannot. Blocking."""
        self.cancel(lease)
        with lease.busy:
            self._drop_cold(lease)
            # Last, because whoever waits for the lease asks Redis first.
            self._drop_hot(lease)

    def abandon(self, lease: HeldLease) -> None:
        """Give a lease up that was being taken when its caller went away; does not block."""
        self.cancel(lease)
        with contextlib.suppress(RuntimeError):  # the saver was closed; the lease ends by itself
            self._executor.submit(lambda: self.release(lease))

    def cancel(self, lease: HeldLease) -> None:
        """Forget a lease that was reserved and not taken; writes no longer carry its token."""
        with self._changed:
            lease.given_up = True
            if self._leases.get(lease.thread_id) is lease:
                del self._leases[lease.thread_id]
                self._tokens.pop(lease.thread_id, None)

    def reassert(self, thread_id: str) -> None:
        """Let Redis know a lease again that it does not know, if PostgreSQL says that it is still held; blocking.

        Raises:
            StaleWriterError: it is lost.
            ColdTierUnavailableError: PostgreSQL cannot be asked.
        """
        lease = self._leases.get(thread_id)
        if lease is None:
            return
        with lease.busy:
            hot = self._hot()
            if hot is None or lease.given_up or lease.held_since == float("-inf"):
                return
            try:
                if lease.lost_reason is None and not self._restore(lease, hot):
                    self._lose(lease, _ENDED)
            except HotTierUnavailableError as error:
                self._lose_hot(error, hot)
                return
            if lease.lost_reason is not None:
                raise stale_writer(thread_id)

    def _restore(self, lease: HeldLease, hot: tier.HotCalls) -> bool:
        """See to it that Redis knows a lease; False if it must not.

        Raises:
            HotTierUnavailableError, ColdTierUnavailableError: a tier cannot be asked.
        """
        reply = self._ask_hot(hot, "renew", lease)
        # In one generation Redis forgets a lease only when that has ended; so this is done once in each at most.
        if reply == -1 and lease.recorded and lease.generation != hot.generation:
            # Redis first: from then on nobody can take it there, so that PostgreSQL's answer still holds.
            reply = self._ask_hot(hot, "acquire", lease)
            try:
                if reply == 1 and not self._still_recorded(lease):
                    reply = -1
            except TieredSaverError:
                self._drop_hot(lease)
                raise
            if reply == -1:
                self._drop_hot(lease)
        if reply == 1:
            lease.generation = hot.generation
        return reply == 1

    # --- the thread ----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the thread, and give up every lease."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(self._config.redis_timeout)
        for lease in list(self._leases.values()):
            self.release(lease)
        self._executor.shutdown()
        self._watchdog.stop()

    def _wake(self) -> None:
        if self._thread is None and not self._stopping:
            self._thread = threading.Thread(target=self._run, name="langgraph-tiered-leases", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                wait = min((lease.due for lease in self._leases.values()), default=float("inf")) - time.monotonic()
                if not self._stopping and wait > 0:
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
                now = time.monotonic()
                due = [lease for lease in self._leases.values() if lease.due <= now]
            try:
                self.renew(due)
            except Exception:
                # A bug must not end the only thread that renews leases.
                logger.exception("Renewing run leases met an unexpected error and goes on")
                self._put_off(due)

    def renew(self, due: list[HeldLease]) -> None:
        """Renew leases; blocking, but not for as long as PostgreSQL may take to say that it is away."""
        self._put_off(due)
        if due and (self._following is None or self._following.done()):
            self._following = self._executor.submit(lambda: self._renew_all_cold(due))
        for lease in due:
            self._renew_hot(lease)
            if time.monotonic() > lease.held_since + lease.ttl:
                self._lose(lease, _ENDED)

    def _renew_hot(self, lease: HeldLease) -> None:
        # Without the lease's lock, which somebody may hold who waits for PostgreSQL; the token tells it from any other.
        hot = self._hot()
        if hot is None or lease.lost_reason is not None or lease.given_up:
            return
        began = time.monotonic()
        try:
            reply = self._ask_hot(hot, "renew", lease)
        except HotTierUnavailableError as error:
            self._lose_hot(error, hot)
        except TieredSaverError as error:
            logger.info("The lease of thread %.80r was not renewed: %s", lease.thread_id, error)
        else:
            if reply == 1:
                lease.generation = hot.generation
                self._note_renewal(lease, began)
            elif reply == 0:
                self._lose(lease, _HELD_ELSEWHERE)
            elif lease.generation == hot.generation:
                self._lose(lease, _ENDED)
            # Otherwise the next write, or the thread that asks PostgreSQL, lets Redis know it again.

    def _renew_all_cold(self, due: list[HeldLease]) -> None:
        for lease in due:
            with lease.busy:
                if lease.lost_reason is None and not lease.given_up:
                    try:
                        self._renew_cold(lease)
                    except TieredSaverError as error:
                        logger.info("The lease of thread %.80r was not renewed: %s", lease.thread_id, error)

    def _renew_cold(self, lease: HeldLease) -> None:
        """Renew a lease in PostgreSQL, or record it there if Redis has kept it while PostgreSQL was away."""
        began, hot = time.monotonic(), self._hot()
        durable = lease.recorded and self._still_recorded(lease)
        if durable:
            self._note_renewal(lease, began)
        try:
            if hot is not None and not (durable and lease.generation == hot.generation):
                if not (self._restore(lease, hot) and (durable or self._record(lease, hot))):
                    self._lose(lease, _ENDED)
            elif not durable and lease.recorded:
                self._lose(lease, _ENDED)
        except HotTierUnavailableError as error:
            if hot is not None:
                self._lose_hot(error, hot)

    def _record(self, lease: HeldLease, hot: tier.HotCalls) -> bool:
        if not self._take_cold(lease):
            return False
        lease.recorded = True
        # Somebody else may have had it since Redis was asked, if this process stood still.
        return self._ask_hot(hot, "renew", lease) == 1

    def _note_renewal(self, lease: HeldLease, began: float) -> None:
        lease.held_since = max(lease.held_since, began)
        lease.due = lease.held_since + lease.ttl / _RENEWALS

    def _put_off(self, due: list[HeldLease]) -> None:
        for lease in due:
            lease.due = time.monotonic() + lease.ttl / _RETRIES

    def _lose(self, lease: HeldLease, reason: str) -> None:
        with self._changed:
            if lease.given_up or lease.lost_reason is not None:
                return
            lease.lost_reason = reason
            lease.due = float("inf")
            self._tokens[lease.thread_id] = _NOBODY
        logger.warning("The lease of thread %.80r is lost: %s. Its writes are refused", lease.thread_id, reason)

    # --- the two tiers -------------------------------------------------------------------------------------------

    def _ask_hot(self, hot: tier.HotCalls, what: str, lease: HeldLease) -> int:
        return int(tier.run(self._client, hot.run_lease(what, lease.thread_id, lease.token, lease.ttl)))

    def _drop_hot(self, lease: HeldLease) -> None:
        """Give a lease up in Redis; one that is not trusted is told of all leases before it is again."""
        hot = self._hot()
        if hot is not None:
            try:
                self._ask_hot(hot, "release", lease)
            except TieredSaverError as error:
                logger.info("The lease of thread %.80r could not be given up: %s", lease.thread_id, error)

    def _take_cold(self, lease: HeldLease, closed: int | None = None) -> bool:
        lease.asked = True
        return self._cold(
            lambda c, seconds: leases.acquire(
                c, lease.thread_id, lease.token, lease.ttl, closed=closed, statement_timeout=seconds
            )
        )

    def _still_recorded(self, lease: HeldLease) -> bool:
        """Renew a lease in PostgreSQL, if that says that it is held."""
        # A row that somebody has locked must not hold up the renewal of other leases for as long as they last.
        return self._cold(
            lambda c, seconds: leases.renew(c, lease.thread_id, lease.token, lease.ttl, statement_timeout=seconds),
            lease.ttl / 6,
        )

    def _drop_cold(self, lease: HeldLease) -> None:
        """Give a lease up in PostgreSQL."""
        if lease.asked:
            try:
                self._cold(lambda c, seconds: leases.release(c, lease.thread_id, lease.token,
                                                             statement_timeout=seconds))  # fmt: skip
            except TieredSaverError as error:
                logger.info("The lease of thread %.80r could not be given up: %s", lease.thread_id, error)

    def _cold(self, work: Callable[[Connection, float], bool], most_seconds: float = float("inf")) -> bool:
        seconds = max(0.1, min(self._config.postgres_timeout, most_seconds))

        def bounded(connection: Connection) -> bool:
            with self._watchdog.guard(connection, seconds + _CUT_GRACE):
                return work(connection, seconds)

        return self._cold_run(bounded)
