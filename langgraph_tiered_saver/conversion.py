"""Converting what is stored from one storage to the other, thread by thread, on live systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph_tiered_saver.cold import conversion as cold
from langgraph_tiered_saver.cold.conversion import StorageState, ThreadConversion
from langgraph_tiered_saver.cold.verify import count_threads
from langgraph_tiered_saver.config import Storage
from langgraph_tiered_saver.runtime import Runtime
from langgraph_tiered_saver.saver import TieredSaver


@dataclass(frozen=True)
class Converted:
    """What a conversion has done so far.

    Attributes:
        threads: Threads looked at.
        versions: Versions that are stored in the other way now.
        bytes_before: Bytes of these values or deltas before, as the serializer made them.
        bytes_after: Bytes of what they are stored as now.
        damaged: Versions that cannot be rebuilt, and are still stored as deltas.
        standard: PostgreSQL holds no deltas any more, so plain PostgresSaver may use the tables.
    """

    threads: int = 0
    versions: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    damaged: int = 0
    standard: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return dataclasses.asdict(self)


def show(saver: TieredSaver) -> StorageState:
    """Tell how PostgreSQL stores values; blocking.

    Raises:
        ColdTierUnavailableError, ColdTierRejectedError: it cannot be asked.
    """
    return _runtime(saver).cold(cold.show)


def convert(
    saver: TieredSaver,
    to: Storage,
    thread_ids: Iterable[str] | None = None,
    *,
    progress: Callable[[Converted, int], None] = lambda done, of: None,
) -> Converted:
    """Store values in the other way; blocking. Writers may go on, in either storage.

    Every transaction is bounded and leaves all values readable, so that a conversion may be killed at any moment; one
    that is run again goes on where it was. What savers write meanwhile follows their own configuration.

    Args:
        saver: A saver on both tiers.
        to: `"compact"` or `"standard"`.
        thread_ids: The threads; None for all.
        progress: Is told what was done, and about how many threads there are.

    Raises:
        ColdTierUnavailableError, ColdTierRejectedError: it could not go on; what was done stays.
    """
    runtime = _runtime(saver)
    compact = to == "compact"
    if compact:
        runtime.cold(cold.begin_compact)
    named = None if thread_ids is None else list(dict.fromkeys(thread_ids))
    of = len(named) if named is not None else runtime.cold(count_threads)
    done = Converted()
    for names in _pages(runtime, named, to_compact=compact):
        for name in names:
            for batch in _batches(runtime, name, to_compact=compact):
                done = dataclasses.replace(
                    done,
                    versions=done.versions + batch.versions,
                    bytes_before=done.bytes_before + batch.bytes_before,
                    bytes_after=done.bytes_after + batch.bytes_after,
                    damaged=done.damaged + len(batch.damaged),
                )
                progress(done, max(of, done.threads + 1))
            done = dataclasses.replace(done, threads=done.threads + 1)
            progress(done, max(of, done.threads))
    if not compact:
        done = dataclasses.replace(done, standard=runtime.cold(cold.end_compact))
    return done


def _runtime(saver: TieredSaver) -> Runtime:
    runtime = saver._source.current()  # noqa: SLF001 - the clients are the saver's own affair
    if not runtime.ready:
        runtime.open()
    return runtime


def _pages(runtime: Runtime, named: Sequence[str] | None, *, to_compact: bool) -> Iterator[Sequence[str]]:
    if named is not None:
        yield named
        return
    after = ""
    while names := runtime.cold(partial(cold.next_threads, after=after, to_compact=to_compact)):
        yield names
        after = names[-1]


def _batches(runtime: Runtime, name: str, *, to_compact: bool) -> Iterator[cold.Batch]:
    shard = runtime.calls.keyspace.shard_of(name)
    one = ThreadConversion(name, shard, statement_timeout=runtime.config.postgres_statement_timeout)
    step = one.to_compact if to_compact else one.to_standard
    while (batch := runtime.cold(step)) is not None:
        yield batch
