"""A short run of the chaos suite, and a check that its oracle would have seen what is not there.

`python -m tests.fault.chaos --minutes N` is the long form. `TIERED_CHAOS_SEED=1` adds a seed to the fixed one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.fault.chaos.audit import read_audit
from tests.fault.chaos.operations import read_log
from tests.fault.chaos.oracle import INCOMPLETE, LOST, Judge, Operation, Verdict
from tests.fault.chaos.run import Run
from tests.fault.chaos.system import Load

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fault.chaos.system import System

SEEDS = [6, *map(int, os.environ.get("TIERED_CHAOS_SEED", "").split())]
SECONDS = 15.0
SCALE = 0.2  # of the schedule's times: many short faults


class SpoiledRun(Run):
    """A run that takes something acknowledged from PostgreSQL once everything was audited, and audits again."""

    spoiled: Path

    def _audit(self, system: System) -> Path:
        found = super()._audit(system)
        kept = found.replace(found.with_name("before.jsonl"))
        checkpoint, write, blob = self._acknowledged()
        with system.postgres.connect() as connection:
            at = "thread_id = %s AND checkpoint_ns = '' AND checkpoint_id = %s"
            connection.execute(f"DELETE FROM checkpoints WHERE {at}", checkpoint)
            connection.execute(f"DELETE FROM checkpoint_writes WHERE {at}", write)
            connection.execute(
                "DELETE FROM checkpoint_blobs AS b USING checkpoints AS c WHERE b.channel = 'messages' AND "
                "b.version = c.checkpoint -> 'channel_versions' ->> 'messages' AND b.thread_id = c.thread_id AND "
                "(c.thread_id, c.checkpoint_ns, c.checkpoint_id) = (%s, '', %s)",
                blob,
            )
        self.spoiled = super()._audit(system)
        return kept

    def _acknowledged(self) -> list[tuple[str, str]]:
        """Find a checkpoint of each of three threads that is sure to be there, with messages and a write."""
        found = {}
        for file in sorted((self.directory / "operations").glob("*.jsonl")):
            judge = Judge(file.stem, read_log(file))

            def is_there(operation: Operation, judge: Judge = judge) -> bool:
                return judge._surely_there(operation, math.inf, math.inf)

            for (ns, checkpoint_id), puts in judge.puts.items():
                whole = any(is_there(one) and "messages" in one.entry["content"] for one in puts)
                if ns == "" and whole and any(map(is_there, judge.writes.get((ns, checkpoint_id), ()))):
                    found[file.stem] = checkpoint_id
        return [*found.items()][:3]


def judge(directory: Path, found: Path) -> Verdict:
    """Judge what was found by the log."""
    verdict = Verdict()
    for thread_id, stored in read_audit(found):
        verdict.add(Judge(thread_id, read_log(directory / "operations" / f"{thread_id}.jsonl")).judge(stored))
    return verdict


def report(run: Run) -> str:
    """Say what is wrong, for a test that failed."""
    found = run.result.as_json()
    return json.dumps(found | {"problems": found["problems"][:10]}, indent=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_stale_or_resurrected_under_faults(seed: int) -> None:
    """I1 to I9 under a seed's schedule; and what is taken from PostgreSQL afterwards is missed."""
    run = SpoiledRun(Load(seed), SECONDS, scale=SCALE, keep=True)

    result = run.perform()

    assert result.ok, report(run)
    counts = result.verdict.counts
    assert counts["put acknowledged"] > 100
    assert counts["get acknowledged"] > 100
    assert len(result.faults) > 5
    kinds = {problem.kind for problem in judge(run.directory, run.spoiled).problems}
    assert kinds >= {LOST, INCOMPLETE}, kinds
    shutil.rmtree(run.directory)
