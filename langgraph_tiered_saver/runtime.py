"""What the savers of one process share: clients, pools, the flusher. Built lazily, and anew in a forked child."""

from __future__ import annotations

import atexit
import logging
import os
import random
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg.rows import dict_row

from langgraph_tiered_saver.backlog import Backlog
from langgraph_tiered_saver.cold import direct, generations, quarantine, schema
from langgraph_tiered_saver.cold.pool import (
    ColdPool,
    Connection,
    Pool,
    is_missing_schema,
    is_poison,
    leave_to_parent,
    make_pool,
)
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    AcknowledgementShortfallError,
    BothTiersUnavailableError,
    ColdTierRejectedError,
    ColdTierUnavailableError,
    ConfigurationError,
    HotTierRejectedError,
    HotTierUnavailableError,
    SaverClosedError,
    ThreadQuarantinedError,
    TieredSaverError,
)
from langgraph_tiered_saver.executor import DaemonExecutor
from langgraph_tiered_saver.flusher import Flusher
from langgraph_tiered_saver.health import Health, InstanceGuard
from langgraph_tiered_saver.hot import clients, tier
from langgraph_tiered_saver.hot.clients import LoopClients, SyncRedis
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.leases import LeaseKeeper
from langgraph_tiered_saver.recent import RecentValues
from langgraph_tiered_saver.records import Record
from langgraph_tiered_saver.reuse import ElementReuse
from langgraph_tiered_saver.stats import Counters, TieredStats

logger = logging.getLogger(__name__)

T = TypeVar("T")
_COMPUTING_THREADS = 2  # more would only fight for the interpreter
_CONFLICT_PAUSE = (0.005, 0.05)  # seconds
_SAME_OUTAGE = 60.0  # seconds between two such writes that belong to one outage
_OPENING_STEP = 0.01  # seconds between two steps towards a trusted generation when a process begins


class Runtime:
    """The open tiers of one process.

    Attributes:
        calls: Builds calls that belong to no generation (of journals and shards); only usable when `ready`.
        ready: The tiers were checked and set up.
        run_leases: The tokens of the threads whose run lease this process holds.
        leases: Takes, renews and gives up run leases.
        recent: The values stored last, which deltas are made to.
        reuse: Knows the bytes of messages that were serialized before, if that is asked for.
        writer: Names what this process's memory holds.
        durable_channels: Writes to these return once PostgreSQL has them.
    """

    calls: tier.HotCalls
    flusher: Flusher
    health: Health

    def __init__(
        self,
        client: SyncRedis,
        loops: LoopClients,
        pool: ColdPool,
        config: TieredConfig,
        *,
        guard: InstanceGuard,
        make_probe: Callable[[], SyncRedis],
    ) -> None:
        """Take over what reaches the tiers; nothing is connected yet.

        Args:
            client: The synchronous client.
            loops: The asynchronous ones.
            pool: The cold tier.
            config: Settings.
            guard: Looks at every new connection of the clients.
            make_probe: Makes a client with short time-outs.
        """
        self.client = client
        self.loops = loops
        self.pool = pool
        self.config = config
        self.backlog = Backlog(config)
        self.recent = RecentValues(config.delta_memory_bytes)
        self.reuse = ElementReuse(config.reuse_memory_bytes) if config.reuse_memory_bytes else None
        self.counters = Counters()
        self.executor = DaemonExecutor(config.postgres_pool_size, "langgraph-tiered-cold")
        self.computing = DaemonExecutor(_COMPUTING_THREADS, "langgraph-tiered-computing")
        self.pid = os.getpid()
        self.ready = False
        self.closed = False
        self.run_leases: dict[str, str] = {}
        self.leases = LeaseKeeper(
            client,
            pool,
            config,
            self.run_leases,
            hot=lambda: self.hot if self.ready else None,
            cold=self._on_cold,
            lose=lambda error, calls: self.health.lose(error, calls),
        )
        self._guard = guard
        self._make_probe = make_probe
        self.writer = tier.Writer()
        self._setup_lock = threading.Lock()
        self._attempts = 0
        self._failure: TieredSaverError | None = None
        self._marked_at = self._not_durable_at = float("-inf")
        self.durable_channels = frozenset(name.strip() for name in config.durable_channels.split(",")) - {""}

    @property
    def hot(self) -> tier.HotCalls | None:
        """The calls of the generation in which the hot tier may be used; None while it may not."""
        return self.health.trusted() if hasattr(self, "health") else None

    # --- setup ---------------------------------------------------------------------------------------------------

    def open(self, *, explicit: bool = False) -> None:
        """Check both tiers, set up what is missing and start the flusher. Blocking; once for each process.

        One tier may be away, if the other one knows what was set up.

        Args:
            explicit: Called by `setup()`: create what is missing whatever `auto_setup` says; both tiers must be there.

        Raises:
            ConfigurationError: Redis cannot be used, or nothing was set up and `auto_setup` is off.
            HotTierUnavailableError, ColdTierUnavailableError, ColdTierRejectedError: a tier cannot be used.
        """
        attempts = self._attempts
        with self._setup_lock:
            if self.ready and not explicit:
                return
            if self._failure is not None and self._attempts > attempts:
                # Somebody tried while this call waited; its turn would only take as long again.
                raise type(self._failure)(*self._failure.args) from self._failure
            try:
                self._open(explicit=explicit)
                self._failure = None
            except TieredSaverError as error:
                self._failure = error
                raise
            finally:
                self._attempts += 1

    def _open(self, *, explicit: bool) -> None:
        meta: dict[str, str] = {}
        hot_error: HotTierUnavailableError | None = None
        try:
            tier.check_server(self.client, self.config)
            meta = tier.read_meta(self.client, self.config.key_prefix)
            tier.check_meta(meta, None)
        except HotTierUnavailableError as error:
            if explicit or not self.config.fallback:
                raise
            hot_error = error
        shards = self._shards(meta, hot_error, explicit=explicit)
        if shards != self.config.shard_count:
            logger.warning(
                "shard_count=%d is ignored: %d was recorded at the first setup",
                self.config.shard_count,
                shards,
            )
        if not self.ready:
            self._start(Keyspace(self.config.key_prefix, shards))

    def _shards(self, meta: dict[str, str], hot_error: HotTierUnavailableError | None, *, explicit: bool) -> int:
        """Give the recorded number of shards, and set up what is missing."""
        try:
            storage = self.config.storage
            recorded = self.pool.run(lambda connection: schema.recorded(connection, storage), probing=True)
            if recorded is None or explicit:
                if not (explicit or self.config.auto_setup):
                    raise ConfigurationError(
                        f"Nothing is set up under key prefix {self.config.key_prefix!r} and auto_setup is off. "
                        "Call setup() or asetup() once; nothing was written."
                    )
                if hot_error is not None:
                    # Nobody has ever reached this Redis: more likely a wrong URL than an outage.
                    raise hot_error
                # A database that was made anew under a Redis in use goes on in its generation.
                generation = (int(meta["generation"]), True) if meta else (1, False)
                recorded = self.pool.run(
                    lambda connection: schema.setup(connection, self.config, generation=generation), bounded=False
                )
            return int(recorded["shards"])
        except ColdTierUnavailableError as error:
            if hot_error is not None:
                raise BothTiersUnavailableError(f"{hot_error} {error}") from error
            if explicit or not meta:
                raise
            # Redis knows enough to go on; what PostgreSQL alone can answer has to wait.
            return int(meta["shards"])

    def _start(self, keyspace: Keyspace) -> None:
        self.calls = tier.HotCalls(keyspace, self.config, 0)
        self.health = Health(
            pool=self.pool,
            config=self.config,
            keyspace=keyspace,
            backlog=self.backlog,
            guard=self._guard,
            member=f"{socket.gethostname()}:{self.pid}:{secrets.token_hex(4)}",
            make_probe=self._make_probe,
            make_calls=lambda generation, evicts: tier.HotCalls(
                keyspace, self.config, generation, evicts=evicts, writer=self.writer, run_leases=self.run_leases
            ),
            reconnect=self._reconnect,
            repair_schema=self._repair_schema,
        )
        self.flusher = Flusher(
            self.backlog,
            self.client,
            self.calls,
            self.pool,
            self.config,
            self.counters,
            self.health,
            self._repair_schema,
        )
        # What is there to be trusted is trusted at once, so that the first call is answered by it.
        deadline = time.monotonic() + self.config.redis_timeout
        while self.health.step() and self.hot is None and self.health.is_reachable and time.monotonic() < deadline:
            time.sleep(_OPENING_STEP)
        if self.hot is None and isinstance(self.health.problem, (ConfigurationError, HotTierRejectedError)):
            raise self.health.problem
        self.health.start()
        self.flusher.start()
        # Registered late, so that it runs before anything that was started earlier is stopped.
        atexit.register(_drain_at_exit, weakref.ref(self))
        self.ready = True

    def _reconnect(self) -> None:
        """Let idle connections be made anew; those in use are left to those who use them."""
        clients.reconnect(self.client)
        self.loops.reconnect()

    def _repair_schema(self) -> None:
        """Create the tables anew after somebody dropped them."""
        if not self.config.auto_setup:
            return
        logger.warning("PostgreSQL's tables are missing; setting them up again")
        with self.pool.connection(statements=0) as connection:
            hot = self.health.calls
            generation = (hot.generation, True) if hot is not None else (1, False)
            schema.setup(connection, self.config, generation=generation, repair=True)

    # --- use -----------------------------------------------------------------------------------------------------

    def cold(self, work: Callable[[Connection], T]) -> T:
        """Run a read on the cold tier; blocking.

        Raises:
            ColdTierUnavailableError, ColdTierRejectedError: it could not be read.
        """
        self.counters.add("cold_reads")
        return self._on_cold(work)

    def read_past(self, closed: int, work: Callable[[Connection], T]) -> tuple[bool, T | None]:
        """Run a read on the cold tier while a generation is closed; blocking.

        Returns:
            Whether it is still closed, and what was read.

        Raises:
            ColdTierUnavailableError, ColdTierRejectedError: it could not be read.
        """
        self._mark_unreachable()
        self.counters.add("cold_reads")
        try:
            return True, self._on_cold(lambda connection: direct.read(connection, closed, work))
        except ColdTierUnavailableError as error:
            raise self.health.both_away(error) from error
        except direct.GenerationMovedError:
            self.health.moved(closed)
            return False, None

    def write_past(self, closed: int, thread_id: str, record: Record) -> bool:
        """Write a record straight to the cold tier while a generation is closed; blocking.

        Returns:
            Whether it is still closed; if not, nothing was written.

        Raises:
            ColdTierUnavailableError, ColdTierRejectedError: it was not acknowledged.
            StaleWriterError, ThreadQuarantinedError: as `direct.write` says.
        """
        self._mark_unreachable()
        deadline = time.monotonic() + self.config.postgres_timeout
        while True:
            try:
                self._on_cold(
                    lambda connection: direct.write(
                        connection,
                        closed,
                        thread_id,
                        record,
                        shard_of=self.calls.keyspace.shard_of,
                        lease=self.run_leases.get(thread_id, ""),
                        statement_timeout=self.config.postgres_statement_timeout,
                    )
                )
            except direct.GenerationMovedError:
                self.health.moved(closed)
                return False
            except ColdTierUnavailableError as error:
                # A conflict with another transaction passes at once. And PostgreSQL is there if it was this process
                # that stood still until its transaction was ended.
                conflicts = isinstance(error.__cause__, psycopg.errors.TransactionRollback)
                stood_still = isinstance(error.__cause__, psycopg.errors.IdleInTransactionSessionTimeout)
                if not stood_still and (not conflicts or time.monotonic() > deadline):
                    raise self.health.both_away(error) from error
                time.sleep(random.uniform(*_CONFLICT_PAUSE))  # noqa: S311 - jitter
            else:
                self.counters.add("direct_writes")
                return True

    def retry_quarantined(self, thread_id: str) -> int:
        """Write what waits of a thread in quarantine, and end that; blocking.

        Returns:
            How many records were written.

        Raises:
            ThreadQuarantinedError: PostgreSQL refuses again; everything is as it was.
            ColdTierUnavailableError, ColdTierRejectedError: it could not be tried.
        """
        try:
            try:
                written = self._on_cold(
                    lambda connection: quarantine.retry(
                        connection,
                        thread_id,
                        shard_of=self.calls.keyspace.shard_of,
                        statement_timeout=self.config.postgres_statement_timeout,
                        storage=self.config.storage,
                    )
                )
            except ColdTierRejectedError as error:
                if isinstance(error.__cause__, psycopg.Error) and is_poison(error.__cause__):
                    raise quarantine.StillRefusedError(quarantine.reason_of(error.__cause__)) from error
                raise
        except quarantine.StillRefusedError as error:
            raise ThreadQuarantinedError(
                f"Thread {thread_id!r:.80} is still quarantined: {error}. All its records are kept, and nothing was "
                "written.",
                thread_id=thread_id,
            ) from error
        self.backlog.release([thread_id])
        return written

    def assert_run_lease(self, thread_id: str) -> None:
        """Let Redis know the run lease that this process holds on a thread, which it does not know; blocking.

        Raises:
            StaleWriterError: the lease is lost.
            ColdTierUnavailableError: PostgreSQL, which would know, cannot be asked.
        """
        self.leases.reassert(thread_id)

    def wait_for_replicas(self, thread_id: str) -> None:
        """Wait until as many replicas as `hot_ack` says have what was acknowledged on a thread; blocking.

        Raises:
            AcknowledgementShortfallError: fewer have, and `hot_ack_strict` is set.
        """
        config = self.config
        try:
            short = tier.wait_for_replicas(self.client, self.calls.keyspace.thread(thread_id).probe, config)
        except HotTierUnavailableError as error:
            # The record is in this process's memory, from which it is flushed.
            short = str(error)
        if short and config.hot_ack_strict:
            raise AcknowledgementShortfallError(
                f"{short}. The write is acknowledged and will be flushed to PostgreSQL; repeating it is safe."
            )
        if short:
            self.counters.add("hot_ack_shortfalls")
            logger.warning("%s", short)

    def count_not_durable(self) -> None:
        """Count a write that should be durable when it returns and is only journaled; log the first of an outage."""
        self.counters.add("not_durable")
        now = time.monotonic()
        if now - self._not_durable_at > _SAME_OUTAGE:
            logger.warning(
                "PostgreSQL is away, so writes that should be durable there when they return (durable_channels) are "
                "only journaled; stats().not_durable counts them"
            )
        self._not_durable_at = now

    def _mark_unreachable(self) -> None:
        """Put off the opening of the generation while this process goes past a Redis that it cannot reach."""
        now = time.monotonic()
        if not self.health.is_reachable and now - self._marked_at > self.config.poll_interval / 3:
            self._marked_at = now
            self._on_cold(generations.mark_unreachable)

    def _on_cold(self, work: Callable[[Connection], T]) -> T:
        try:
            try:
                return self.pool.run(work)
            except ColdTierRejectedError as error:
                if not (isinstance(error.__cause__, psycopg.Error) and is_missing_schema(error.__cause__)):
                    raise
                self._repair_schema()
                return self.pool.run(work)
        except TieredSaverError:
            self.counters.add("cold_errors")
            raise

    def stats(self) -> TieredStats:
        """Count."""
        state = self.backlog.state()
        return TieredStats(
            backlog_records=state.records,
            backlog_bytes=state.bytes,
            memory_bytes=state.memory_bytes,
            flush_lag_seconds=state.oldest_age,
            quarantined_threads=state.quarantined,
            flusher_healthy=self.flusher.healthy if self.ready else True,
            hot_trusted=self.ready and self.hot is not None,
            cold_available=self.pool.broken is None,
            generation=hot.generation if self.ready and (hot := self.hot) is not None else 0,
            **self.counters.values(),
        )

    # --- the end -------------------------------------------------------------------------------------------------

    def drain(self, timeout: float) -> None:
        """Flush what can be flushed within `timeout` seconds, and stop the flusher."""
        if self.ready:
            left = self.flusher.stop(timeout)
            self.health.stop(farewell=not left)
            if left:
                logger.warning(
                    "Closed with %d records not in PostgreSQL yet. They are in the journal, and the next process "
                    "or `langgraph-tiered worker` adopts them",
                    left,
                )

    def close(self) -> None:
        """Drain until the deadline, then close everything but asynchronous clients; blocking."""
        self.closed = True
        self.leases.stop()
        self.drain(self.config.close_timeout)
        self.pool.close()
        self.executor.shutdown()
        self.computing.shutdown()
        self.loops.close_others()
        self.client.close()

    async def close_async_client(self) -> None:
        """Close the running loop's client."""
        await self.loops.close_current()


_abandoned: list[Any] = []


def _drain_at_exit(reference: weakref.ref[Runtime]) -> None:
    """Give an interpreter that exits without close() a bounded chance to flush; the journal keeps the rest."""
    runtime = reference()
    if runtime is not None and runtime.pid == os.getpid() and not runtime.closed:
        runtime.drain(runtime.config.exit_timeout)


class RuntimeSource:
    """Gives the process's runtime, building a new one after a fork. Clones of a saver share one source."""

    def __init__(self, build: Callable[[], Runtime]) -> None:
        """Remember how to build a runtime; nothing is built or connected yet."""
        self._build = build
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._closed = False
        _sources.add(self)

    def current(self) -> Runtime:
        """Give this process's runtime.

        Raises:
            SaverClosedError: the saver was closed.
        """
        runtime = self._runtime
        if runtime is None or self._closed:
            with self._lock:
                if self._closed:
                    raise SaverClosedError(
                        "The saver was closed. What it acknowledged is in PostgreSQL or in the journal; make a new one."
                    )
                if self._runtime is None:
                    self._runtime = self._build()
                runtime = self._runtime
        return runtime

    def close(self) -> Runtime | None:
        """Refuse further use.

        Returns:
            The runtime to close; None if there is none, or somebody else closes it.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            return self._runtime if first else None

    def after_fork(self) -> None:
        """In a forked child: forget the parent's runtime. A closed saver stays closed."""
        self._lock = threading.Lock()
        if self._runtime is not None:
            # Collecting a connection would say goodbye on the parent's socket, so it may never be collected.
            _abandoned.append(self._runtime)
            self._runtime = None


_sources: weakref.WeakSet[RuntimeSource] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    leave_to_parent()
    for source in list(_sources):
        source.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def clone_pool(given: Pool, config: TieredConfig) -> Pool:
    """Make a pool like the user's for a forked child, which must not share its parent's connections."""
    options = given.kwargs if isinstance(given.kwargs, dict) else {}
    conninfo = given.conninfo if isinstance(given.conninfo, str) else psycopg.conninfo.make_conninfo()
    configure = getattr(given, "_configure", None)  # psycopg_pool has no public way to ask
    return make_pool(conninfo, config, {**options, "autocommit": True, "row_factory": dict_row}, configure)
