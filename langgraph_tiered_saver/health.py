"""Whether the hot tier may be used: the breaker, the generation, and what happens between two generations.

A process trusts Redis in one generation. It stops when a call fails, when a connection reaches another server process
than the generation was opened on, when a script meets another generation, or when PostgreSQL says that the generation
has ended. Then its operations go past Redis, once every live process has brought what it holds to PostgreSQL; and a
thread of this module looks for Redis, and opens the new generation when it is back.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import psycopg
import redis

from langgraph_tiered_saver import crash_points
from langgraph_tiered_saver.backlog import Backlog, Ticket
from langgraph_tiered_saver.cold import generations, leases, schema, threads
from langgraph_tiered_saver.cold.generations import Generation
from langgraph_tiered_saver.cold.pool import ColdPool, Connection, is_missing_schema
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    BothTiersUnavailableError,
    ColdTierRejectedError,
    ColdTierUnavailableError,
    ConfigurationError,
    HotTierRejectedError,
    HotTierUnavailableError,
    SaverClosedError,
    TieredSaverError,
)
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.clients import SyncRedis
from langgraph_tiered_saver.hot.keys import Keyspace, seen_bit

logger = logging.getLogger(__name__)

_STEP = 0.02  # seconds between two steps while somebody waits for the next one
_SIGN_OF_LIFE = 10.0  # seconds between two signs of life to the other processes, while nothing happens
_HORIZON = 60.0  # seconds of silence after which a process is not waited for
_LEAVING = 0.5  # seconds that the end of a process may wait for this module
_CALM = 5.0  # seconds that trust must last before its loss is taken for a mishap again


class InstanceChangedError(redis.RedisError):
    """A connection reached another server process than the one that is trusted."""


class InstanceGuard:
    """Refuses connections to a server process that the trusted generation was not opened on.

    A Redis that restarted may have less than it had, and so may a replica that was promoted; both have another run id.
    """

    def __init__(self) -> None:
        self.expected: frozenset[str] | None = None

    def connected(self, run_id: str) -> None:
        """Look at the server that a new connection reached."""
        expected = self.expected
        if expected is not None and run_id not in expected:
            raise InstanceChangedError("Redis has restarted, or another server answers in its place.")


class Health:
    """Decides, in a thread of its own, whether this process may use the hot tier.

    Attributes:
        calls: The calls of the trusted generation; None while Redis is not trusted.
        closed: The closed generation in which operations may go past Redis; None if there is none.
        is_reachable: Whether Redis answered when it was last asked.
        problem: Why Redis could not be used when it was last asked.
    """

    def __init__(
        self,
        *,
        pool: ColdPool,
        config: TieredConfig,
        keyspace: Keyspace,
        backlog: Backlog,
        guard: InstanceGuard,
        member: str,
        make_probe: Callable[[], SyncRedis],
        make_calls: Callable[[int, bool], tier.HotCalls],
        reconnect: Callable[[], None],
        repair_schema: Callable[[], None],
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            pool: The cold tier.
            config: Settings.
            keyspace: The installation's keys.
            backlog: What this process holds.
            guard: Looks at every new connection of the clients.
            member: Names this process to the others.
            make_probe: Makes a client with short time-outs, that no guard looks at.
            make_calls: Makes the calls of a generation; told whether Redis may evict what has a TTL.
            reconnect: Makes idle connections connect anew.
            repair_schema: Makes tables that are missing.
        """
        self.calls: tier.HotCalls | None = None
        self.closed: int | None = None
        self.is_reachable = False
        self.problem: Exception | None = None
        self._pool = pool
        self._config = config
        self._keyspace = keyspace
        self._backlog = backlog
        self._guard = guard
        self._member = member
        self._make_probe = make_probe
        self._make_calls = make_calls
        self._reconnect = reconnect
        self._repair_schema = repair_schema
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._is_opening = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._patience = max(3 * config.poll_interval, 1.0)  # after which the others take this process for dead
        self._longest_gap = self._patience - 1.5 * min(config.poll_interval, self._patience / 3)
        self._pulse_at = time.monotonic()
        self._waiters: list[Ticket] = []
        self._lost: TieredSaverError | None = None
        self._late: int | None = None
        self._adopted = 0  # the generation before which all that the journals held was adopted
        self._adopting: list[Ticket] = []
        self._adopting_until = 0.0
        self._reported = 0  # the generation that the others know this process to be in
        self._trusted = 0  # the generation that was trusted last
        self._trusted_at = float("-inf")
        self._mishaps = 0
        self._shown_at = float("-inf")
        self._looked_at = float("-inf")
        self._cold_away_since: float | None = None
        self._cold_away_for = 0.0
        self._cold_back_at = float("-inf")

    # --- for operations ------------------------------------------------------------------------------------------

    def trusted(self) -> tier.HotCalls | None:
        """Give the calls of the trusted generation, unless this process stood still for too long to know."""
        if time.monotonic() - self._pulse_at > self._longest_gap:
            self._doubt()
        return self.calls

    def _doubt(self) -> None:
        gap = time.monotonic() - self._pulse_at
        if gap > self._longest_gap and not self._ended.is_set():
            self.lose(
                HotTierUnavailableError(
                    f"This process stood still for {gap:.1f} s, in which the others may have gone on without it."
                )
            )
            self._pulse_at = time.monotonic()

    def _beat(self) -> None:
        """Notice that the whole process was stopped, by a signal, a debugger or a suspended machine."""
        while not self._ended.wait(self._longest_gap / 4):
            self._doubt()
            self._pulse_at = time.monotonic()

    def lose(self, error: TieredSaverError, calls: tier.HotCalls | None = None) -> None:
        """Stop trusting Redis.

        Args:
            error: Why.
            calls: The calls that failed; if others are trusted meanwhile, nothing happens.
        """
        with self._lock:
            known = self.calls is None
            if calls is not None and self.calls is not calls:
                return
            self.is_reachable = False
            if not known:
                calm = time.monotonic() - self._trusted_at > _CALM
                self._mishaps = 1 if calm else self._mishaps + 1
                self._looked_at = float("-inf")
            self.calls, self._guard.expected, self._lost = None, None, error
        # Also when Redis is lost again while only its journal was in use.
        self._backlog.distrust(error)
        if known:
            return
        logger.warning(
            "Redis is not trusted any more, and is %s: %s",
            "gone past through PostgreSQL" if self._config.fallback else "waited for (fallback is off)",
            error,
        )
        self._wake.set()

    def want(self) -> Ticket:
        """Ask for a way to go on without Redis.

        Returns:
            A ticket that is resolved when Redis is trusted again, or `closed` names the generation in which operations
            may go past it; or that fails because neither can be had now.
        """
        ticket: Ticket = Future()
        broken = self._pool.broken
        with self._lock:
            if self.calls is not None or (self.closed is not None and self._config.fallback):
                ticket.set_result(None)
            elif self._stopping:
                ticket.set_exception(SaverClosedError("The saver was closed."))
            elif not self._config.fallback and not self.is_reachable and self._looked_at > float("-inf"):
                ticket.set_exception(self._away())
            elif broken is not None and self._looked_at > float("-inf"):
                ticket.set_exception(self.both_away(broken))
            else:
                self._waiters.append(ticket)
        self._wake.set()
        return ticket

    def moved(self, number: int) -> None:
        """Note that a closed generation is not current any more."""
        with self._lock:
            if self.closed == number:
                self.closed = None
        self._wake.set()

    def missed_by(self, number: int) -> None:
        """Note that a generation was opened without records of this process, so that it is never trusted here."""
        with self._lock:
            self._late = number

    def came_late(self) -> None:
        """End a generation that was opened without records of this process, which PostgreSQL has by now."""
        self.lose(HotTierUnavailableError("This process was away, and brought older records to PostgreSQL just now."))
        self._wake.set()

    # --- the thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        thread = threading.Thread(target=self._run, name="langgraph-tiered-health", daemon=True)
        self._thread = thread
        self._pulse_at = time.monotonic()
        thread.start()
        threading.Thread(target=self._beat, name="langgraph-tiered-pulse", daemon=True).start()

    def stop(self, *, farewell: bool) -> None:
        """End the thread.

        Args:
            farewell: Take leave of the other processes, so that they do not wait for this one: nothing is left here.
        """
        with self._lock:
            self._stopping = True
        self._ended.set()
        self._wake.set()
        self._refuse(SaverClosedError("The saver was closed."))
        if farewell and self._reported and self._pool.broken is None:
            # A courtesy to the others, who wait a few seconds for a process that ends without it.
            leaving = threading.Thread(target=self._leave, name="langgraph-tiered-leave", daemon=True)
            leaving.start()
            leaving.join(_LEAVING)
        if self._thread is not None and self._thread is not threading.current_thread():
            # It may be waiting for a PostgreSQL that hangs; it is a daemon, and touches nothing any more. But a process
            # that ended in the middle of an opening would leave all others waiting for as long as its end takes.
            self._thread.join(_LEAVING if self._is_opening else _LEAVING / 5)

    def _leave(self) -> None:
        with contextlib.suppress(TieredSaverError):
            self._pool.run(lambda connection: generations.forget(connection, self._member))

    def _run(self) -> None:
        delay = self._interval()
        while not self._stopping:
            self._wake.wait(delay)
            self._wake.clear()
            try:
                delay = self.step()
            except TieredSaverError as error:
                self._refuse(error)
                delay = self._interval()
            except Exception:
                logger.exception("The health check met an unexpected error and goes on")
                self._refuse(ColdTierUnavailableError("The health check met an unexpected error; see the log."))
                delay = self._interval()

    def _interval(self) -> float:
        return self._config.poll_interval * random.uniform(0.9, 1.1)  # noqa: S311 - jitter

    def step(self) -> float:
        """Look at both tiers, and do what is next.

        Returns:
            Seconds until the next look.
        """
        try:
            current = self._poll()
        except ColdTierUnavailableError as error:
            return self._without_cold(error)
        calls = self.calls
        if calls is not None:
            if current == Generation(calls.generation, opened=True):
                return self._interval()
            self.lose(
                HotTierUnavailableError(
                    f"Another process has ended generation {calls.generation}, because Redis was away for it or had "
                    "lost something."
                ),
                calls,
            )
        if current.opened:
            state = self._look()
            if self._may_trust(state, current.number):
                assert state is not None  # noqa: S101 - nothing else may be trusted
                self._trust(state, current.number)
                return self._interval()
            if state is None and not (self._waiters and self._config.fallback):
                self._refuse(self._away())
                return self._interval()
            logger.warning("Generation %d ends: %s", current.number, self._lost or "Redis has lost something")
            number = current.number
            current = self._pool.run(lambda connection: generations.start(connection, number))
            crash_points.reach("generation_started")
        return self._between(current.number)

    def _between(self, number: int) -> float:
        """Bring a closed generation a step nearer to its opening."""
        self._late = None
        if self._reported < number:
            if not self._backlog.is_drained():
                # What memory could not keep is in the journal, if that is still there.
                if not self._backlog.uses_journal and self._look() is not None:
                    self._backlog.use_journal()
                return _STEP
            self._show(number)
        patience = self._patience
        horizon = _HORIZON
        if time.monotonic() - self._cold_back_at < _HORIZON:
            horizon += self._cold_away_for
        if self._pool.run(lambda connection: generations.laggards(connection, number, patience, horizon)):
            return _STEP
        if not self._adopt(number):
            return _STEP
        if self._config.fallback:
            with self._lock:
                self.closed = number
            self._resolve()
        if self.is_reachable or time.monotonic() - self._looked_at > self._config.poll_interval / 2:
            state = self._look()
            if state is None:
                if not self._config.fallback:
                    self._refuse(self._away())
            elif self._adopted == number and self._open(number):
                state = self._look()
                if self._may_trust(state, number):
                    assert state is not None  # noqa: S101 - nothing else may be trusted
                    self._trust(state, number)
                    return self._interval()
        return self._config.poll_interval / 4

    def _adopt(self, number: int) -> bool:
        """Bring what the journals of a Redis that answers still hold to PostgreSQL, before anybody reads past them.

        Their writers may be gone, or cannot reach PostgreSQL. While Redis does not answer, nobody can wait for that.

        Returns:
            False while it is under way.
        """
        if self._adopted == number:
            return True
        if not self._adopting:
            recently = time.monotonic() - self._looked_at < self._config.poll_interval / 2
            if recently and not self.is_reachable:
                return True
            if self._look() is None:
                return True
            try:
                with contextlib.closing(self._make_probe()) as probe:
                    names = tier.dirty_threads(probe, self._keyspace, None)
            except (TieredSaverError, redis.RedisError, OSError) as error:
                self.is_reachable, self.problem = False, error
                return True
            self._backlog.use_journal()
            self._adopting = self._backlog.settle(names)
            self._adopting_until = time.monotonic() + self._config.flush_timeout
        if not all(ticket.done() for ticket in self._adopting) and time.monotonic() < self._adopting_until:
            return False
        if not any(isinstance(_error_of(ticket), HotTierUnavailableError) for ticket in self._adopting):
            self._adopted = number
        self._adopting = []
        return True

    def _without_cold(self, error: ColdTierUnavailableError) -> float:
        """Go on while PostgreSQL is away: the trusted generation stays so, and a mishap of Redis may pass."""
        if self._cold_away_since is None:
            self._cold_away_since = time.monotonic()
        if self.calls is None:
            state = self._look()
            if state is not None and self._trusted and self._reported <= self._trusted:
                # Nobody could have started another generation, unless PostgreSQL is away for this process alone.
                if state.holds(self._trusted):
                    self._trust(state, self._trusted)
                    return self._interval()
            elif state is not None and not self._trusted and state.opened and state.holds(state.opened):
                # A process that starts now; when PostgreSQL is back, it learns whether this is the current generation.
                self._trust(state, state.opened)
                return self._interval()
            self._refuse(self.both_away(error))
        return self._interval()

    # --- the two tiers -------------------------------------------------------------------------------------------

    def _poll(self) -> Generation:
        """Read the current generation, and show the other processes that this one lives."""
        broken = self._pool.broken
        if broken is not None and not self._pool.answers():
            raise broken
        since = time.monotonic() - self._shown_at
        try:
            if self._reported and since < (_SIGN_OF_LIFE if self.calls is not None else self._config.poll_interval / 2):
                current = self._pool.run(generations.read, probing=True)
            else:
                current = self._show(self._reported)
        except TieredSaverError as error:
            if not (isinstance(error.__cause__, psycopg.Error) and is_missing_schema(error.__cause__)):
                raise
            self._repair_schema()
            current = self._show(self._reported)
        if self._cold_away_since is not None:
            self._cold_back_at = time.monotonic()
            self._cold_away_for, self._cold_away_since = self._cold_back_at - self._cold_away_since, None
        released = self._backlog.quarantined()
        if released:
            still = self._pool.run(lambda connection: threads.quarantined(connection, released), probing=True)
            self._backlog.release(set(released) - still)
        return current

    def _show(self, number: int) -> Generation:
        # A process that has not trusted anything yet holds nothing either.
        known = number or self._trusted or None
        current = self._pool.run(lambda c: generations.report(c, self._member, known), probing=True)
        self._reported = known or max(self._reported, current.number)
        self._shown_at = time.monotonic()
        return current

    def _look(self) -> tier.HotState | None:
        """Ask Redis what it holds, on a connection of its own."""
        state = None
        before, self.problem = self.problem, None
        try:
            with contextlib.closing(self._make_probe()) as probe:
                state = tier.look(probe, self._config, self._keyspace)
        except (ConfigurationError, HotTierRejectedError) as error:
            if str(before) != str(error):
                logger.error("Redis cannot be used: %s", error)  # noqa: TRY400 - the text says it all
            self.problem = error
        except (TieredSaverError, redis.RedisError, OSError) as error:
            self.problem = error
        self._looked_at = time.monotonic()
        self.is_reachable = state is not None
        return state

    def _may_trust(self, state: tier.HotState | None, number: int) -> bool:
        if state is None or self._late == number or not state.holds(number):
            return False
        if self._reported < number and not self._backlog.is_drained():
            # The generation was opened without what this process still holds.
            return False
        # One failed call may be a mishap; a second one, with Redis answering in between, is not.
        return number != self._trusted or self._mishaps <= 1 or not self._waiters

    def _open(self, number: int) -> bool:
        """Prepare Redis for a generation, and open it; False if it must stay closed for now."""
        floor = self._pool.run(schema.last_sequence) + 1
        with self._lock:
            if self._stopping:
                return False
            self._is_opening = True
        try:
            with contextlib.closing(self._make_probe()) as probe:
                prepared = tier.prepare(probe, self._keyspace, number, floor, self._member)
                crash_points.reach("generation_prepared")
                current = self._pool.run(lambda connection: self._open_on(connection, probe, prepared))
        except (ColdTierUnavailableError, ColdTierRejectedError) as error:
            if isinstance(error.__cause__, psycopg.errors.IdleInTransactionSessionTimeout):
                logger.info("Opening generation %d took too long, and others waited for it: %s", number, error)
                return False
            raise
        except (TieredSaverError, redis.RedisError, OSError) as error:
            logger.info("Redis could not be prepared for generation %d: %s", number, error)
            self.problem = error
            return False
        finally:
            self._is_opening = False
        crash_points.reach("generation_opened")
        return current == Generation(number, opened=True)

    def _open_on(self, connection: Connection, probe: SyncRedis, prepared: tier.Preparation) -> Generation:
        number = prepared.generation

        def enter() -> None:
            # Not before: by now another process may have opened the generation, and Redis may have been emptied since,
            # which must not make it look like what it was.
            tier.enter(probe, self._keyspace, prepared)
            tier.restore_run_leases(probe, self._keyspace, prepared, leases.unexpired(connection))

        quiet = self._config.poll_interval if number > 1 else 0.0
        return generations.open_generation(connection, number, quiet, enter)

    def _trust(self, state: tier.HotState, number: int) -> None:
        if self._reported < number and self._cold_away_since is None:
            self._show(number)
        calls = self._make_calls(number, state.evicts)
        self._guard.expected = state.instances
        # Connections that were made while nobody looked may lead to another server.
        self._reconnect()
        with self._lock:
            again = self._trusted != 0
            self._mishaps = self._mishaps if number == self._trusted else 0
            self._trusted, self._trusted_at, self._lost, self.closed = number, time.monotonic(), None, None
            self._backlog.trust(number)
            self.calls = calls
        logger.log(logging.WARNING if again else logging.INFO, "Redis is trusted, in generation %d", number)
        self._resolve()
        if self._cold_away_since is None:
            if state.opened != number:
                with contextlib.suppress(TieredSaverError), contextlib.closing(self._make_probe()) as probe:
                    tier.record_opened(probe, self._keyspace.prefix, number)
            if not state.is_filled:
                self._fill(number)

    def _fill(self, number: int) -> None:
        """Tell Redis which threads PostgreSQL has, at once if that are none; of several processes, one does."""
        nothing = self._pool.run(threads.is_empty)

        def fill() -> None:
            try:
                with contextlib.closing(self._make_probe()) as probe:
                    if nothing:
                        tier.fill(probe, self._keyspace, number, {})
                    elif tier.acquire_filling(probe, self._keyspace.prefix):
                        shard_of = self._keyspace.shard_of
                        bits = self._pool.run(lambda c: threads.seen_bits(c, shard_of, seen_bit), bounded=False)
                        tier.fill(probe, self._keyspace, number, bits)
            except (TieredSaverError, redis.RedisError, OSError) as error:
                logger.info("Redis was not told which threads there are; new ones are read cold once: %s", error)

        if nothing:
            fill()
        else:
            threading.Thread(target=fill, name="langgraph-tiered-fill", daemon=True).start()

    # --- those who wait ------------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for ticket in waiters:
            if ticket.set_running_or_notify_cancel():
                ticket.set_result(None)

    def _refuse(self, error: TieredSaverError) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for ticket in waiters:
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(error)

    def _away(self) -> HotTierUnavailableError:
        return HotTierUnavailableError(
            f"Redis is away ({self._lost or 'it does not answer'}); nothing was acknowledged. The call can be "
            "repeated; with fallback=True it would go on through PostgreSQL."
        )

    def both_away(self, error: TieredSaverError) -> BothTiersUnavailableError:
        """Make the error of an operation that had to do without Redis, and met a PostgreSQL that is away."""
        return BothTiersUnavailableError(
            f"Redis is away ({self._lost or 'it does not answer'}), and so is PostgreSQL ({error}). Nothing was "
            "acknowledged; what was before is safe. The call can be repeated when one of them is back."
        )


def _error_of(ticket: Ticket) -> BaseException | None:
    return ticket.exception() if ticket.done() and not ticket.cancelled() else None
