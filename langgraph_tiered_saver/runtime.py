"""What the savers of one process share: clients, pools, the flusher. Built lazily, and anew in a forked child."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg.rows import dict_row

from langgraph_tiered_saver.backlog import Backlog
from langgraph_tiered_saver.cold import schema
from langgraph_tiered_saver.cold.pool import ColdPool, Connection, Pool, is_missing_schema, leave_to_parent, make_pool
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ColdTierRejectedError, ConfigurationError, SaverClosedError, TieredSaverError
from langgraph_tiered_saver.executor import DaemonExecutor
from langgraph_tiered_saver.flusher import Flusher
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.clients import LoopClients, SyncRedis
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.stats import Counters, TieredStats

logger = logging.getLogger(__name__)

T = TypeVar("T")
_FORMAT = "1"  # of keys, scripts and records


class Runtime:
    """The open tiers of one process.

    Attributes:
        calls: Builds calls of the hot tier; only usable when `ready`.
        ready: Both tiers were checked and set up.
    """

    calls: tier.HotCalls
    flusher: Flusher

    def __init__(
        self,
        client: SyncRedis,
        loops: LoopClients,
        pool: ColdPool,
        config: TieredConfig,
        *,
        close_client: bool,
    ) -> None:
        self.client = client
        self.loops = loops
        self.pool = pool
        self.config = config
        self.backlog = Backlog(config)
        self.counters = Counters()
        self.executor = DaemonExecutor(config.postgres_pool_size, "langgraph-tiered-cold")
        self.pid = os.getpid()
        self.ready = False
        self.closed = False
        self._close_client = close_client
        self._setup_lock = threading.Lock()
        self._attempts = 0
        self._failure: TieredSaverError | None = None

    # --- setup ---------------------------------------------------------------------------------------------------

    def open(self, *, explicit: bool = False) -> None:
        """Check both tiers, set up what is missing and start the flusher. Blocking; once for each process.

        Args:
            explicit: Called by `setup()`: create what is missing whatever `auto_setup` says.

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
        evicts = tier.check_server(self.client, self.config)
        meta = tier.read_meta(self.client, self.config.key_prefix)
        if not meta or explicit:
            if not (explicit or self.config.auto_setup):
                raise ConfigurationError(
                    f"Nothing is set up under key prefix {self.config.key_prefix!r} and auto_setup is off. "
                    "Call setup() or asetup() once; nothing was written."
                )
            meta = self._set_up()
        if meta.get("format") != _FORMAT:
            raise ConfigurationError(
                f"Redis holds data of format {meta.get('format')!r} under key prefix {self.config.key_prefix!r}, "
                f"but this version reads {_FORMAT!r}. Upgrade, or choose another key_prefix."
            )
        shards = int(meta["shards"])
        if shards != self.config.shard_count:
            logger.warning(
                "shard_count=%d is ignored: %d was recorded at the first setup",
                self.config.shard_count,
                shards,
            )
        if not self.ready:
            keyspace = Keyspace(self.config.key_prefix, shards, int(meta["generation"]))
            self.calls = tier.HotCalls(keyspace, self.config, evicts=evicts)
            self.flusher = Flusher(
                self.backlog,
                self.client,
                self.calls,
                self.pool,
                self.config,
                self.counters,
                self._repair_schema,
            )
            self.flusher.start()
            # Registered late, so that it runs before anything that was started earlier is stopped.
            atexit.register(_drain_at_exit, weakref.ref(self))
            self.ready = True

    def _set_up(self) -> dict[str, str]:
        recorded, floor = self.pool.run(
            lambda connection: (schema.setup(connection, self.config), schema.last_sequence(connection)), bounded=False
        )
        keyspace = Keyspace(self.config.key_prefix, int(recorded["shards"]), int(recorded["generation"]))
        return tier.write_meta(self.client, keyspace, {"format": _FORMAT, **recorded}, floor + 1)

    def _repair_schema(self) -> None:
        """Create the tables anew after somebody dropped them."""
        if not self.config.auto_setup:
            return
        logger.warning("PostgreSQL's tables are missing; setting them up again")
        with self.pool.connection(statements=0) as connection:
            schema.setup(connection, self.config, repair=True)

    # --- use -----------------------------------------------------------------------------------------------------

    def cold(self, work: Callable[[Connection], T]) -> T:
        """Run a read on the cold tier; blocking.

        Raises:
            ColdTierUnavailableError, ColdTierRejectedError: it could not be read.
        """
        self.counters.add("cold_reads")
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
            generation=self.calls.keyspace.generation if self.ready else 0,
            **self.counters.values(),
        )

    # --- the end -------------------------------------------------------------------------------------------------

    def drain(self, timeout: float) -> None:
        """Flush what can be flushed within `timeout` seconds, and stop the flusher."""
        if self.ready:
            left = self.flusher.stop(timeout)
            if left:
                logger.warning(
                    "Closed with %d records not in PostgreSQL yet. They are in the journal, and the next process "
                    "or `langgraph-tiered worker` adopts them",
                    left,
                )

    def close(self) -> None:
        """Drain until the deadline, then close everything but asynchronous clients; blocking."""
        self.closed = True
        self.drain(self.config.close_timeout)
        self.pool.close()
        self.executor.shutdown()
        self.loops.close_others()
        if self._close_client:
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
