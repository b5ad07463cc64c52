"""What is lost, stale, resurrected or incomplete, by the log of operations and what was found. Pure: no I/O.

Every rule follows from one idea. An acknowledged operation happened between its call and its return; one that ended
with an error, or whose process was killed, may have happened at any time since its call, or never. So a checkpoint is
certain to be there for whoever asks after its `put` returned, unless a delete may have come after it; and certain to be
gone if a delete that was acknowledged began after its `put` had returned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Content = dict[str, str]

LOST, STALE, RESURRECTED, INCOMPLETE, RAISED = "lost", "stale", "resurrected", "incomplete", "raised"


@dataclass(frozen=True)
class Problem:
    """Something that must not be.

    Attributes:
        kind: `"lost"`, `"stale"`, `"resurrected"`, `"incomplete"`, `"raised"`, or what else is wrong.
        thread_id: The thread.
        detail: What is wrong, with the ids of operations and checkpoints.
        at: When it showed, by the monotonic clock in nanoseconds; 0 for what was found at the end.
    """

    kind: str
    thread_id: str
    detail: str
    at: int = 0

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Partition:
    """A time in which some processes could not reach Redis while others could.

    Attributes:
        began: By the monotonic clock, in nanoseconds.
        ended: Likewise; includes the time that they may take to notice that it is over.
        processes: The first parts of their names.
        unseen_until: Until when nobody needs to see what they wrote, because they could not tell; 0 if they could.
    """

    began: int
    ended: int
    processes: frozenset[str]
    unseen_until: int = 0

    def covers(self, operation: Operation) -> bool:
        """Whether an operation of such a process fell into the time."""
        return (
            operation.number.partition(".")[0] in self.processes
            and operation.began <= self.ended
            and self.began <= operation.ended
        )


@dataclass(frozen=True)
class Outage:
    """A time in which a tier, or the way to it, was not well.

    Attributes:
        tier: `"redis"` or `"postgres"`.
        began: By the monotonic clock, in nanoseconds.
        ended: Likewise; includes the time that it may take to notice that it is over.
    """

    tier: str
    began: int
    ended: int


@dataclass(frozen=True)
class Operation:
    """One call.

    Attributes:
        number: Its name in the log; the process's name comes first.
        kind: `"put"`, `"writes"`, `"get"`, `"list"` or `"delete"`.
        began: When it was called, by the monotonic clock in nanoseconds.
        ended: When it returned; infinity if it never did, or raised, so that it may happen at any time.
        acknowledged: It returned.
        entry: The log's entry.
    """

    number: str
    kind: str
    began: int
    ended: float
    acknowledged: bool
    entry: dict[str, Any]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Operation:
        """Read an entry of the log."""
        acknowledged = "ended" in entry and "error" not in entry
        ended = entry["ended"] if acknowledged else math.inf
        return cls(entry["op"], entry["kind"], entry["began"], ended, acknowledged, entry)


@dataclass
class Found:
    """What is stored of a thread at the end.

    Attributes:
        checkpoints: Parent and content by namespace and checkpoint id.
        writes: Channel and digest by (namespace, checkpoint id, task, index).
        differences: What a new TieredSaver and PostgresSaver do not agree about.
        missing_blobs: Checkpoints that SQL finds to lack blobs.
    """

    checkpoints: dict[tuple[str, str], tuple[str, Content]] = field(default_factory=dict)
    writes: dict[tuple[str, str, str, int], tuple[str, str]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    missing_blobs: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """What the oracle says.

    Attributes:
        problems: What must not be.
        counts: Operations by kind, and acknowledged checkpoints, writes, deletes and reads.
        errors: Operations that raised, by their kind and the error's name.
        late: Reads that were allowed to be late, because of a partition.
    """

    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    late: int = 0

    def add(self, other: Verdict) -> None:
        """Count another one in."""
        self.problems += other.problems
        self.counts += other.counts
        self.errors += other.errors
        self.late += other.late


class Judge:
    """Judges one thread."""

    def __init__(
        self,
        thread_id: str,
        entries: Iterable[dict[str, Any]],
        partitions: Sequence[Partition] = (),
        late_ns: int = 0,
        outages: Sequence[Outage] = (),
    ) -> None:
        """Read the log.

        Args:
            thread_id: The thread.
            entries: The log's entries of it.
            partitions: Times in which a read may be late.
            late_ns: For how long after its acknowledgement a write made in such a time may be missed by others.
            outages: When a tier, or the way to it, was not well.
        """
        self.thread_id = thread_id
        self.operations = [Operation.of(entry) for entry in entries]
        self.partitions, self.late_ns, self.outages = partitions, late_ns, outages
        self.deletes = [one for one in self.operations if one.kind == "delete"]
        self.puts: dict[tuple[str, str], list[Operation]] = {}
        self.writes: dict[tuple[str, str], list[Operation]] = {}
        self.newest: dict[str, list[Operation]] = {}
        for one in self.operations:
            if one.kind in ("put", "writes"):
                known = self.puts if one.kind == "put" else self.writes
                known.setdefault((one.entry["ns"], one.entry["id"]), []).append(one)
            if one.kind == "put":
                self.newest.setdefault(one.entry["ns"], []).append(one)
        for puts in self.newest.values():
            puts.sort(key=lambda one: one.entry["id"], reverse=True)
        self.verdict = Verdict()

    def judge(self, found: Found | None) -> Verdict:
        """Check every read, and what was found at the end.

        Args:
            found: What is stored; None to check the reads alone.
        """
        for one in self.operations:
            self._count(one)
            if one.kind == "get" and one.acknowledged:
                self._check_get(one)
            elif one.kind == "list" and one.acknowledged:
                self._check_list(one)
        if found is not None:
            self._check_found(found)
        return self.verdict

    def _count(self, one: Operation) -> None:
        self.verdict.counts["operations"] += 1
        self.verdict.counts[f"{one.kind} begun"] += 1
        if one.acknowledged:
            self.verdict.counts[f"{one.kind} acknowledged"] += 1
        elif "error" in one.entry:
            name = f"{one.kind}: {one.entry['error']}"
            self.verdict.errors[name] += 1
            if not self._may_raise(one):
                detail = (
                    f"{one.number} raised {name} though a tier was there that had the answer: {one.entry['message']}"
                )
                self._problem(RAISED, detail, one.began)

    def _may_raise(self, one: Operation) -> bool:
        """Whether an error may come out: a write's if both tiers are away, and a read's if PostgreSQL is.

        What must be in PostgreSQL before the call returns (an interrupt, an error, a resume) is refused like a read.
        """
        error = one.entry["error"]
        if error in ("CancelledError", "GeneratorExit"):  # somebody else's error ended the run
            return True
        away = {
            outage.tier for outage in self.outages if outage.began <= one.entry["ended"] and one.began <= outage.ended
        }
        behind = one.kind == "put" or (one.kind == "writes" and not one.entry["last"])
        needs_postgres = not behind or error in ("BacklogFullError", "FlushTimeoutError")
        return away >= ({"postgres"} if needs_postgres else {"redis", "postgres"})

    def _problem(self, kind: str, detail: str, at: int = 0) -> None:
        self.verdict.problems.append(Problem(kind, self.thread_id, detail, at))

    # --- what is certain ---------------------------------------------------------------------------------------------

    def _surely_there(self, one: Operation, asked: float, answered: float) -> bool:
        """Whether who asked and was answered at these times must see what an operation wrote."""
        return one.ended < asked and not any(
            delete.began < answered and delete.ended > one.began for delete in self.deletes
        )

    def _surely_gone(self, writers: Sequence[Operation], asked: float) -> bool:
        """Whether who asked at this time must not see what some operations wrote, any of which may have written it."""
        return all(any(one.ended < delete.began and delete.ended < asked for delete in self.deletes) for one in writers)

    def _is_late(self, one: Operation, asked: float) -> bool:
        """Whether a read may miss an operation, because of a partition."""
        excused = any(
            partition.covers(one) and (asked - one.ended < self.late_ns or asked < partition.unseen_until)
            for partition in self.partitions
        )
        self.verdict.late += excused
        return excused

    # --- reads -------------------------------------------------------------------------------------------------------

    def _check_get(self, read: Operation) -> None:
        ns, asked_id, found = read.entry["ns"], read.entry["id"], read.entry["found"]
        if asked_id:
            missed = None if found else self._acknowledged_put(self.puts.get((ns, asked_id), ()), read)
        else:
            missed = self._newer(ns, found["id"] if found else "", read)
        if missed is not None and not self._is_late(missed, read.began):
            self._problem(
                STALE,
                f"{read.number} read {_name(ns, found['id'] if found else None)} "
                f"{_ms(read.began - missed.ended)} after {missed.number} had stored "
                f"{_name(ns, missed.entry['id'])}" + (f" (asked for {asked_id})" if asked_id else ""),
                read.began,
            )
        if found:
            self._check_content(read, found)

    def _acknowledged_put(self, puts: Sequence[Operation], read: Operation) -> Operation | None:
        return next((one for one in puts if self._surely_there(one, read.began, read.ended)), None)

    def _newer(self, ns: str, than: str, read: Operation) -> Operation | None:
        """Find a checkpoint that is newer than what a read gave, and which it had to give."""
        for one in self.newest.get(ns, ()):
            if one.entry["id"] <= than:
                return None
            if self._surely_there(one, read.began, read.ended):
                return one
        return None

    def _check_list(self, read: Operation) -> None:
        entry = read.entry
        found = {(one["ns"], one["id"]) for one in entry["found"]}
        for one in entry["found"]:
            self._check_content(read, one)
        full = entry["limit"] is not None and len(found) >= entry["limit"]
        oldest = min((checkpoint_id for _, checkpoint_id in found), default="") if full else ""
        for (ns, checkpoint_id), puts in self.puts.items():
            listed = (
                (entry["ns"] is None or entry["ns"] == ns)
                and (not entry["id"] or entry["id"] == checkpoint_id)
                and (not entry["before"] or checkpoint_id < entry["before"])
                and checkpoint_id > oldest
            )
            if listed and (ns, checkpoint_id) not in found:
                missed = self._acknowledged_put(puts, read)
                if missed is not None and not self._is_late(missed, read.began):
                    self._problem(
                        STALE,
                        f"{read.number} listed {len(found)} checkpoints without {_name(ns, checkpoint_id)}, which "
                        f"{missed.number} had stored {_ms(read.began - missed.ended)} before",
                        read.began,
                    )

    def _check_content(self, read: Operation, found: dict[str, Any]) -> None:
        """Check a checkpoint that a read gave: it was written, as it was read, and not deleted since."""
        key = found["ns"], found["id"]
        puts = [one for one in self.puts.get(key, ()) if one.began < read.entry["ended"]]
        what = f"{read.number} read {_name(*key)}"
        if not puts:
            self._problem(INCOMPLETE, f"{what}, which nobody had stored", read.began)
            return
        if self._surely_gone(puts, read.began):
            self._problem(RESURRECTED, f"{what}, which was deleted", read.began)
            return
        if problem := _differs(puts, found["parent"], found["content"]):
            self._problem(INCOMPLETE, f"{what} {problem}", read.began)
        present = {(task, channel, value) for task, channel, value in found["writes"]}
        for one in self.writes.get(key, ()):
            if self._surely_there(one, read.began, read.ended):
                for _, channel, _ in one.entry["writes"]:
                    allowed = {
                        (other.entry["task"], name, value)
                        for other in self.writes[key]
                        if other.entry["task"] == one.entry["task"]
                        for _, name, value in other.entry["writes"]
                        if name == channel
                    }
                    if not allowed & present and not self._is_late(one, read.began):
                        self._problem(
                            STALE,
                            f"{what} without the write to {channel} that {one.number} had stored "
                            f"{_ms(read.began - one.ended)} before",
                            read.began,
                        )

    # --- what was found at the end -----------------------------------------------------------------------------------

    def _check_found(self, found: Found) -> None:
        for key, puts in self.puts.items():
            if key not in found.checkpoints:
                missed = next((one for one in puts if self._surely_there(one, math.inf, math.inf)), None)
                if missed is not None:
                    self._problem(LOST, f"checkpoint {_name(*key)} of {missed.number} is not in PostgreSQL")
        for key, (parent, content) in found.checkpoints.items():
            self._check_stored(found, key, parent, content)
        self._check_writes(found)
        for text in found.differences:
            self._problem("different", text)
        for text in found.missing_blobs:
            self._problem(INCOMPLETE, text)

    def _check_stored(self, found: Found, key: tuple[str, str], parent: str, content: Content) -> None:
        puts = self.puts.get(key, [])
        if not puts:
            self._problem(INCOMPLETE, f"checkpoint {_name(*key)} is in PostgreSQL, but nobody stored it")
        elif self._surely_gone(puts, math.inf):
            self._problem(RESURRECTED, f"checkpoint {_name(*key)} is in PostgreSQL, but was deleted")
        else:
            if problem := _differs(puts, parent, content):
                self._problem(INCOMPLETE, f"checkpoint {_name(*key)} in PostgreSQL {problem}")
            if parent and (key[0], parent) not in found.checkpoints:
                first = min((one.began for one in self.puts.get((key[0], parent), ())), default=0)
                if not any(delete.ended > first for delete in self.deletes):
                    self._problem(INCOMPLETE, f"checkpoint {_name(*key)} has no parent {parent}")

    def _check_writes(self, found: Found) -> None:
        candidates: dict[tuple[str, str, str, int], list[tuple[Operation, tuple[str, str]]]] = {}
        for (ns, checkpoint_id), operations in self.writes.items():
            for one in operations:
                for index, channel, value in one.entry["writes"]:
                    key = ns, checkpoint_id, one.entry["task"], index
                    candidates.setdefault(key, []).append((one, (channel, value)))
        for key, written in candidates.items():
            stored = found.writes.get(key)
            name = f"write {key[3]} of task {key[2]} at {_name(*key[:2])}"
            if stored is None:
                missed = next((one for one, _ in written if self._surely_there(one, math.inf, math.inf)), None)
                if missed is not None:
                    self._problem(LOST, f"{name} of {missed.number} is not in PostgreSQL")
            elif not any(_may_win(one, stored, written) for one, value in written if value == stored):
                self._problem(INCOMPLETE, f"{name} is {stored} in PostgreSQL, which is not the one that counts")
        for key in found.writes:
            writers = [one for one, _ in candidates.get(key, ())]
            if self._surely_gone(writers, math.inf):
                kind = RESURRECTED if writers else INCOMPLETE
                self._problem(kind, f"write {key[3]} of task {key[2]} at {_name(*key[:2])} is in PostgreSQL")


def _may_win(winner: Operation, value: tuple[str, str], written: Sequence[tuple[Operation, tuple[str, str]]]) -> bool:
    """Whether one of several writes to the same place may be the one that counts.

    The first one does, or among calls that write to special channels only the last one.
    """
    for other, stored in written:
        if stored != value and other.acknowledged and other.entry["last"] == winner.entry["last"]:
            if winner.entry["last"] and winner.ended < other.began:
                return False
            if not winner.entry["last"] and other.ended < winner.began:
                return False
    return True


def _differs(puts: Sequence[Operation], parent: str, content: Content) -> str | None:
    """Say how a checkpoint differs from all that may have been stored under its id."""
    if any(one.entry["content"] == content for one in puts):
        if all(one.entry["parent"] != parent for one in puts):
            return f"with the parent {parent!r} instead of {puts[0].entry['parent']!r}"
        return None
    wanted: Content = puts[-1].entry["content"]
    missing = sorted(set(wanted) - set(content))
    other = sorted(name for name in wanted if name in content and wanted[name] != content[name])
    more = sorted(set(content) - set(wanted))
    parts = [
        f"{what} {', '.join(name or 'fields of its own' for name in names)}"
        for what, names in (("lacks", missing), ("has other", other), ("has besides", more))
        if names
    ]
    return "; ".join(parts) + f" (stored by {puts[-1].number})"


def _name(ns: str, checkpoint_id: str | None) -> str:
    return f"{ns or 'root'}/{checkpoint_id}" if checkpoint_id else "nothing"


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.0f} ms"
