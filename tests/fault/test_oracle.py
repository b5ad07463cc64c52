"""The chaos suite's oracle finds what is wrong in handmade logs, and excuses what an unknown outcome allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.fault.chaos.operations import OperationLog, read_log
from tests.fault.chaos.oracle import Found, Judge, Outage, Partition, Verdict
from tests.fault.chaos.schedule import KINDS, schedule

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SECOND = 1_000_000_000


class Log:
    """A handmade log of one thread; each operation takes a second, or never returns."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.found = Found()

    def add(self, kind: str, began: float, *, took: float | None = 1.0, by: str = "w0i0", **entry: Any) -> None:
        """Add an operation that began at a second."""
        if "error" in entry:
            entry["message"] = "It was refused."
        entry |= {"op": f"{by}.{len(self.entries)}", "kind": kind, "began": int(began * SECOND)}
        if took is not None:
            entry["ended"] = int((began + took) * SECOND)
        self.entries.append(entry)

    def put(self, began: float, checkpoint_id: str, parent: str = "", *, stored: bool = True, **more: Any) -> None:
        """Add a put, and find its checkpoint at the end."""
        self.add("put", began, ns="", id=checkpoint_id, parent=parent, content=content(checkpoint_id), **more)
        if stored:
            self.found.checkpoints["", checkpoint_id] = parent, content(checkpoint_id)

    def writes(
        self, began: float, checkpoint_id: str, value: str, *, last: bool = False, stored: bool = True, **more: Any
    ) -> None:
        """Add a put_writes of one value to one channel, and find it at the end."""
        index, channel = (-4, "__resume__") if last else (0, "messages")
        written = [[index, channel, value]]
        self.add("writes", began, ns="", id=checkpoint_id, task="t", last=last, writes=written, **more)
        if stored:
            self.found.writes["", checkpoint_id, "t", index] = channel, value

    def get(
        self, began: float, found_id: str | None, *, asked: str = "", writes: Sequence[str] = (), **more: Any
    ) -> None:
        """Add a read that gave a checkpoint."""
        found = found_id and {
            "ns": "",
            "id": found_id,
            "parent": more.pop("parent", ""),
            "content": more.pop("content", content(found_id)),
            "writes": [["t", "messages", value] for value in writes],
        }
        self.add("get", began, ns="", id=asked, found=found, **more)

    def judge(self, *partitions: Partition) -> Verdict:
        """Judge reads and what was found at the end; errors are excused."""
        always = [Outage(tier, 0, 1000 * SECOND) for tier in ("redis", "postgres")]
        return Judge("thread", self.entries, partitions, int(1.5 * SECOND), always).judge(self.found)

    def kinds(self, *partitions: Partition) -> list[str]:
        """Give the kinds of the problems found."""
        return [problem.kind for problem in self.judge(*partitions).problems]


def content(checkpoint_id: str) -> dict[str, str]:
    """Give a checkpoint's content, as digests."""
    return {"": f"rest of {checkpoint_id}", "messages": f"messages of {checkpoint_id}"}


@pytest.fixture
def log() -> Log:
    """A log in which two checkpoints with a write each were stored, one after the other."""
    log = Log()
    log.put(0, "1")
    log.writes(2, "1", "a")
    log.put(4, "2", "1")
    log.writes(6, "2", "b")
    return log


def test_what_is_right_is_right(log: Log) -> None:
    """Reads that see everything acknowledged, reads during a put, and everything stored: no problem."""
    log.get(8, "2", parent="1", writes=["b"])
    log.get(8, "1", asked="1", writes=["a"])
    log.get(4.5, "1", writes=["a"])
    log.get(4.5, "2", parent="1")
    log.add("list", 8, ns=None, id="", before="", limit=1, found=[log.entries[4]["found"]])

    verdict = log.judge()

    assert verdict.problems == []
    assert verdict.counts["put acknowledged"] == 2
    assert verdict.counts["get acknowledged"] == 4


def test_a_lost_checkpoint_is_found(log: Log) -> None:
    """I1: an acknowledged checkpoint that is not stored is lost; its child then has no parent either."""
    del log.found.checkpoints["", "2"]
    assert log.kinds() == ["lost"]

    del log.found.checkpoints["", "1"]
    assert log.kinds() == ["lost", "lost"]


def test_a_lost_write_is_found(log: Log) -> None:
    """I1: an acknowledged write that is not stored is lost."""
    del log.found.writes["", "1", "t", 0]
    assert log.kinds() == ["lost"]


@pytest.mark.parametrize("ending", [{"took": None}, {"error": "HotTierUnavailableError"}])
def test_what_was_not_acknowledged_may_be_there_or_not(log: Log, ending: dict[str, Any]) -> None:
    """A put that raised, or whose process died, may be seen, and then not; what is seen must be right."""
    log.put(8, "3", "2", stored=False, **ending)
    log.get(10, "3", parent="2")
    log.get(12, "2", parent="1", writes=["b"])
    assert log.kinds() == []

    log.found.checkpoints["", "3"] = "2", content("3")
    assert log.kinds() == []

    log.found.checkpoints["", "3"] = "2", {"": "rest of 3"}
    assert log.kinds() == ["incomplete"]


def test_a_checkpoint_without_its_parent_is_found(log: Log) -> None:
    """I3: what is stored has its parent stored, acknowledged or not, unless a delete came between."""
    log.put(8, "3", "2", stored=False, took=None)
    log.put(9, "4", "3")
    assert log.kinds() == ["incomplete"]


def test_a_stale_read_is_found(log: Log) -> None:
    """I6, I9: a read of the latest that gives an older one, or none, than one acknowledged before it began."""
    log.get(8, "1", writes=["a"])
    assert log.kinds() == ["stale"]

    log.get(9, None)
    log.get(10, None, asked="1")
    assert log.kinds() == ["stale"] * 3


def test_a_read_without_an_acknowledged_write_is_stale(log: Log) -> None:
    """I9: a read sees the pending writes that were acknowledged before it."""
    log.get(8, "2", parent="1")
    assert log.kinds() == ["stale"]


def test_an_incomplete_list_is_found(log: Log) -> None:
    """I9: a list gives every checkpoint acknowledged before it, down to the last one that its limit lets it give."""
    older = {"ns": "", "id": "1", "parent": "", "content": content("1"), "writes": [["t", "messages", "a"]]}
    log.add("list", 8, ns=None, id="", before="", limit=1, found=[older])
    assert log.kinds() == ["stale"]

    log.entries[-1]["before"] = "2"
    assert log.kinds() == []


def test_a_read_with_other_values_is_found(log: Log) -> None:
    """I2: a read that lacks a channel, has another value or another parent than what was stored."""
    log.get(8, "2", parent="1", writes=["b"], content={"": "rest of 2"})
    log.get(8, "2", parent="1", writes=["b"], content={**content("2"), "messages": "other"})
    log.get(8, "2", parent="0", writes=["b"])
    log.get(8, "7", writes=["b"])

    assert log.kinds() == ["incomplete"] * 4


def test_what_was_deleted_stays_away(log: Log) -> None:
    """I5: after a delete that was acknowledged, what was acknowledged before it is neither read nor stored."""
    log.add("delete", 8)
    log.get(10, "2", parent="1", writes=["b"])
    assert log.kinds() == ["resurrected"] * 5

    log.entries.pop()
    log.found = Found()
    log.get(10, None)
    assert log.kinds() == []


def test_a_thread_lives_again_after_its_delete(log: Log) -> None:
    """What is acknowledged after a delete must be there, and what was there before is no longer missed."""
    log.found = Found()
    log.add("delete", 8)
    log.put(10, "3", "2")
    log.get(12, "3", parent="2")
    assert log.kinds() == []

    log.get(13, None)
    del log.found.checkpoints["", "3"]
    assert log.kinds() == ["stale", "lost"]


def test_a_delete_of_unknown_outcome_excuses(log: Log) -> None:
    """A delete that raised may happen at any time: nothing since its call is certain, what is there is right."""
    log.add("delete", 8, error="ColdTierUnavailableError")
    log.get(10, None)
    log.get(11, "2", parent="1", writes=["b"])
    log.put(12, "3", "2", stored=False)
    assert log.kinds() == []

    log.found = Found()
    assert log.kinds() == []


def test_which_of_several_writes_counts(log: Log) -> None:
    """I4: the first of a task's writes to an index counts, of those to special channels alone the last one."""
    log.writes(8, "2", "c", stored=False)
    log.writes(10, "2", "x", last=True, stored=False)
    log.writes(12, "2", "y", last=True)
    assert log.kinds() == []

    log.found.writes["", "2", "t", 0] = "messages", "c"
    assert log.kinds() == ["incomplete"]

    log.found.writes["", "2", "t", 0] = "messages", "b"
    log.found.writes["", "2", "t", -4] = "__resume__", "x"
    assert log.kinds() == ["incomplete"]

    log.writes(14, "2", "x", last=True, stored=False, took=None)
    assert log.kinds() == []


def test_a_partition_excuses_for_a_while(log: Log) -> None:
    """A read may miss what a process that cannot reach Redis wrote, for a bounded time, and nothing else."""
    partition = Partition(3 * SECOND, 6 * SECOND, frozenset({"w0i0"}))
    late = Log()
    late.put(0, "1", by="w1i0")
    late.put(4, "2", "1")
    late.get(6, "1")
    assert late.kinds(partition) == []
    assert late.judge(partition).late == 1
    assert late.kinds(Partition(3 * SECOND, 6 * SECOND, frozenset({"w1i0"}))) == ["stale"]

    late.get(7, "1")
    assert late.kinds(partition) == ["stale"]


@pytest.mark.parametrize(
    ("kind", "error", "excuse"),
    [
        ("get", "HotTierUnavailableError", ["postgres"]),
        ("put", "ColdTierUnavailableError", ["redis", "postgres"]),
        ("put", "BacklogFullError", ["postgres"]),
        ("writes", "ColdTierUnavailableError", ["postgres"]),
    ],
)
def test_an_error_needs_an_excuse(log: Log, kind: str, error: str, excuse: list[str]) -> None:
    """A write raises only if both tiers are away, a read only if PostgreSQL is, and neither a while later."""
    log.add(kind, 20, ns="", id="", parent="", content={}, task="t", last=True, writes=[], error=error)

    def kinds(tiers: list[str], ended: int) -> list[str]:
        outages = [Outage(tier, 10 * SECOND, ended * SECOND) for tier in tiers]
        return [problem.kind for problem in Judge("t", log.entries, outages=outages).judge(None).problems]

    assert kinds(excuse, 20) == []
    assert kinds(excuse, 19) == ["raised"]
    assert kinds(["redis"], 20) == ["raised"]


def test_what_the_audit_says_is_a_problem(log: Log) -> None:
    """Differences between the two savers, and blobs that SQL misses, are problems."""
    log.found.differences.append("root/2 is listed differently")
    log.found.missing_blobs.append("root/2 has 1 of 2 blobs")
    assert log.kinds() == ["different", "incomplete"]


def test_a_torn_line_ends_no_other(tmp_path: Path) -> None:
    """A line in which its writer was killed is left out, and the next process's line is not."""
    with OperationLog(tmp_path, "w0").operation("get", "thread", ns="", id="") as answer:
        answer["found"] = None
    with (tmp_path / "thread.jsonl").open("ab") as file:
        file.write(b'\n{"op": "w0.1", "kind": "put", "beg')
    with pytest.raises(RuntimeError), OperationLog(tmp_path, "w1").operation("delete", "thread"):
        raise RuntimeError("refused")

    operations = read_log(tmp_path / "thread.jsonl")

    assert [(one["op"], one["kind"], one.get("error")) for one in operations] == [
        ("w0.0", "get", None),
        ("w1.0", "delete", "RuntimeError"),
    ]


def test_the_schedule_is_the_seeds() -> None:
    """A seed gives the same steps again, with every kind among them; no step kills a worker and takes Redis too."""
    first, again, other = ([step for step, _ in zip(schedule(seed, 3), range(60), strict=False)] for seed in (1, 1, 2))

    assert first == again != other
    assert {fault.kind for step in first for fault in step.faults} == set(KINDS)
    for step in first:
        assert not {fault.takes for fault in step.faults} >= {"worker", "redis"}
