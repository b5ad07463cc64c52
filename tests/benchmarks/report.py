"""What a benchmark found: measurements of everybody, and how they compare with the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# By contestant, by round: what was measured in it.
Rounds = Mapping[str, Sequence[Sequence[float]]]

OURS = "TieredSaver"
FLOOR = "floor"
MEMORY = "InMemorySaver"
POSTGRES = "PostgresSaver"  # its asynchronous class goes by the same name, so that tables compare the two

_ABREAST = 3  # measurements in one table
_UNITS = {"µs": 1e6, "ms": 1e3, "s": 1.0, "/s": 1.0, "bytes": 1.0, "MiB": 1 / 2**20}


@dataclass
class Measurement:
    """One thing that was measured of everybody, side by side.

    Attributes:
        name: What it is, `"put, sync"` say.
        unit: The unit to show; values are in seconds, bytes or 1/s.
        rounds: The values.
        more_is_better: Whether more is better.
        in_plot: Whether it belongs in the README's picture.
    """

    name: str
    unit: str
    rounds: Rounds
    more_is_better: bool = False
    in_plot: bool = False

    def median(self, contestant: str) -> float:
        """The median over all rounds; NaN if it did not take part."""
        values = [value for found in self.rounds.get(contestant, ()) for value in found]
        return statistics.median(values) if values else float("nan")

    def ratio(self, of: str, to: str) -> float:
        """The ratio of two contestants' medians; NaN if one of them did not take part."""
        return self.median(of) / self.median(to)

    def spread(self, of: str, to: str) -> tuple[float, float] | None:
        """The quartiles of the ratio over the rounds: how far it can be trusted. None if there are too few."""
        pairs = zip(self.rounds.get(of, ()), self.rounds.get(to, ()), strict=False)
        ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
        if len(ratios) < 3:
            return None
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def shown(self, contestant: str) -> str:
        """The median with its unit."""
        value = self.median(contestant) * _UNITS[self.unit]
        return f"{value:,.0f} {self.unit}" if abs(value) >= 100 else f"{value:,.2f} {self.unit}"


@dataclass
class Target:
    """A figure that was promised, and the one that was found.

    Attributes:
        what: The target in words.
        value: The figure; None if it cannot be measured here.
        limit: The bound.
        at_least: It is a lower bound.
        unit: Of both; `"x"` for a ratio.
        spread: The quartiles over the rounds.
        note: What must be known to read it.
    """

    what: str
    value: float | None
    limit: float
    at_least: bool = False
    unit: str = "x"
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether it is met; None if it cannot be measured here."""
        if self.value is None or self.value != self.value:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Outcome:
    """All that a benchmark found."""

    measurements: list[Measurement] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(
        self, measurement: Measurement, to: str, limit: float, *, at_least: bool = False, what: str = "", note: str = ""
    ) -> None:
        """Add the target that TieredSaver's ratio to somebody keeps within a limit."""
        value = measurement.ratio(OURS, to)
        self.targets.append(
            Target(
                f"{what or measurement.name} / {to}",
                None if value != value else value,
                limit,
                at_least=at_least,
                spread=measurement.spread(OURS, to),
                note=note,
            )
        )

    def add(self, other: Outcome) -> None:
        """Take over what another one found."""
        self.measurements += other.measurements
        self.targets += other.targets
        self.notes += [note for note in other.notes if note not in self.notes]


def show(outcome: Outcome, console: Console) -> None:
    """Print tables: what everybody needs, and whether the targets hold."""
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for measurement in outcome.measurements:
        groups.setdefault(tuple(measurement.rounds), []).append(measurement)
    for contestants, measurements in groups.items():
        reference = POSTGRES if POSTGRES in contestants else ""
        for start in range(0, len(measurements), _ABREAST):
            _show_group(contestants, measurements[start : start + _ABREAST], reference, console)
    table = Table(title="Targets", box=box.SIMPLE_HEAD, caption="in brackets: quartiles over the rounds")
    for name in ("TieredSaver's figure", "found", "target", ""):
        table.add_column(name, justify="left" if name != "found" else "right")
    for target in outcome.targets:
        table.add_row(target.what, _found(target), _limit(target), _verdict(target.holds))
    if outcome.targets:
        console.print(table)
    for target in outcome.targets:
        if target.note:
            console.print(f"{target.what}: {target.note}", style="dim", highlight=False, markup=False)
    for note in outcome.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _show_group(
    contestants: Sequence[str], measurements: Sequence[Measurement], reference: str, console: Console
) -> None:
    caption = f"medians; in brackets: ratio to {reference}" if reference else "medians"
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    table.add_column("saver")
    for measurement in measurements:
        table.add_column(measurement.name, justify="right")
    for contestant in contestants:
        cells = [
            m.shown(contestant) + (f" ({m.ratio(contestant, reference):.2f})" if reference else "")
            for m in measurements
        ]
        table.add_row(contestant, *cells, style="bold" if contestant == OURS else "")
    console.print(table)


def _figure(value: float, unit: str) -> str:
    return f"{value:.2f} x" if unit == "x" else f"{value * _UNITS[unit]:,.0f} {unit}"


def _found(target: Target) -> str:
    if target.value is None or target.value != target.value:
        return "not available"
    text = _figure(target.value, target.unit)
    if target.spread is not None:
        text += f" ({target.spread[0]:.2f}–{target.spread[1]:.2f})"  # noqa: RUF001
    return text


def _limit(target: Target) -> str:
    return ("≥ " if target.at_least else "≤ ") + _figure(target.limit, target.unit)


def _verdict(holds: bool | None) -> str:
    return {True: "[green]holds[/]", False: "[red]missed[/]", None: "[yellow]–[/]"}[holds]  # noqa: RUF001


def _best_decile(measurement: Measurement, contestant: str) -> float:
    """What one of ten samples is better than: nearly undisturbed, where a machine is busy."""
    values = [value for found in measurement.rounds[contestant] for value in found]
    if len(values) < 2:
        return sum(values)
    return statistics.quantiles(values, n=10, method="inclusive")[-1 if measurement.more_is_better else 0]


def as_json(outcome: Outcome, about: Mapping[str, Any]) -> dict[str, Any]:
    """Give everything as plain data; values are in seconds, bytes or 1/s."""
    return {
        "about": dict(about),
        "measurements": [
            {
                "name": measurement.name,
                "unit": measurement.unit,
                "more_is_better": measurement.more_is_better,
                "medians": {name: measurement.median(name) for name in measurement.rounds},
                "round_medians": {
                    name: [statistics.median(found) for found in rounds if found]
                    for name, rounds in measurement.rounds.items()
                },
                "best_deciles": {name: _best_decile(measurement, name) for name in measurement.rounds},
                "samples": {name: sum(map(len, rounds)) for name, rounds in measurement.rounds.items()},
            }
            for measurement in outcome.measurements
        ],
        "targets": [
            {
                "what": target.what,
                "value": target.value,
                "limit": target.limit,
                "at_least": target.at_least,
                "unit": target.unit,
                "quartiles": target.spread,
                "holds": target.holds,
                "note": target.note,
            }
            for target in outcome.targets
        ],
        "notes": outcome.notes,
    }
