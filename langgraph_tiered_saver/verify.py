"""Comparing the tiers: what must hold between the journal, hot state and PostgreSQL, and where it does not.

Works on live systems: nothing is changed or locked, and what looks wrong is looked at again, because it may only be on
its way. It is told when two looks after each other saw the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_tiered_saver.cold import generations
from langgraph_tiered_saver.cold import verify as cold
from langgraph_tiered_saver.cold.verify import ColdThread
from langgraph_tiered_saver.comparison import HotLook, differences, hot_threads, look_at_hot
from langgraph_tiered_saver.names import ThreadPosition
from langgraph_tiered_saver.runtime import Runtime
from langgraph_tiered_saver.saver import TieredSaver

_MOMENT = 0.25  # seconds between two looks at a thread that looks wrong
_LOOKS = 8  # most looks; a thread that never looks the same twice is in use, and not told of
_QUIET = 3600.0  # seconds after which nobody is about to store the checkpoint that writes belong to


@dataclass(frozen=True)
class Problem:
    """Something that must not be, or, as a note, something that is worth knowing.

    Attributes:
        kind: `"blob"`, `"delta"`, `"parent"`, `"writes"`, `"journal"`, `"hot"`, `"tombstone"`, `"watermark"`,
            `"quarantine"` or `"thread"`.
        thread_id: The thread.
        checkpoint_ns: The namespace, or "" if it is about the thread.
        checkpoint_id: The checkpoint, or "".
        what: What is wrong.
        advice: What to do about it.
        is_note: Nothing is wrong.
    """

    kind: str
    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    what: str
    advice: str
    is_note: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return dataclasses.asdict(self)


def check(
    saver: TieredSaver,
    thread_ids: Iterable[str] | None = None,
    *,
    notes: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Problem]:
    """Compare the tiers; blocking.

    Args:
        saver: A saver on both tiers. Nothing is flushed or adopted for this.
        thread_ids: The threads; None for all. On a Redis Cluster, of those that PostgreSQL does not know, only what
            is unflushed is found.
        notes: Give what is worth knowing too.
        progress: Is told how many threads were looked at, and about how many there are.

    Yields:
        What is wrong, thread by thread; memory is bounded by a hundred threads' namespaces.

    Raises:
        TierUnavailableError: a tier is away, so nothing can be compared.
    """
    runtime = saver._source.current()  # noqa: SLF001 - the clients are the saver's own affair
    if not runtime.ready:
        runtime.open()
    checker = _Checker(runtime, saver.serde)
    done, of = 0, 0 if thread_ids is not None else runtime.cold(cold.count_threads)
    for names in _pages(runtime, thread_ids):
        for problem in checker.check(names, named=thread_ids is not None):
            if notes or not problem.is_note:
                yield problem
        done += len(names)
        progress(done, max(done, of))


def _pages(runtime: Runtime, thread_ids: Iterable[str] | None) -> Iterator[Sequence[str]]:
    """Give the named threads, or all of either tier, some at a time."""
    if thread_ids is not None:
        named = list(dict.fromkeys(thread_ids))
        for start in range(0, len(named), cold.PAGE):
            yield named[start : start + cold.PAGE]
        return
    after = ""
    while names := runtime.cold(partial(cold.next_threads, after=after)):
        yield names
        after = names[-1]
    # What PostgreSQL has never heard of.
    seen: set[str] = set()
    for found in hot_threads(runtime):
        unknown = [name for name in found if name not in seen]
        unknown = sorted(set(unknown) - runtime.cold(partial(cold.known_threads, names=unknown)))
        seen.update(unknown)
        for start in range(0, len(unknown), cold.PAGE):
            yield unknown[start : start + cold.PAGE]


class _Checker:
    """Looks at threads until it is sure."""

    def __init__(self, runtime: Runtime, serde: SerializerProtocol) -> None:
        self._runtime = runtime
        self._serde = serde

    def check(self, names: Sequence[str], *, named: bool) -> list[Problem]:
        """Look at some threads; at those that look wrong again, until two looks see the same."""
        found = self._look(names, named=named)
        told = [problem for name in names for problem in found[name] if problem.is_note]
        suspects = {name: wrong for name in names if (wrong := _wrong(found[name]))}
        sure: set[Problem] = set()
        for _ in range(_LOOKS):
            if not suspects:
                break
            time.sleep(_MOMENT)
            again = self._look(list(suspects), named=named)
            for name, before in list(suspects.items()):
                now = _wrong(again[name])
                sure.update(problem for problem in now if problem in before)
                # What was not there before may be on its way too.
                if any(problem not in before for problem in now):
                    suspects[name] = now
                else:
                    del suspects[name]
        return told + sorted(sure, key=dataclasses.astuple)

    def _look(self, names: Sequence[str], *, named: bool) -> dict[str, list[Problem]]:
        hot = look_at_hot(self._runtime, names)
        generation = self._runtime.cold(generations.read)
        threads = self._runtime.cold(partial(cold.look, names=names))
        for name, thread in threads.items():
            if thread.has_deltas:
                self._runtime.cold(partial(cold.look_at_deltas, name=name, thread=thread))
        found = {}
        for name in names:
            thread, look = threads[name], hot[name]
            problems = [*_of_cold(name, thread, look), *_of_journal(name, thread, look)]
            if generation.opened and look.generation == generation.number and not thread.quarantined:
                problems += self._compare(name, thread, look)
            if named and not problems and not thread.latest and not look.exists:
                problems.append(
                    Problem("thread", name, "", "", "nothing is stored under this name", "check the name", True)
                )
            found[name] = problems
        return found

    def _compare(self, name: str, thread: ColdThread, look: HotLook) -> Iterator[Problem]:
        """Compare what is hot with what is cold; what was hot was read first."""
        namespaces = sorted(look.namespaces | thread.latest.keys())
        for ns, hot_id in look.trusted(self._runtime, name, namespaces).items():
            latest = thread.latest.get(ns, "")
            key = self._runtime.calls.keyspace.thread(name).hot(ns).decode()
            if latest > hot_id:
                yield Problem(
                    "hot", name, ns, latest, f"the hot checkpoint is {hot_id}, which is older",
                    f"something else writes to PostgreSQL: stop that, and delete {key!r} from Redis",
                )  # fmt: skip
            elif look.length == 0 and latest < hot_id:
                yield Problem(
                    "hot", name, ns, hot_id,
                    f"it is hot, but PostgreSQL's latest is {latest or 'none'} and nothing is in the journal",
                    "an acknowledged checkpoint did not reach PostgreSQL, or was removed there: read it with get_tuple "
                    f"while it is hot, then delete {key!r} from Redis",
                )  # fmt: skip
            elif look.length == 0:
                for what in differences(self._runtime, self._serde, ThreadPosition(name, ns, "")):
                    yield Problem(
                        "hot", name, ns, hot_id, f"hot and cold differ: {what}",
                        f"PostgreSQL has what is durable: delete {key!r} from Redis, and the next read fills it anew",
                    )  # fmt: skip


def _wrong(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if not problem.is_note]


def _of_cold(name: str, thread: ColdThread, look: HotLook) -> Iterator[Problem]:
    """Tell what is wrong within PostgreSQL."""
    for lacking in thread.incomplete:
        channels = f"; without a value: {', '.join(map(repr, lacking.without))}" if lacking.without else ""
        yield Problem(
            "blob", name, lacking.checkpoint_ns, lacking.checkpoint_id,
            f"it references {lacking.expected} blobs, of which {lacking.found} exist{channels}",
            "restore checkpoint_blobs from a backup; until then the reader leaves such channels out",
        )  # fmt: skip
    for damaged in thread.damaged:
        yield Problem(
            "delta", name, damaged.checkpoint_ns, "",
            f"version {damaged.version} of channel {damaged.channel!r} cannot be rebuilt: {damaged.reason}",
            "restore tiered_deltas and checkpoint_blobs from a backup; reading it raises DamagedValueError",
        )  # fmt: skip
    for orphan in thread.orphans:
        yield Problem(
            "parent", name, orphan.checkpoint_ns, orphan.checkpoint_id,
            f"its parent {orphan.parent_id} does not exist, and the thread was never pruned",
            "restore checkpoints from a backup; delta channels are rebuilt from ancestors",
        )  # fmt: skip
    for stray in thread.strays:
        quiet = look.length == 0 and not thread.tombstone and 0 < stray.last < (time.time() - _QUIET) * 1e6
        yield Problem(
            "writes", name, stray.checkpoint_ns, stray.checkpoint_id,
            f"it does not exist, but {stray.writes} writes of it do",
            "a run ended between a task's writes and their checkpoint: resume the thread, or delete it"
            if quiet and stray.is_newest else "nothing: it may be about to come, or the run has gone on without it",
            is_note=not (quiet and stray.is_newest),
        )  # fmt: skip
    if thread.more:
        yield Problem("thread", name, "", "", f"{thread.more} more such checkpoints", "see those that are listed")
    if thread.first is not None and thread.first < thread.deleted:
        yield Problem(
            "tombstone", name, "", "",
            f"it was deleted at {thread.deleted}, but has rows that were written at {thread.first}",
            "something brought deleted rows back: delete the thread again",
        )  # fmt: skip
    if (thread.last or 0) > thread.watermark or thread.tombstone > thread.watermark:
        yield Problem(
            "watermark", name, "", "",
            f"it is said to be durable up to {thread.watermark}, but has rows up to {thread.last or 0} and a tombstone "
            f"at {thread.tombstone}",
            "tiered_threads was changed or restored alone: restore the tables together",
        )  # fmt: skip
    if thread.quarantined or thread.waiting:
        yield Problem(
            "quarantine", name, "", "",
            f"{thread.waiting} records wait in quarantine: {thread.reason or 'no reason is recorded'}",
            "see `langgraph-tiered quarantine`",
        )  # fmt: skip


def _of_journal(name: str, thread: ColdThread, look: HotLook) -> Iterator[Problem]:
    """Tell what is wrong with the journal, and what is known of it in its shard."""
    repair = "something else wrote to Redis: `langgraph-tiered worker --once` flushes and tidies what can be read"

    def problem(what: str, *, is_note: bool = False, advice: str = repair) -> Problem:
        return Problem("journal", name, "", "", what, advice, is_note)

    for fault in look.faults:
        yield problem(fault)
    if look.length and look.tail != look.last:
        yield problem(f"its last record is {look.last}, but the shard says {look.tail or 'that there is none'}")
    if not look.length and look.tail:
        yield problem(f"it is empty, but the shard says that its last record is {look.tail}")
    if look.length and look.dirty is None:
        yield problem("it holds records, but is not among the dirty threads, so nobody would adopt them")
    if not look.length and look.dirty is not None:
        yield problem(f"it is empty, but among the dirty threads since {look.dirty}")
    if acknowledged := sum(sequence <= thread.watermark for sequence in look.sequences):
        yield problem(
            f"{acknowledged} records are in PostgreSQL and wait for their acknowledgement",
            is_note=True,
            advice="nothing: the next flush or sweep trims them",
        )
