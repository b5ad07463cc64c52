"""Every operation of the saver, written once, as a generator that yields requests and receives their replies.

`drivers` runs them, one way for synchronous callers and one for asynchronous ones.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_tiered_saver import codec, crash_points, history
from langgraph_tiered_saver.backlog import Ticket
from langgraph_tiered_saver.cold import maintenance, quarantine, reader, retention, threads
from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.errors import (
    BacklogFullError,
    ColdTierUnavailableError,
    FlushTimeoutError,
    HotTierUnavailableError,
    InvalidInputError,
    StaleWriterError,
    ThreadQuarantinedError,
    TierUnavailableError,
    stale_writer,
)
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.tier import LeaseUnknownError
from langgraph_tiered_saver.leases import HeldLease, Outcome
from langgraph_tiered_saver.names import ThreadPosition, check_filter, position_of, text_of
from langgraph_tiered_saver.records import MaintenanceRecord, Record, encode
from langgraph_tiered_saver.runtime import Runtime

T = TypeVar("T")
Operation = Generator[Any, Any, T]

PRUNE_STRATEGIES = ("keep_latest", "delete", "delete_all")


@dataclass(frozen=True)
class Blocking:
    """Request: call a function that blocks; asynchronous callers reach it through a thread pool."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Compute:
    """Request: call a function that takes long without waiting; asynchronous callers leave the event loop for it."""

    work: Callable[[], Any]


# Bytes whose serializing would hold up an event loop for more than 4 ms: in a thread, the longest pause is less than
# half, and the call takes no longer (`python -m tests.benchmarks --only loop`).
LARGE = 128 * 1024


@dataclass(frozen=True)
class Wait:
    """Request: wait until all tickets are resolved; the reply is how many were not by the deadline.

    A ticket that failed raises its error.
    """

    tickets: Sequence[Future[None]]
    timeout: float | None


def ready(runtime: Runtime) -> Operation[None]:
    """Set up on first use."""
    if not runtime.ready:
        yield Blocking(runtime.open)


def _past(runtime: Runtime) -> Operation[int | None]:
    """Wait for a way to go on without Redis.

    Returns:
        The closed generation in which operations may go past it; None if it is trusted again.

    Raises:
        HotTierUnavailableError: it is away, and going past it is not wanted, or PostgreSQL is away too.
        ColdTierUnavailableError: other processes did not bring what they hold to PostgreSQL in time.
    """
    timeout = runtime.config.flush_timeout
    while runtime.hot is None:
        closed = runtime.health.closed
        if closed is not None and runtime.config.fallback:
            return closed
        if (yield Wait([runtime.health.want()], timeout)):
            raise ColdTierUnavailableError(
                "Redis is away, and other processes did not bring what they acknowledged to PostgreSQL within "
                f"{timeout:g} s, so nobody can go past it yet. Nothing was acknowledged; the call can be repeated."
            )
    return None


# --- writing -----------------------------------------------------------------------------------------------------


def put(
    runtime: Runtime,
    serde: SerializerProtocol,
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
) -> Operation[RunnableConfig]:
    """Acknowledge a checkpoint: one round trip, two when the parent is not hot."""
    recent = runtime.recent
    is_large = recent.bytes >= LARGE and codec.last_size(config, new_versions, recent) >= LARGE
    encode_all = partial(
        codec.encode_checkpoint, serde, config, checkpoint, metadata, new_versions, recent, runtime.reuse
    )
    encoded = (yield Compute(encode_all)) if is_large else encode_all()
    thread_id = encoded.position.thread_id
    if not runtime.ready:
        yield from ready(runtime)

    def call(hot: tier.HotCalls) -> Operation[tuple[tier.Appended, bytes]]:
        payload = encode(encoded.record(), hot.generation)
        reply = tier.appended((yield hot.put(encoded, payload)))
        if reply is None:
            if is_large:
                yield Compute(encoded.carry_every_channel)
            else:
                encoded.carry_every_channel()
            payload = encode(encoded.record(), hot.generation)
            reply = tier.appended((yield hot.put(encoded, payload)))
            assert reply is not None  # noqa: S101 - a complete record is never sent back
        return reply, payload

    def record() -> Record:
        encoded.carry_every_channel()
        return encoded.record()

    if (yield from _write(runtime, thread_id, call, record)):
        encoded.remember(recent)
    runtime.counters.add("checkpoints")
    return encoded.position.config()


def put_writes(
    runtime: Runtime,
    serde: SerializerProtocol,
    config: RunnableConfig,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> Operation[None]:
    """Acknowledge one call's writes: one round trip."""
    position, record = codec.encode_writes(serde, config, writes, task_id, task_path)
    if not writes:
        return
    if not runtime.ready:
        yield from ready(runtime)

    def call(hot: tier.HotCalls) -> Operation[tuple[tier.Appended, bytes]]:
        payload = encode(record, hot.generation)
        reply = tier.appended((yield hot.put_writes(position.thread_id, position.checkpoint_ns, payload)))
        assert reply is not None  # noqa: S101 - writes are never sent back
        return reply, payload

    durable = any(channel in runtime.durable_channels for channel, _ in writes)
    yield from _write(runtime, position.thread_id, call, lambda: record, durable=durable)
    runtime.counters.add("writes")


def _write(
    runtime: Runtime,
    thread_id: str,
    call: Callable[[tier.HotCalls], Operation[tuple[tier.Appended, bytes]]],
    record: Callable[[], Record],
    *,
    durable: bool = False,
    maintains: bool = False,
) -> Operation[bool]:
    """Acknowledge a record: in Redis, or past it.

    Args:
        runtime: The open tiers.
        thread_id: The record's thread.
        call: Acknowledges it in a generation, and gives the reply and the record as it was sent.
        record: Makes the record that carries everything it needs.
        durable: Return once PostgreSQL has it, whatever the write mode.
        maintains: It removes or copies rows.

    Returns:
        Whether it is journaled; if not, PostgreSQL has it.
    """
    while True:
        hot = runtime.hot
        if hot is None:
            closed = yield from _past(runtime)
            if closed is not None:
                write = partial(runtime.write_past, closed, thread_id, record())
                if (yield Blocking(write)):
                    return False
            continue
        if not runtime.backlog.has_room():
            yield from _wait_for_room(runtime)
        crash_points.reach("before_journal")
        ticket: Ticket | None = Future() if durable or runtime.config.write_mode == "through" else None
        is_held = False
        try:
            reply, payload = yield from call(hot)
            crash_points.reach("after_journal")
            is_held = runtime.hot is hot and runtime.backlog.add(
                thread_id,
                reply.sequence,
                reply.previous,
                payload,
                generation=hot.generation,
                ticket=ticket,
                soft=_is_soft(runtime),
                maintains=maintains,
            )
        except LeaseUnknownError:
            yield Blocking(lambda: runtime.assert_run_lease(thread_id))
        except StaleWriterError:
            raise stale_writer(thread_id) from None
        except HotTierUnavailableError as error:
            runtime.health.lose(error, hot)
        finally:
            # Also when the caller was cancelled meanwhile: Redis may have it, and nothing must be built on that.
            if not is_held:
                runtime.writer.renew()
        if is_held:
            yield from _wait_where_asked(runtime, thread_id, ticket)
            return True


def _is_soft(runtime: Runtime) -> bool:
    """Whether a write that should be durable may return without that while PostgreSQL is away."""
    return not (runtime.config.write_mode == "through" or runtime.config.durable_strict)


def _wait_for_room(runtime: Runtime) -> Operation[None]:
    timeout = runtime.config.backlog_timeout
    if (yield Wait([runtime.backlog.room()], timeout)):
        state = runtime.backlog.state()
        raise BacklogFullError(
            f"{state.records} records ({state.bytes / 2**20:.0f} MiB) wait for PostgreSQL, and that did not change for "
            f"{timeout:g} s. This write was not made; what was acknowledged before is safe in the journal. "
            "Repair or relieve PostgreSQL, or raise max_backlog_records and max_backlog_bytes."
        )


def _wait_where_asked(runtime: Runtime, thread_id: str, ticket: Ticket | None) -> Operation[None]:
    """Wait until replicas, or PostgreSQL, have an acknowledged record, where that is asked for."""
    config = runtime.config
    if config.hot_ack or config.hot_ack_aof:
        yield Blocking(lambda: runtime.wait_for_replicas(thread_id))
    if ticket is None:
        return
    soft = _is_soft(runtime)
    timeout = min(config.flush_timeout, config.postgres_timeout) if soft else config.flush_timeout
    try:
        late = yield Wait([ticket], timeout)
    except TierUnavailableError:
        late = 1
    if late and soft:
        runtime.count_not_durable()
    elif late:
        raise FlushTimeoutError(
            f"The record is safe in the journal, but was not in PostgreSQL after {timeout:g} s. It will be flushed "
            "when PostgreSQL takes it; repeating the call is safe.",
            records=1,
        )


def take_lease(runtime: Runtime, lease: HeldLease) -> Operation[bool]:
    """Try to take a run lease that this process has reserved; False if another run holds it."""
    outcome = Outcome.MOVED
    while outcome is Outcome.MOVED:
        hot, closed = runtime.hot, None
        if hot is None:
            closed = yield from _past(runtime)
            if closed is None:
                continue
        outcome = yield Blocking(partial(runtime.leases.attempt, lease, hot, closed))
        if outcome is Outcome.MOVED and closed is not None:
            runtime.health.moved(closed)
    return outcome is Outcome.HELD


# --- reading -----------------------------------------------------------------------------------------------------


def _read(
    runtime: Runtime,
    with_hot: Callable[[tier.HotCalls], Operation[T]],
    work: Callable[[Connection], T],
    count: str = "",
) -> Operation[T]:
    """Read with the help of the hot tier, or past it.

    Args:
        runtime: The open tiers.
        with_hot: Reads in a generation.
        work: Reads from PostgreSQL when that has everything.
        count: Counter of reads that went past Redis.
    """
    if not runtime.ready:
        yield from ready(runtime)
    while True:
        hot = runtime.hot
        if hot is None:
            closed = yield from _past(runtime)
            if closed is not None:
                done, found = yield Blocking(partial(runtime.read_past, closed, work))
                if done:
                    if count:
                        runtime.counters.add(count)
                    return found  # type: ignore[no-any-return]
            continue
        try:
            answer = yield from with_hot(hot)
        except HotTierUnavailableError as error:
            runtime.health.lose(error, hot)
            continue
        # An answer counts only while the server that gave it is trusted.
        if runtime.hot is hot:
            return answer


def get_tuple(runtime: Runtime, serde: SerializerProtocol, config: RunnableConfig) -> Operation[CheckpointTuple | None]:
    """Read a checkpoint: one round trip if it is the hot one."""
    position = position_of(config, what="get_tuple")

    def with_hot(hot: tier.HotCalls) -> Operation[CheckpointTuple | None]:
        if position.checkpoint_id:
            found = yield from _get_by_id(runtime, hot, serde, position)
            return found
        fields = yield hot.get(position.thread_id, position.checkpoint_ns)
        tuple_ = (yield from _decoded(runtime, hot, serde, position, fields)) if fields else None
        if tuple_ is not None:
            runtime.counters.add("hot_hits")
            return tuple_
        runtime.counters.add("hot_misses")
        missed = yield from _miss(runtime, hot, serde, position)
        return missed

    def past(connection: Connection) -> CheckpointTuple | None:
        cold = reader.read_checkpoint(connection, serde, position)
        return cold.load(serde) if cold is not None else None

    found = yield from _read(runtime, with_hot, past, "direct_reads")
    return found


def _decoded(
    runtime: Runtime, hot: tier.HotCalls, serde: SerializerProtocol, position: ThreadPosition, fields: Sequence[bytes]
) -> Operation[CheckpointTuple | None]:
    """Make a tuple of a hot hash's fields and values."""
    decode = partial(codec.decode_hot, serde, position, _pairs(fields), hot.generation, runtime.recent)
    tuple_: CheckpointTuple | None = (yield Compute(decode)) if sum(map(len, fields)) >= LARGE else decode()
    return tuple_


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _get_by_id(
    runtime: Runtime, hot: tier.HotCalls, serde: SerializerProtocol, position: ThreadPosition
) -> Operation[CheckpointTuple | None]:
    fields, journal_length = yield hot.get_by_id(position.thread_id, position.checkpoint_ns, position.checkpoint_id)
    if fields:
        tuple_ = yield from _decoded(runtime, hot, serde, position, fields)
        if tuple_ is not None:
            runtime.counters.add("hot_hits")
            return tuple_
    if journal_length or runtime.backlog.holds(position.thread_id):
        yield from settle(runtime, [position.thread_id])
    cold = yield from _read_cold(runtime, serde, position)
    if cold is None:
        return None
    loaded: CheckpointTuple = yield Compute(partial(cold.load, serde))
    return loaded


def _read_cold(
    runtime: Runtime, serde: SerializerProtocol, position: ThreadPosition
) -> Operation[reader.ColdCheckpoint | None]:
    found: reader.ColdCheckpoint | None = yield Blocking(
        lambda: runtime.cold(lambda connection: reader.read_checkpoint(connection, serde, position))
    )
    return found


def _miss(
    runtime: Runtime, hot: tier.HotCalls, serde: SerializerProtocol, position: ThreadPosition
) -> Operation[CheckpointTuple | None]:
    """Settle the journal, read cold, and make hot what was read if nothing newer arrived meanwhile."""
    thread_id, ns = position.thread_id, position.checkpoint_ns
    # While PostgreSQL is away there is nothing to warm, and the lease would only cost a round trip.
    runtime.pool.refuse_if_broken()
    token = secrets.token_hex(8)
    if (yield hot.lease(thread_id, ns, token)) or runtime.backlog.holds(thread_id):
        yield from settle(runtime, [thread_id])
    cold = yield from _read_cold(runtime, serde, position)
    if cold is None:
        return None
    warming = cold.warming(hot.generation)
    if warming is not None:
        yield hot.warm(thread_id, ns, token, *warming)
    loaded: CheckpointTuple = yield Compute(partial(cold.load, serde))
    return loaded


def list_page(
    runtime: Runtime,
    serde: SerializerProtocol,
    config: RunnableConfig | None,
    filter: dict[str, Any] | None,
    before: RunnableConfig | None,
    limit: int | None,
) -> Operation[list[CheckpointTuple]]:
    """Read checkpoints as `PostgresSaver.list` does, once PostgreSQL has everything that was acknowledged."""
    check_filter(filter)
    wanted: RunnableConfig | None = None
    names: list[str] | None = None
    if config:
        position = position_of(config, what="list")
        names = [position.thread_id]
        # An absent namespace means all of them, so it must stay absent.
        given = config["configurable"]
        wanted = {
            "configurable": {k: v for k, v in position.config()["configurable"].items() if given.get(k) is not None}
        }
    found = yield from _read_settled(
        runtime, names, lambda c: reader.read_list(c, serde, wanted, filter=filter, before=before, limit=limit)
    )
    return found


def delta_history(
    runtime: Runtime, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
) -> Operation[Mapping[str, DeltaChannelHistory]]:
    """Collect delta channels' writes: one round trip if all of the hot checkpoint's are hot.

    Else they are collected once PostgreSQL has everything of the thread.
    """
    position = position_of(config, what="get_delta_channel_history")
    if not channels:
        return {}
    thread_id, ns, target = position.thread_id, position.checkpoint_ns, position.config()

    def cold(connection: Connection) -> Mapping[str, DeltaChannelHistory]:
        return reader.read_delta_history(connection, serde, target, channels)

    def with_hot(hot: tier.HotCalls) -> Operation[Mapping[str, DeltaChannelHistory]]:
        if position.checkpoint_id:
            flat, _ = yield hot.get_by_id(thread_id, ns, position.checkpoint_id)
        else:
            flat = yield hot.get(thread_id, ns)
        if not flat:
            found = yield from _settled(runtime, hot, [thread_id], cold)
            return found
        fields = _pairs(flat)
        known = history.decode(serde, position, fields, hot.generation, channels)
        if known is not None:
            runtime.counters.add("hot_hits")
            return known
        runtime.counters.add("hot_misses")
        missed = yield from _miss_history(runtime, hot, serde, position, channels, fields)
        return missed

    found = yield from _read(runtime, with_hot, cold)
    return found


def _miss_history(
    runtime: Runtime,
    hot: tier.HotCalls,
    serde: SerializerProtocol,
    position: ThreadPosition,
    channels: Sequence[str],
    fields: Mapping[bytes, bytes],
) -> Operation[Mapping[str, DeltaChannelHistory]]:
    """Settle the journal, read cold, and keep what was read with the hot checkpoint if nothing changed meanwhile."""
    thread_id, target = position.thread_id, position.config()
    runtime.pool.refuse_if_broken()
    token = secrets.token_hex(8)
    if (yield hot.lease(thread_id, position.checkpoint_ns, token)) or runtime.backlog.holds(thread_id):
        yield from settle(runtime, [thread_id])
    raw: Mapping[str, DeltaChannelHistory] = yield Blocking(
        lambda: runtime.cold(lambda c: reader.read_delta_history(c, history.RawSerializer(), target, channels))
    )
    warming = history.warming(position, fields, hot.generation, raw)
    if warming is not None:
        yield hot.warm_history(thread_id, token, warming)
    return history.load(serde, raw)


def thread_ids(
    runtime: Runtime, limit: int | None, before: threads.ThreadSummary | None
) -> Operation[list[threads.ThreadSummary]]:
    """List threads, once PostgreSQL has everything."""
    found = yield from _read_settled(runtime, None, lambda c: threads.list_threads(c, limit, before))
    return found


def _read_settled(runtime: Runtime, names: Sequence[str] | None, work: Callable[[Connection], T]) -> Operation[T]:
    """Read from PostgreSQL once that has everything of some threads (None: of all)."""
    answer = yield from _read(runtime, lambda hot: _settled(runtime, hot, names, work), work)
    return answer


def _settled(
    runtime: Runtime, hot: tier.HotCalls, names: Sequence[str] | None, work: Callable[[Connection], T]
) -> Operation[T]:
    """Settle first, then read."""
    runtime.pool.refuse_if_broken()
    if names is None:
        yield from settle_all(runtime, hot)
    else:
        yield from settle(runtime, names, look=hot)
    found: T = yield Blocking(lambda: runtime.cold(work))
    return found


# --- flushing on demand ------------------------------------------------------------------------------------------


def settle(
    runtime: Runtime, names: Sequence[str], *, look: tier.HotCalls | None = None, timeout: float | None = None
) -> Operation[None]:
    """See to it that PostgreSQL has everything journaled for some threads, whoever wrote it.

    Args:
        runtime: The open tiers.
        names: The threads.
        look: Ask first, in this generation, whether there is anything to flush.
        timeout: Seconds; `flush_timeout` if None.

    Raises:
        HotTierUnavailableError: Redis is not trusted any more, so nobody knows what was journaled.
        ColdTierUnavailableError: PostgreSQL did not take it in time.
        ThreadQuarantinedError: PostgreSQL refused a record of the thread for good.
    """
    if look is not None:
        waiting = []
        for name in names:
            # A Redis that lost its journal must not hide what this process still holds.
            if runtime.backlog.holds(name) or (yield from _journal_length(look, name)):
                waiting.append(name)  # noqa: PERF401 - a comprehension cannot yield
        names = waiting
    if not names:
        return
    timeout = runtime.config.flush_timeout if timeout is None else timeout
    if left := (yield Wait(runtime.backlog.settle(names), timeout)):
        raise ColdTierUnavailableError(
            f"The records of {left} threads could not be brought to PostgreSQL within {timeout:g} s, so they cannot "
            "be read from there now. They are safe in the journal; try again later."
        )


def _journal_length(hot: tier.HotCalls, thread_id: str) -> Operation[int]:
    reply = yield hot.journal(thread_id, 0, 0, hot.generation)
    return int(reply[0])


def settle_all(runtime: Runtime, hot: tier.HotCalls) -> Operation[None]:
    """See to it that PostgreSQL has everything that is journaled now, of all threads."""
    names: list[str] = yield Blocking(lambda: tier.dirty_threads(runtime.client, hot.keyspace, hot.generation))
    yield from settle(runtime, sorted({*names, *runtime.backlog.threads()}))


def flush(runtime: Runtime, timeout: float | None) -> Operation[None]:
    """Wait until PostgreSQL has everything this process has acknowledged."""
    seconds = runtime.config.flush_timeout if timeout is None else timeout
    if (yield Wait(runtime.backlog.everything(), seconds)):
        left = runtime.backlog.records
        raise FlushTimeoutError(
            f"{left} acknowledged records were not in PostgreSQL after {seconds:g} s. They are safe in the journal and "
            "will be flushed when PostgreSQL takes them.",
            records=left,
        )


def wait_durable(runtime: Runtime, config: RunnableConfig, timeout: float | None) -> Operation[None]:
    """Wait until PostgreSQL has a checkpoint, and everything of its thread before it."""
    position = position_of(config, what="wait_durable")
    seconds = runtime.config.flush_timeout if timeout is None else timeout

    def with_hot(hot: tier.HotCalls) -> Operation[bool]:
        yield from settle(runtime, [position.thread_id], look=hot, timeout=seconds)
        found: bool = yield Blocking(lambda: runtime.cold(lambda c: reader.exists(c, position)))
        return found

    try:
        if (yield from _read(runtime, with_hot, lambda c: reader.exists(c, position))):
            return
    except (ColdTierUnavailableError, FlushTimeoutError) as error:
        raise FlushTimeoutError(
            f"Thread {position.thread_id!r:.80} could not be brought to PostgreSQL: {error}", records=1
        ) from error
    raise InvalidInputError(
        f"There is no checkpoint {position.checkpoint_id or '(latest)'!r} in namespace {position.checkpoint_ns!r} of "
        f"thread {position.thread_id!r:.80}, so nobody can wait for it."
    )


# --- removing and copying ----------------------------------------------------------------------------------------


def delete_thread(runtime: Runtime, thread_id: str) -> Operation[None]:
    """Remove everything of a thread from both tiers."""
    name = _thread_name(thread_id, "delete_thread")
    yield from _maintain(runtime, {name: MaintenanceRecord(maintenance.DELETE_THREAD, {})}, supersedes=True)


def delete_for_runs(runtime: Runtime, run_ids: Sequence[str]) -> Operation[None]:
    """Remove the checkpoints of some runs, their writes, and the blobs that nothing else uses."""
    if isinstance(run_ids, str):
        raise InvalidInputError("delete_for_runs takes a sequence of run ids, not one string; nothing was deleted.")
    wanted = [text_of(run_id, "run id") for run_id in run_ids]
    if not wanted:
        return
    names = yield from _read_settled(runtime, None, lambda c: maintenance.threads_of_runs(c, wanted))
    record = MaintenanceRecord(maintenance.DELETE_RUNS, {"run_ids": wanted})
    yield from _maintain(runtime, dict.fromkeys(names, record))


def copy_thread(runtime: Runtime, source: str, target: str) -> Operation[None]:
    """Copy all of a thread's checkpoints, blobs and writes to another; what the target has already stays."""
    source, target = _thread_name(source, "copy_thread"), _thread_name(target, "copy_thread")
    if source == target:
        return
    yield from _read_settled(runtime, [source], lambda c: reader.refuse_quarantined(c, source))
    yield from _maintain(runtime, {target: MaintenanceRecord(maintenance.COPY, {"source": source})})


def prune(
    runtime: Runtime,
    names: Sequence[str],
    strategy: str,
    keep_last: int | None = None,
    max_age: float | None = None,
) -> Operation[None]:
    """Remove old checkpoints of threads, or the threads."""
    if isinstance(names, str):
        raise InvalidInputError("prune takes a sequence of thread ids, not one string; nothing was pruned.")
    if strategy not in PRUNE_STRATEGIES:
        raise InvalidInputError(f"Unknown prune strategy {strategy!r}: use one of {', '.join(PRUNE_STRATEGIES)}.")
    keep = strategy == "keep_latest"
    _check_rules(keep_last, max_age, allowed=keep)
    wanted = [_thread_name(name, "prune") for name in names]
    if not wanted:
        return
    if keep:
        rules = retention.Rules.from_now(1 if keep_last is None and max_age is None else keep_last, max_age)
        yield from retain(runtime, wanted, rules)
    else:
        record = MaintenanceRecord(maintenance.DELETE_THREAD, {})
        yield from _maintain(runtime, dict.fromkeys(wanted, record), supersedes=True)


def _check_rules(keep_last: object, max_age: object, *, allowed: bool) -> None:
    if not allowed and (keep_last is not None or max_age is not None):
        raise InvalidInputError("keep_last and max_age go with strategy 'keep_latest'; nothing was pruned.")
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise InvalidInputError(f"keep_last={keep_last!r} must be a whole number from 1 on; nothing was pruned.")
    usable = type(max_age) in (int, float) and 0 <= max_age < math.inf  # type: ignore[operator]
    if max_age is not None and not usable:
        raise InvalidInputError(f"max_age={max_age!r} must be a number of seconds, 0 or more; nothing was pruned.")


def retain(runtime: Runtime, names: Sequence[str], rules: retention.Rules) -> Operation[None]:
    """Remove what retention rules remove of some threads, a bounded number of checkpoints with each record."""
    record = MaintenanceRecord(maintenance.RETAIN, rules.arguments())
    waiting, rounds = list(names), 0
    most_rounds: int | None = None
    while waiting and (most_rounds is None or rounds < most_rounds):
        yield from _maintain(runtime, dict.fromkeys(waiting, record))
        rounds += 1
        left: dict[str, int] = {}
        for name in waiting:
            plan: retention.Plan = yield Blocking(partial(runtime.cold, partial(retention.read_plan, name, rules)))
            if plan.count:
                left[name] = plan.count
        waiting = list(left)
        if most_rounds is None:
            # A run that goes on makes more checkpoints meanwhile, which would keep this going for ever.
            most_rounds = 1 + math.ceil(max(left.values(), default=0) / retention.MOST_REMOVED)


# --- quarantine --------------------------------------------------------------------------------------------------


def quarantined(runtime: Runtime) -> Operation[list[quarantine.QuarantinedThread]]:
    """List the threads of which PostgreSQL refused a record for good."""
    yield from ready(runtime)
    found: list[quarantine.QuarantinedThread] = yield Blocking(lambda: runtime.cold(quarantine.list_threads))
    return found


def quarantined_records(runtime: Runtime, thread_id: str) -> Operation[list[quarantine.QuarantinedRecord]]:
    """List what waits of a thread in quarantine; first, what is still journaled joins it."""
    name = _thread_name(thread_id, "quarantined_records")

    def with_hot(hot: tier.HotCalls) -> Operation[list[quarantine.QuarantinedRecord]]:
        with contextlib.suppress(ThreadQuarantinedError):
            yield from settle(runtime, [name], look=hot)
        listed: list[quarantine.QuarantinedRecord] = yield Blocking(lambda: runtime.cold(work))
        return listed

    def work(connection: Connection) -> list[quarantine.QuarantinedRecord]:
        return quarantine.list_records(connection, name)

    found = yield from _read(runtime, with_hot, work)
    return found


def retry_quarantined(runtime: Runtime, thread_id: str) -> Operation[int]:
    """Write what waits of a thread in quarantine; all of it or nothing."""
    name = _thread_name(thread_id, "retry_quarantined")
    yield from ready(runtime)
    # No journal matters for this: what lies there came later, and is written later.
    written: int = yield Blocking(lambda: runtime.retry_quarantined(name))
    return written


def drop_quarantined(runtime: Runtime, thread_id: str) -> Operation[list[quarantine.QuarantinedRecord]]:
    """Remove what waits of a thread in quarantine, and the hot state that was built on it."""
    name = _thread_name(thread_id, "drop_quarantined")
    lost = yield from quarantined_records(runtime, name)
    if lost:
        yield from _maintain(runtime, {name: MaintenanceRecord(maintenance.DROP_QUARANTINED, {})})
        runtime.backlog.release([name])
    return lost


def _maintain(
    runtime: Runtime, records: Mapping[str, MaintenanceRecord], *, supersedes: bool = False
) -> Operation[None]:
    """Journal an operation for each thread, and wait until PostgreSQL has executed it; or execute it past Redis."""
    yield from ready(runtime)
    left = dict(records)
    while left:
        journaled = {}
        trusted = runtime.hot
        for name, record in left.items():
            # The next checkpoint is whole, because the hot state goes.
            runtime.recent.drop_thread(name)

            def call(
                hot: tier.HotCalls, name: str = name, record: MaintenanceRecord = record
            ) -> Operation[tuple[tier.Appended, bytes]]:
                payload = encode(record, hot.generation)
                reply = tier.appended((yield hot.maintain(name, payload, supersedes=supersedes)))
                assert reply is not None  # noqa: S101 - never sent back
                return reply, payload

            if (yield from _write(runtime, name, call, lambda record=record: record, maintains=True)):  # type: ignore[misc]
                journaled[name] = record
        # If Redis is lost now, the operations are given up, and asked for again when everybody has flushed.
        left = journaled
        with suppress(HotTierUnavailableError):
            yield from settle(runtime, list(journaled))
            # Also if it was lost and found between the two, when a journal without them is as good as a flushed one.
            if trusted is not None and runtime.hot is trusted:
                left = {}


def _thread_name(thread_id: object, what: str) -> str:
    if thread_id is None or thread_id == "":
        raise InvalidInputError(f"{what} needs a thread_id; nothing was done.")
    return text_of(thread_id, "thread_id")
