"""Plots of what models are worth: intervals below each other, calibration, incidence, curves.

The functions take plain values, so that the report of a run, a comparison of runs and a table of
experiments draw alike. Each returns text that starts with `<svg`, or None where nothing is known;
`drawing.themed` lets a page choose the colours, `drawing.standalone` makes a file of it.

Legend: P points of a curve.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from smbfast.reporting.drawing import (
    BLUE,
    DASHED,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SOFT,
    WIDE,
    WIDTH,
    legend_below,
    panel,
    plain,
)

Interval = tuple[float, float, float]
# role: marker, colour, whether it is filled, so that roles differ where colours cannot
_LOOKS = {
    "own": ("o", BLUE, True),
    "baseline": ("D", GREEN, True),
    "beside": ("s", PURPLE, True),
    "oracle": ("^", GREY, False),
    "better": ("o", BLUE, True),
    "worse": ("o", ORANGE, True),
    "undecided": ("o", GREY, False),
}
_LINES = ((BLUE, "o"), (GREEN, "D"), (ORANGE, "s"), (PURPLE, "^"), (GREY, "v"))
_TALL = 3.3  # inches, of which the names of lines take one tenth each
_ROW = 0.35  # inches: a line of text, and its interval below


@dataclass(frozen=True)
class Estimate:
    """One row of a forest plot.

    value: value, lower and upper end; nan where unknown. A row without a value is left out.
    look: a role, or "better", "worse" and "undecided" of a difference.
    group: rows of one group are neighbours, below its name.
    """

    label: str
    value: Interval
    look: str = "own"
    group: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of a plot: `x` and `y`, and intervals [P] unless None; nan where unknown."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def look_of(difference: Interval) -> str:
    """Return how a difference is drawn: "undecided" where its interval holds zero or is unknown."""
    _, low, high = difference
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def forest(
    name: str,
    rows: Sequence[Estimate],
    *,
    title: str,
    unit: str,
    level: float | None = None,
    signed: bool = False,
) -> str | None:
    """Plot values with their intervals below each other, each below its label and figures.

    Args:
        name: of the plot, unlike any other of the page.
        unit: what the axis shows.
        level: a value to compare with, such as chance, drawn dashed.
        signed: whether figures are written with a sign.
    """
    rows = [row for row in rows if math.isfinite(row.value[0])]
    if not rows:
        return None
    groups = [group for group in dict.fromkeys(row.group for row in rows) if group]
    height = _ROW * (len(rows) + len(groups)) + 0.62
    return panel(
        name,
        f"{title}: {unit}",
        lambda ax: _draw_forest(ax, rows, title, unit, level, signed),
        width=WIDE,
        height=height,
    )


def _draw_forest(
    ax: Axes, rows: Sequence[Estimate], title: str, unit: str, level: float | None, signed: bool
) -> None:
    # a ground of their own, so that no line of the grid runs through letters
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
    text: dict[str, Any] = {
        "transform": ax.get_yaxis_transform(),
        "va": "center",
        "bbox": ground,
        "zorder": 2.2,
    }
    group, y = "", 0.0
    for row in rows:
        if row.group != group:
            group = row.group
            ax.text(0, y + 0.15, plain(group, 60), weight="bold", **text)
            y += 1
        marker, color, filled = _LOOKS.get(row.look, _LOOKS["baseline"])
        ax.text(0, y - 0.12, plain(row.label), color=INK, **text)
        ax.text(1, y - 0.12, written(row.value, signed=signed), color=SOFT, ha="right", **text)
        value, low, high = row.value
        if math.isfinite(low) and math.isfinite(high):
            ax.plot([low, high], [y + 0.24] * 2, color=color, linewidth=1.8)
        face = color if filled else PAPER
        ax.plot([value], [y + 0.24], marker, markersize=5.5, color=color, markerfacecolor=face)
        y += 1
    if level is not None:
        ax.axvline(level, color=INK, linewidth=0.9, linestyle=DASHED, zorder=0.5)
    ax.set_ylim(y - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_title(plain(title, 56), pad=6)
    ax.set_xlabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.spines["left"].set_visible(False)


def calibration(name: str, curves: Sequence[Curve], *, title: str = "Calibration") -> str | None:
    """Plot the observed share over the mean prediction of each bin; the diagonal is right.

    Args:
        name: of the plot, unlike any other of the page.
        curves: `x` the mean prediction of each bin, `y` the share that had the event.
    """
    curves = _known(curves)
    if not curves:
        return None
    ends = [v for c in curves for v in (*c.x, *c.y, *(c.high or ())) if math.isfinite(v)]
    top = min(1.0, max([0.02, *ends]) * 1.04)

    def draw(ax: Axes) -> None:
        ax.plot([0, top], [0, top], color=INK, linewidth=0.9, linestyle=DASHED)
        _draw_curves(ax, curves, bars=True)
        ax.set_xlim(0, top)
        ax.set_ylim(0, top)
        _words(ax, title, "predicted probability", "observed share")
        legend_below(ax)

    return panel(name, f"{title}: observed share by predicted probability", draw, WIDTH, _TALL)


def incidence(
    name: str,
    days: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str = "Cumulative incidence",
) -> str | None:
    """Plot the share of patients who had each event by day, as steps.

    Args:
        name: of the plot, unlike any other of the page.
        days: since the prediction time, ascending.
        curves: label and shares, one for each day.
    """
    steps = _known([Curve(label, days, share) for label, share in curves])
    if not steps:
        return None

    def draw(ax: Axes) -> None:
        for curve, (color, _) in zip(steps, itertools.cycle(_LINES), strict=False):
            ax.step(curve.x, curve.y, where="post", color=color, label=plain(curve.label, 36))
        ax.set_xlim(0, None)
        ax.set_ylim(0, min(1.0, ax.get_ylim()[1] * 1.05))
        _words(ax, title, "days since the prediction time", "share of patients")
        legend_below(ax)

    return panel(name, f"{title} by day", draw, WIDTH, _TALL)


def curve(
    name: str,
    curves: Sequence[Curve],
    *,
    title: str,
    x: str,
    y: str,
    level: tuple[float, str] | None = None,
    ticks: Sequence[tuple[float, str]] | None = None,
    log: bool = False,
) -> str | None:
    """Plot lines with intervals: few labels, or a setting that is swept.

    Args:
        name: of the plot, unlike any other of the page.
        x, y: what the axes show.
        level: a value to compare with and its name, drawn dashed.
        ticks: places on the axis and their names, where numbers do not do.
        log: whether `x` is drawn by its logarithm; it is then above 0.
    """
    curves = _known(curves)
    if not curves:
        return None

    def draw(ax: Axes) -> None:
        _draw_curves(ax, curves, bars=False)
        if log:
            ax.set_xscale("log")
        if ticks is not None:
            ax.xaxis.set_major_locator(FixedLocator([place for place, _ in ticks]))
            names = [plain(text, 16) for _, text in ticks]
            ax.xaxis.set_major_formatter(FuncFormatter(lambda _, at: names[at or 0]))
            ax.xaxis.set_minor_locator(NullLocator())
        if level is not None:
            ax.axhline(level[0], color=INK, linewidth=0.9, linestyle=DASHED, label=level[1])
        _words(ax, title, x, y)
        legend_below(ax)

    return panel(name, f"{title}: {y} by {x}", draw, WIDTH, _TALL)


def written(value: Interval, *, signed: bool = False) -> str:
    """Return a value and its interval as text, with three digits; a dash where unknown."""
    middle, low, high = value
    if not math.isfinite(middle):
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    known = math.isfinite(low) and math.isfinite(high)
    text = form.format(middle) + (f" [{form.format(low)}, {form.format(high)}]" if known else "")
    return text.replace("-", "−")


def _known(curves: Sequence[Curve]) -> list[Curve]:
    return [c for c in curves if np.isfinite(np.asarray(c.y, dtype=np.float64)).any()]


def _draw_curves(ax: Axes, curves: Sequence[Curve], *, bars: bool) -> None:
    for line, (color, marker) in zip(curves, itertools.cycle(_LINES), strict=False):
        ax.plot(line.x, line.y, color=color, marker=marker, label=plain(line.label, 36))
        if line.low is not None and line.high is not None:
            if bars:
                ax.vlines(line.x, line.low, line.high, color=color, linewidth=1.1, alpha=0.7)
            else:
                ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.13, linewidth=0)


def _words(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(plain(title), pad=6)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
