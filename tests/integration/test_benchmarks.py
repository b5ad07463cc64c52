"""The benchmark commands work; what they measure is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.report import OURS, POSTGRES, Measurement, Target
from tests.benchmarks.soak import Sample, fit

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_one_benchmark_runs(tmp_path: Path) -> None:
    """The documented command measures, judges the targets and writes JSON, on nothing but the extra `[dev]`."""
    file = tmp_path / "figures.json"

    result = run("--quick", "--only", "cold", "--json", str(file))

    assert result.returncode == 0, result.stderr
    assert "cold get_tuple, sync" in result.stdout
    found = json.loads(file.read_text())
    assert {each["name"] for each in found["measurements"]} >= {"cold get_tuple, sync", "cold list of 100, async"}
    assert all(each["medians"][OURS] > 0 and each["medians"][POSTGRES] > 0 for each in found["measurements"])
    assert len(found["targets"]) == 4
    assert all(each["holds"] in (True, False) for each in found["targets"])


def test_an_unknown_benchmark_is_refused_before_anything_starts() -> None:
    """A misspelt name is an error that lists the right ones."""
    result = run("--only", "put")

    assert result.returncode == 2
    assert "calls" in result.stderr


@pytest.mark.parametrize(
    ("value", "at_least", "holds"),
    [(1.2, False, True), (1.3, False, False), (1.3, True, True), (1.2, True, False), (None, False, None)],
)
def test_a_target_says_whether_it_holds(value: float | None, at_least: bool, holds: bool | None) -> None:
    """What could not be measured neither holds nor is missed."""
    assert Target("x", value, 1.25, at_least=at_least).holds is holds


def test_ratios_are_those_of_medians_and_show_their_spread() -> None:
    """A slow minute that hits both contestants of a round does not widen the spread."""
    measurement = Measurement(
        "x", "ms", {OURS: [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]], POSTGRES: [[2.0], [20.0], [2.0]]}
    )

    assert measurement.ratio(OURS, POSTGRES) == 0.5
    assert measurement.spread(OURS, POSTGRES) == (0.5, 0.5)


def test_the_soak_tells_a_leak_from_a_start() -> None:
    """Memory that grows to its settings' bounds and stays is flat; memory that grows on is not."""

    def samples(*rss: int) -> list[Sample]:
        return [Sample(float(second), 0, value, 0, 0, 0, 0.0) for second, value in enumerate(rss)]

    settled, leak = fit(samples(50, 90, *[100] * 7)), fit(samples(*range(100, 190, 10)))

    assert settled is not None
    assert settled.growth < 0.05
    assert leak is not None
    assert leak.growth > 0.3
