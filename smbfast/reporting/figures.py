"""Draws the plots of the report as inline SVG, without script or font files.

Each function returns a string that starts with `<svg`, or None where there is nothing to plot; the
bytes are the same every time. Ids carry the name of the figure, so that several can stand in one
page. Text stays text and takes the page's font.

Legend: N records of one phase.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from smbfast.reporting.runlog import (
    Phase,
    Record,
    column,
    relative,
)
from smbfast.reporting.verdict import GOOD_RATIO, HALF, trivial_ratio

# Okabe and Ito: distinct with every common colour vision deficiency
BLUE, ORANGE, GREEN, PURPLE, GREY, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#AA4499",
    "#8a8f98",
    "#1f2430",
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "smbfast",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 16,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": "#4a5160",
    "axes.edgecolor": "#b6bbc4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e9ebef",
    "grid.linewidth": 0.8,
    "xtick.color": "#8a8f98",
    "ytick.color": "#8a8f98",
    "xtick.labelcolor": "#4a5160",
    "ytick.labelcolor": "#4a5160",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
# a longer line is not finer on paper, only a larger file
_POINTS = 600
_COLUMNS = 3  # panels beside each other
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class ForestRow:
    """One model of one task: its value with an interval, and the value of `smbfast` minus that."""

    task: str
    label: str
    name: str
    value: tuple[float, float, float]
    difference: tuple[float, float, float] | None


Panel = Callable[[Axes], None]
Series = tuple[str, str | None, str, str]  # key, label, colour, marker


def losses(phases: list[Phase]) -> str | None:
    """Plot each loss by step: every step, smoothed, and on the tuning split."""
    panels: list[Panel] = []
    for key, title, unit in (
        ("sft", "Next-token loss (SFT)", "cross-entropy (nats / token)"),
        ("jepa", "Latent prediction loss (JEPA)", "mean squared error"),
        ("codes", "Codes to come", "cross-entropy of a pair / 10"),
    ):
        shown = [phase for phase in phases if _known(phase.steps + phase.evals, key)]
        if shown:
            panels.append(partial(_loss_panel, phases=shown, key=key, title=title, unit=unit))
    return _draw("loss", panels, "Loss by optimizer step")


def _loss_panel(ax: Axes, phases: list[Phase], key: str, title: str, unit: str) -> None:
    _frame(ax, phases, title, unit)
    for i, phase in enumerate(phases):
        step_N, value_N = _finite(phase.steps, column(phase.steps, key))
        _plot(ax, step_N, value_N, color=BLUE, alpha=0.35, linewidth=0.7)
        _plot(ax, step_N, smooth(value_N), color=BLUE, label=None if i else "training, smoothed")
        step_N, value_N = _finite(phase.evals, column(phase.evals, key))
        style = {"color": ORANGE, "marker": "o", "linewidth": 1.0}
        _plot(ax, step_N, value_N, label=None if i else "tuning split", **style)
    ax.legend(loc="upper right")


def health(phases: list[Phase]) -> str | None:
    """Plot diagnostics by step: ranks and spread of states, probe, latent loss, gradients."""
    shown: list[tuple[Callable[[Axes, list[Phase]], None], Callable[[Phase], bool]]] = [
        (_rank_panel, lambda p: any(_known(p.evals, key) for key, *_ in _RANKS)),
        (_share_panel, lambda p: any(_known(p.evals, key) for key, *_ in _RANKS)),
        (_probe_panel, lambda p: _known(p.evals, "probe_auroc")),
        (_ratio_panel, lambda p: bool(np.isfinite(trivial_ratio(p.evals)).any())),
        (_r2_panel, lambda p: bool(horizons(p.evals))),
        (_spread_panel, lambda p: _known(p.evals, "target_std")),
        (_distance_panel, lambda p: _known(p.evals, "distance")),
        (_gradient_panel, lambda p: bool(_pulls(p, "grad"))),
        (_cosine_panel, lambda p: bool(_pulls(p, "cos"))),
    ]

    def drawn(panel: Callable[[Axes, list[Phase]], None], own: list[Phase]) -> Panel:
        return lambda ax: panel(ax, own)

    panels = [drawn(panel, own) for panel, has in shown if (own := _with(phases, has))]
    return _draw("health", panels, "Health of the representation by optimizer step")


_RANKS: list[Series] = [
    ("online_rank", "online encoder", BLUE, "o"),
    ("embedding_rank", "embeddings at nodes", GREEN, "^"),
    ("target_rank", "target encoder", ORANGE, "s"),
]


def _rank_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Effective rank of states", "directions in use")
    _series(ax, phases, _RANKS)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05 or 1.0)
    ax.legend(loc="upper right")


def _share_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Effective rank since phase entry", "share of value at phase entry")
    # ranks of random weights are no reference
    after = [replace(p, evals=[r for r in p.evals if not r.get("untrained")]) for p in phases]
    _series(ax, after, _RANKS, relative)
    _line(ax, HALF, "one half", INK)
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))


def _probe_panel(ax: Axes, phases: list[Phase]) -> None:
    tasks = [record.get("probe_task") for phase in phases for record in phase.evals]
    task = next((_plain(str(name), 24) for name in tasks if name), "")
    _frame(ax, phases, f"Online probe: {task}", "AUROC on tuning nodes")
    _series(ax, phases, [("probe_auroc", None, BLUE, "o")])
    _line(ax, 0.5, "chance", INK)


def _r2_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "R² of the latent loss by horizon", "R² (dashed: copying the state)")
    names = list(dict.fromkeys(name for phase in phases for name in horizons(phase.evals)))
    for name, color in zip(names, itertools.cycle((BLUE, ORANGE, GREEN, PURPLE)), strict=False):
        _series(ax, phases, [(f"r2_{name}", _plain(name, 12), color, "o")])
        copied: list[Series] = [(f"r2_copy_{name}", None, color, "")]
        _series(ax, phases, copied, linestyle=(0, (3, 2)), linewidth=1.0)
    # before its first steps a random predictor is far below any constant
    low, high = ax.get_ylim()
    ax.set_ylim(min(max(low, -0.5), -0.05), max(high, 0.1))
    _line(ax, 0.0, "a constant", INK)
    ax.legend(loc="lower right", ncols=2)


def horizons(records: list[Record]) -> list[str]:
    """Return the names of the horizons that evaluations measured R² of, in their order."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("r2_"))
    return [
        k.removeprefix("r2_") for k in keys if not k.startswith("r2_copy") and _known(records, k)
    ]


def _spread_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Spread of the target", "share of value at phase entry")
    series: list[Series] = [
        ("target_std", "mean std", ORANGE, "s"),
        ("target_std_p5", "5th percentile std", GREEN, "^"),
    ]
    _series(ax, phases, series, relative)
    _line(ax, HALF, "one half", INK)
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 0.0))


def _ratio_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Loss against trivial predictors", "loss / best trivial loss")
    for phase in phases:
        step_N, value_N = _finite(phase.evals, trivial_ratio(phase.evals))
        _plot(ax, step_N, value_N, color=BLUE, marker="o")
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    _line(ax, 1.0, "trivial", INK)
    _line(ax, GOOD_RATIO, f"goal {GOOD_RATIO}", GREEN, below=True)


def _distance_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Online to target distance", "relative distance")
    _series(ax, phases, [("distance", None, PURPLE, "o")])
    ax.set_ylim(0, max(ax.get_ylim()[1], 1e-6))


def _gradient_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Gradient of each loss on the trunk", "L2 norm, unweighted")
    _pull_series(ax, phases, "grad")
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05 or 1.0)
    ax.legend(loc="best")


def _cosine_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Cosine of two gradients", "cosine (below 0: they oppose)")
    _pull_series(ax, phases, "cos")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.2), max(high, 0.2))
    _line(ax, 0.0, "orthogonal", INK)
    ax.legend(loc="best")


def _pull_series(ax: Axes, phases: list[Phase], kind: str) -> None:
    keys = dict.fromkeys(key for phase in phases for key in _pulls(phase, kind))
    looks = itertools.cycle(((BLUE, "o"), (ORANGE, "s"), (GREEN, "^")))
    for key, (color, marker) in zip(keys, looks, strict=False):
        label = _plain(" and ".join(key.split("_")[1:]), 24)
        _series(ax, phases, [(key, label, color, marker)])


def _pulls(phase: Phase, kind: str) -> list[str]:
    keys = dict.fromkeys(key for record in phase.evals for key in record)
    return [k for k in keys if k.startswith(f"{kind}_") and _known(phase.evals, k)]


def _series(
    ax: Axes,
    phases: list[Phase],
    series: Sequence[Series],
    change: Callable[[np.ndarray], np.ndarray] = lambda value_N: value_N,
    **style: Any,
) -> None:
    """Plot columns of evaluations, each with its label once, broken between phases.

    Args:
        series: key, label, colour and marker of each.
        change: what is plotted of a column of one phase.
    """
    for key, label, color, marker in series:
        for phase in phases:
            step_N, value_N = _finite(phase.evals, change(column(phase.evals, key)))
            if len(step_N):
                _plot(ax, step_N, value_N, color=color, marker=marker, label=label, **style)
                label = None


def optimizer(phases: list[Phase]) -> str | None:
    """Plot learning rate and gradient norm by step."""
    return _step_figure(
        "optimizer",
        "Learning rate and gradient norm by optimizer step",
        phases,
        [
            ("lr", 1.0, "Learning rate", "learning rate", GREEN, False),
            ("grad_norm", 1.0, "Gradient norm before clipping", "L2 norm", BLUE, True),
        ],
    )


def machine(phases: list[Phase]) -> str | None:
    """Plot throughput, memory and the share of time spent waiting for data by step."""
    return _step_figure(
        "machine",
        "Throughput, memory and data wait by optimizer step",
        phases,
        [
            ("tokens_per_s", 1.0, "Throughput", "trunk tokens / s", BLUE, True),
            ("memory_gib", 1.0, "Peak memory", "GiB", PURPLE, False),
            ("wait", 100.0, "Waiting for data", "% of step time", ORANGE, True),
        ],
    )


def _step_figure(
    name: str,
    label: str,
    phases: list[Phase],
    series: list[tuple[str, float, str, str, str, bool]],
) -> str | None:
    def panel(key: str, scale: float, title: str, unit: str, color: str, noisy: bool) -> Panel:
        shown = _with(phases, lambda phase: _known(phase.steps, key))

        def draw(ax: Axes) -> None:
            _frame(ax, shown, title, unit)
            for phase in shown:
                step_N, value_N = _finite(phase.steps, column(phase.steps, key) * scale)
                if noisy:
                    _plot(ax, step_N, value_N, color=color, alpha=0.35, linewidth=0.7)
                _plot(ax, step_N, smooth(value_N) if noisy else value_N, color=color)
            ax.set_ylim(0, ax.get_ylim()[1] * 1.05 or 1.0)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))

        return draw

    panels = [panel(*row) for row in series if any(_known(phase.steps, row[0]) for phase in phases)]
    return _draw(name, panels, label)


# filled or not tells models from oracles where colour cannot
_MARKS = {
    "smbfast": ("o", BLUE, BLUE),
    "smbfast_boosting": ("^", BLUE, BLUE),
    "untrained": ("s", ORANGE, ORANGE),
    "counts": ("D", GREEN, GREEN),
}


def forest(rows: list[ForestRow], metric: str) -> str | None:
    """Plot the value of each model with its interval, and beside it the difference to `smbfast`."""
    if not rows:
        return None
    tasks = list(dict.fromkeys(row.task for row in rows))
    height = 0.24 * len(rows) + 0.34 * len(tasks) + 0.9
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        ticks: list[tuple[float, str, bool]] = []
        y = 0.0
        for task in tasks:
            ticks.append((y, _plain(task), True))
            y += 1
            for row in (row for row in rows if row.task == task):
                ticks.append((y, _plain(row.label), False))
                marker, edge, face = _MARKS.get(row.name, ("^", GREY, "white"))
                _interval(left, row.value, y, marker, edge, face)
                if row.difference is not None:
                    sure = row.difference[1] > 0 or row.difference[2] < 0
                    _interval(right, row.difference, y, "o", BLUE, BLUE if sure else "white")
                y += 1
            y += 0.35
        left.set_ylim(y - 0.6, -0.6)
        left.set_yticks([tick[0] for tick in ticks], labels=[tick[1] for tick in ticks])
        for (_, _, bold), text in zip(ticks, left.get_yticklabels(), strict=True):
            text.set_fontweight("bold" if bold else "normal")
            text.set_color(INK)
        left.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        right.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for ax, title, unit in (
            (left, f"{metric} of each model", f"{metric} (0.5, dashed: chance)"),
            (right, "smbfast minus this model", f"difference in {metric}"),
        ):
            ax.set_title(title, pad=4)
            ax.set_xlabel(unit)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        return _svg(figure, f"forest-{_slug(metric)}", f"{metric} of each model with intervals")


def _interval(
    ax: Axes, value: tuple[float, float, float], y: float, marker: str, edge: str, face: str
) -> None:
    middle, low, high = value
    if np.isfinite(low) and np.isfinite(high):
        ax.plot([low, high], [y, y], color=edge, linewidth=1.4, solid_capstyle="round")
    ax.plot([middle], [y], marker=marker, markersize=5.5, color=edge, markerfacecolor=face)


def smooth(value_N: np.ndarray) -> np.ndarray:
    """Return the exponential mean over a fortieth of the series, unbiased at its start."""
    keep = 1 - 1 / max(1.0, len(value_N) / 40)
    smoothed_N = np.empty(len(value_N))
    total = weight = 0.0
    for i, value in enumerate(value_N):
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        smoothed_N[i] = total / weight
    return smoothed_N


def _with(phases: list[Phase], has: Callable[[Phase], bool]) -> list[Phase]:
    return [phase for phase in phases if has(phase)]


def _known(records: list[Record], key: str) -> bool:
    return bool(np.isfinite(column(records, key)).any())


def _finite(records: list[Record], value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite_N = np.isfinite(value_N)
    return column(records, "step")[finite_N], value_N[finite_N]


def _plot(ax: Axes, step_N: np.ndarray, value_N: np.ndarray, **style: Any) -> None:
    if len(step_N) > _POINTS:
        shown = np.unique(np.linspace(0, len(step_N) - 1, _POINTS).astype(int))
        step_N, value_N = step_N[shown], value_N[shown]
    if len(step_N) == 1 and "marker" not in style:
        style["marker"] = "."
    ax.plot(step_N, value_N, **style)


def _frame(ax: Axes, phases: list[Phase], title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = phases[0].start, max(phase.end for phase in phases)
    ax.set_xlim(low - 0.01 * (high - low) - 0.5, high + 0.01 * (high - low) + 0.5)
    for i, phase in enumerate(phases):
        ax.axvspan(phase.start, phase.end, color="#f3f5f8" if i % 2 == 0 else "#e6eaf0", zorder=0)
        ax.text(
            (phase.start + phase.end) / 2,
            1.02,
            _plain(phase.name),
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7.5,
            color="#4a5160",
            style="italic",
        )


def _line(ax: Axes, y: float, label: str, color: str, below: bool = False) -> None:
    ax.axhline(y, color=color, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.annotate(
        label,
        (0.99, y),
        (0, -2 if below else 2),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        fontsize=7.5,
        color=color,
    )


def _draw(name: str, panels: list[Panel], label: str) -> str | None:
    if not panels:
        return None
    with matplotlib.rc_context(_STYLE):
        columns = min(len(panels), _COLUMNS)
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(10, 2.75 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            panel(ax)
        for ax in axes[len(panels) :]:
            ax.remove()
        return _svg(figure, name, label)


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.BytesIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # its stylesheet would rule the whole page, its metadata names a licence server
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        # inside html the namespace is implied
        element.tag = element.tag.removeprefix(_SVG)
        if link := element.attrib.pop(_LINK, None):
            element.set("href", link.replace("#", f"#{name}-"))
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _plain(text: str, limit: int = 44) -> str:
    # control characters are not xml
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())
