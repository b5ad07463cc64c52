"""The picture for the README: what everybody needs, as a ratio to PostgresSaver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.report import OURS, POSTGRES, Measurement, Outcome

_COLUMNS = 4
_OURS, _REFERENCE, _OTHERS = "#c2410c", "#334155", "#94a3b8"
_INSTALL = 'The plot needs matplotlib: pip install -e ".[bench]"'


class PlotUnavailableError(Exception):
    """The picture cannot be drawn; the message says why."""


def check() -> None:
    """Look whether a picture can be drawn, before anything is measured.

    Raises:
        PlotUnavailableError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotUnavailableError(_INSTALL) from error


def draw(outcome: Outcome, file: Path, caption: str) -> None:
    """Draw a panel for each measurement: the time of everybody who took part, PostgresSaver's being 1.

    Raises:
        PlotUnavailableError: matplotlib is missing, or nothing was measured that belongs in the picture.
    """
    check()
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    panels = [m for m in outcome.measurements if m.in_plot and POSTGRES in m.rounds]
    if not panels:
        raise PlotUnavailableError("Nothing that was measured is shown in the plot; leave --plot or --only out.")
    rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
    # Each row shows those who took part in one of its panels.
    contestants = [list(dict.fromkeys(name for panel in row for name in panel.rounds)) for row in rows]
    heights = [0.22 * len(names) + 0.6 for names in contestants]
    columns = min(_COLUMNS, len(panels))
    size = (3.1 * columns + 1.6, sum(heights) + 0.5)
    figure, axes = pyplot.subplots(len(rows), columns, figsize=size, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_visible(False)
    for row, names, places in zip(rows, contestants, axes, strict=True):
        for panel, axis in zip(row, places, strict=False):
            axis.set_visible(True)
            _panel(axis, panel, names, labels=panel is row[0])
    figure.suptitle(f"Time as a ratio to PostgresSaver: shorter is better. {caption}", fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, panel: Measurement, contestants: list[str], *, labels: bool) -> None:
    ratios = [panel.ratio(POSTGRES, n) if panel.more_is_better else panel.ratio(n, POSTGRES) for n in contestants]
    shown = [0.0 if ratio != ratio else ratio for ratio in ratios]
    colours = [{OURS: _OURS, POSTGRES: _REFERENCE}.get(name, _OTHERS) for name in contestants]
    places = range(len(contestants))
    # A bar that would make all others tiny is cut off; its figure stands beside it.
    most = max(1.0, *(value for value, name in zip(shown, contestants, strict=True) if name == OURS)) * 1.25
    axis.barh(places, [min(value, most) for value in shown], color=colours, height=0.72)
    for place, ratio in zip(places, ratios, strict=True):
        if ratio == ratio:
            axis.text(min(ratio, most) + most * 0.02, place, f"{ratio:.2f}", va="center", fontsize=7)
    axis.axvline(1.0, color=_REFERENCE, linewidth=0.6, linestyle=":")
    axis.set_xlim(0, most * 1.2)
    axis.set_yticks(list(places), contestants if labels else [""] * len(contestants), fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=6, length=2)
    axis.tick_params(axis="y", length=0)
    axis.set_title(panel.name, fontsize=8, loc="left")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
