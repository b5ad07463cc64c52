"""Every operation of the saver, written once, as a generator that yields requests and receives their replies.

`drivers` runs them, one way for synchronous callers and one for asynchronous ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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

from langgraph_tiered_saver import codec
from langgraph_tiered_saver.backlog import Ticket
from langgraph_tiered_saver.cold import maintenance, reader, threads
from langgraph_tiered_saver.errors import (
    BacklogFullError,
    ColdTierUnavailableError,
    FlushTimeoutError,
    InvalidInputError,
)
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.names import ThreadPosition, check_filter, position_of, text_of
from langgraph_tiered_saver.records import MaintenanceRecord, encode
from langgraph_tiered_saver.runtime import Runtime

T = TypeVar("T")
Operation = Generator[Any, Any, T]

PRUNE_STRATEGIES = ("keep_latest", "delete", "delete_all")


@dataclass(frozen=True)
class ReadHash:
    """Request: read a whole hash of the hot tier, in one round trip."""

    key: bytes


@dataclass(frozen=True)
class Blocking:
    """Request: call a function that blocks; asynchronous callers reach it through a thread pool."""

    work: Callable[[], Any]


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
    encoded = codec.encode_checkpoint(serde, config, checkpoint, metadata, new_versions)
    if not runtime.ready:
        yield from ready(runtime)
    if not runtime.backlog.has_room():
        yield from _wait_for_room(runtime)
    payload = encode(encoded.record())
    reply = tier.appended((yield runtime.calls.put(encoded, payload)))
    if reply is None:
        encoded.carry_every_channel()
        payload = encode(encoded.record())
        reply = tier.appended((yield runtime.calls.put(encoded, payload)))
        assert reply is not None  # noqa: S101 - a complete record is never sent back
    runtime.counters.add("checkpoints")
    yield from _take_over(runtime, encoded.position.thread_id, reply, payload)
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
    if not runtime.backlog.has_room():
        yield from _wait_for_room(runtime)
    payload = encode(record)
    reply = tier.appended((yield runtime.calls.put_writes(position.thread_id, position.checkpoint_ns, payload)))
    assert reply is not None  # noqa: S101 - writes are never sent back
    runtime.counters.add("writes")
    yield from _take_over(runtime, position.thread_id, reply, payload)


def _wait_for_room(runtime: Runtime) -> Operation[None]:
    timeout = runtime.config.backlog_timeout
    if (yield Wait([runtime.backlog.room()], timeout)):
        state = runtime.backlog.state()
        raise BacklogFullError(
            f"{state.records} records ({state.bytes / 2**20:.0f} MiB) wait for PostgreSQL, and that did not change for "
            f"{timeout:g} s. This write was not made; what was acknowledged before is safe in the journal. "
            "Repair or relieve PostgreSQL, or raise max_backlog_records and max_backlog_bytes."
        )


def _take_over(runtime: Runtime, thread_id: str, reply: tier.Appended, payload: bytes) -> Operation[None]:
    """Hand an acknowledged record to the flusher, and wait for it in write-through mode."""
    if runtime.config.write_mode == "behind":
        runtime.backlog.add(thread_id, reply.sequence, reply.previous, payload)
        return
    ticket: Ticket = Future()
    runtime.backlog.add(thread_id, reply.sequence, reply.previous, payload, ticket=ticket)
    timeout = runtime.config.flush_timeout
    if (yield Wait([ticket], timeout)):
        raise FlushTimeoutError(
            f"The record is safe in the journal, but was not in PostgreSQL after {timeout:g} s. It will be flushed "
            "when PostgreSQL takes it; repeating the call is safe.",
            records=1,
        )


# --- reading -----------------------------------------------------------------------------------------------------


def get_tuple(runtime: Runtime, serde: SerializerProtocol, config: RunnableConfig) -> Operation[CheckpointTuple | None]:
    """Read a checkpoint: one round trip if it is the hot one."""
    position = position_of(config, what="get_tuple")
    if not runtime.ready:
        yield from ready(runtime)
    if position.checkpoint_id:
        found = yield from _get_by_id(runtime, serde, position)
        return found
    fields = yield ReadHash(runtime.calls.keyspace.thread(position.thread_id).hot(position.checkpoint_ns))
    hot = codec.decode_hot(serde, position, fields)
    if hot is not None:
        runtime.counters.add("hot_hits")
        return hot
    runtime.counters.add("hot_misses")
    found = yield from _miss(runtime, serde, position)
    return found


def _get_by_id(
    runtime: Runtime, serde: SerializerProtocol, position: ThreadPosition
) -> Operation[CheckpointTuple | None]:
    fields, journal_length = yield runtime.calls.get(position.thread_id, position.checkpoint_ns, position.checkpoint_id)
    if fields:
        hot = codec.decode_hot(serde, position, dict(zip(fields[::2], fields[1::2], strict=True)))
        if hot is not None:
            runtime.counters.add("hot_hits")
            return hot
    if journal_length or runtime.backlog.holds(position.thread_id):
        yield from settle(runtime, [position.thread_id])
    cold = yield from _read_cold(runtime, serde, position)
    return cold.load(serde) if cold is not None else None


def _read_cold(
    runtime: Runtime, serde: SerializerProtocol, position: ThreadPosition
) -> Operation[reader.ColdCheckpoint | None]:
    found: reader.ColdCheckpoint | None = yield Blocking(
        lambda: runtime.cold(lambda connection: reader.read_checkpoint(connection, serde, position))
    )
    return found


def _miss(runtime: Runtime, serde: SerializerProtocol, position: ThreadPosition) -> Operation[CheckpointTuple | None]:
    """Settle the journal, read cold, and make hot what was read if nothing newer arrived meanwhile."""
    thread_id, ns = position.thread_id, position.checkpoint_ns
    token = secrets.token_hex(8)
    if (yield runtime.calls.lease(thread_id, ns, token)) or runtime.backlog.holds(thread_id):
        yield from settle(runtime, [thread_id])
    cold = yield from _read_cold(runtime, serde, position)
    if cold is None:
        return None
    warming = cold.warming()
    if warming is not None:
        yield runtime.calls.warm(thread_id, ns, token, *warming)
    return cold.load(serde)


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
    if not config:
        yield from ready(runtime)
        yield from settle_all(runtime)
    else:
        position = position_of(config, what="list")
        # An absent namespace means all of them, so it must stay absent.
        given = config["configurable"]
        wanted = {
            "configurable": {k: v for k, v in position.config()["configurable"].items() if given.get(k) is not None}
        }
        yield from ready(runtime)
        yield from settle(runtime, [position.thread_id], look=True)
    page: list[CheckpointTuple] = yield Blocking(
        lambda: runtime.cold(lambda c: reader.read_list(c, serde, wanted, filter=filter, before=before, limit=limit))
    )
    return page


def delta_history(
    runtime: Runtime, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
) -> Operation[Mapping[str, DeltaChannelHistory]]:
    """Collect delta channels' writes, once PostgreSQL has everything of the thread."""
    position = position_of(config, what="get_delta_channel_history")
    if not channels:
        return {}
    yield from ready(runtime)
    yield from settle(runtime, [position.thread_id], look=True)
    target = position.config()
    found: Mapping[str, DeltaChannelHistory] = yield Blocking(
        lambda: runtime.cold(lambda c: reader.read_delta_history(c, serde, target, channels))
    )
    return found


def thread_ids(
    runtime: Runtime, limit: int | None, before: threads.ThreadSummary | None
) -> Operation[list[threads.ThreadSummary]]:
    """List threads, once PostgreSQL has everything."""
    yield from ready(runtime)
    yield from settle_all(runtime)
    found: list[threads.ThreadSummary] = yield Blocking(
        lambda: runtime.cold(lambda c: threads.list_threads(c, limit, before))
    )
    return found


# --- flushing on demand ------------------------------------------------------------------------------------------


def settle(runtime: Runtime, names: Sequence[str], *, look: bool = False) -> Operation[None]:
    """See to it that PostgreSQL has everything journaled for some threads, whoever wrote it.

    Args:
        runtime: The open tiers.
        names: The threads.
        look: Ask first whether there is anything to flush.

    Raises:
        ColdTierUnavailableError: PostgreSQL did not take it in time.
        ThreadQuarantinedError: PostgreSQL refused a record of the thread for good.
    """
    if look:
        waiting = []
        for name in names:
            # A Redis that lost its journal must not hide what this process still holds.
            if runtime.backlog.holds(name) or (yield from _journal_length(runtime, name)):
                waiting.append(name)  # noqa: PERF401 - a comprehension cannot yield
        names = waiting
    if not names:
        return
    timeout = runtime.config.flush_timeout
    if left := (yield Wait(runtime.backlog.settle(names), timeout)):
        raise ColdTierUnavailableError(
            f"The records of {left} threads could not be brought to PostgreSQL within {timeout:g} s, so they cannot "
            "be read from there now. They are safe in the journal; try again later."
        )


def _journal_length(runtime: Runtime, thread_id: str) -> Operation[int]:
    reply = yield runtime.calls.journal(thread_id, 0, 0)
    return int(reply[0])


def settle_all(runtime: Runtime) -> Operation[None]:
    """See to it that PostgreSQL has everything that is journaled now, of all threads."""
    names: list[str] = yield Blocking(lambda: tier.dirty_threads(runtime.client, runtime.calls.keyspace))
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


# --- removing and copying ----------------------------------------------------------------------------------------


def delete_thread(runtime: Runtime, thread_id: str) -> Operation[None]:
    """Remove everything of a thread from both tiers."""
    name = _thread_name(thread_id, "delete_thread")
    yield from ready(runtime)
    yield from _maintain(runtime, {name: MaintenanceRecord(maintenance.DELETE_THREAD, {})}, supersedes=True)


def delete_for_runs(runtime: Runtime, run_ids: Sequence[str]) -> Operation[None]:
    """Remove the checkpoints of some runs, their writes, and the blobs that nothing else uses."""
    if isinstance(run_ids, str):
        raise InvalidInputError("delete_for_runs takes a sequence of run ids, not one string; nothing was deleted.")
    wanted = [text_of(run_id, "run id") for run_id in run_ids]
    if not wanted:
        return
    yield from ready(runtime)
    yield from settle_all(runtime)
    names: list[str] = yield Blocking(lambda: runtime.cold(lambda c: maintenance.threads_of_runs(c, wanted)))
    record = MaintenanceRecord(maintenance.DELETE_RUNS, {"run_ids": wanted})
    yield from _maintain(runtime, dict.fromkeys(names, record))


def copy_thread(runtime: Runtime, source: str, target: str) -> Operation[None]:
    """Copy all of a thread's checkpoints, blobs and writes to another; what the target has already stays."""
    source, target = _thread_name(source, "copy_thread"), _thread_name(target, "copy_thread")
    if source == target:
        return
    yield from ready(runtime)
    yield from settle(runtime, [source], look=True)
    yield from _maintain(runtime, {target: MaintenanceRecord(maintenance.COPY, {"source": source})})


def prune(runtime: Runtime, names: Sequence[str], strategy: str) -> Operation[None]:
    """Remove old checkpoints of threads, or the threads."""
    if isinstance(names, str):
        raise InvalidInputError("prune takes a sequence of thread ids, not one string; nothing was pruned.")
    if strategy not in PRUNE_STRATEGIES:
        raise InvalidInputError(f"Unknown prune strategy {strategy!r}: use one of {', '.join(PRUNE_STRATEGIES)}.")
    wanted = [_thread_name(name, "prune") for name in names]
    if not wanted:
        return
    yield from ready(runtime)
    keep = strategy == "keep_latest"
    record = MaintenanceRecord(maintenance.PRUNE if keep else maintenance.DELETE_THREAD, {})
    yield from _maintain(runtime, dict.fromkeys(wanted, record), supersedes=not keep)


def _maintain(
    runtime: Runtime, records: Mapping[str, MaintenanceRecord], *, supersedes: bool = False
) -> Operation[None]:
    """Journal an operation for each thread, and wait until PostgreSQL has executed it."""
    for name, record in records.items():
        payload = encode(record)
        reply = tier.appended((yield runtime.calls.maintain(name, payload, supersedes=supersedes)))
        assert reply is not None  # noqa: S101 - never sent back
        runtime.backlog.add(name, reply.sequence, reply.previous, payload)
    yield from settle(runtime, list(records))


def _thread_name(thread_id: object, what: str) -> str:
    if thread_id is None or thread_id == "":
        raise InvalidInputError(f"{what} needs a thread_id; nothing was done.")
    return text_of(thread_id, "thread_id")
