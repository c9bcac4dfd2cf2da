"""Draws the plots of a training run, by optimizer step.

Each function returns its panels, each text that starts with `<svg`; none where there is nothing to
plot.

Legend: N records of one phase.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from smbfast.reporting.drawing import (
    BAND,
    BLUE,
    DARK_BAND,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SOFT,
    dashed,
    legend_below,
    panel,
    plain,
)
from smbfast.reporting.runlog import (
    Phase,
    Record,
    column,
    relative,
)
from smbfast.reporting.verdict import GOOD_RATIO, HALF, trivial_ratio

# a longer line is not finer on paper, only a larger file; captions say so
POINTS = 600
Panel = Callable[[Axes], None]
Series = tuple[str, str | None, str, str]  # key, label, colour, marker


def losses(phases: list[Phase]) -> list[str]:
    """Plot each loss: of the steps that were logged, smoothed, and on the tuning split."""
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
    legend_below(ax, columns=2)


def health(phases: list[Phase]) -> list[str]:
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

    def drawn(draw: Callable[[Axes, list[Phase]], None], own: list[Phase]) -> Panel:
        return lambda ax: draw(ax, own)

    panels = [drawn(draw, own) for draw, has in shown if (own := _with(phases, has))]
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
    legend_below(ax, columns=2)


def _share_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Effective rank since phase entry", "share of value at phase entry")
    # ranks of random weights are no reference
    after = [replace(p, evals=[r for r in p.evals if not r.get("untrained")]) for p in phases]
    _series(ax, after, _RANKS, relative)
    dashed(ax, HALF, "one half", INK)
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))


def _probe_panel(ax: Axes, phases: list[Phase]) -> None:
    tasks = [record.get("probe_task") for phase in phases for record in phase.evals]
    task = next((plain(str(name), 24) for name in tasks if name), "")
    _frame(ax, phases, f"Online probe: {task}", "AUROC on tuning nodes")
    _series(ax, phases, [("probe_auroc", None, BLUE, "o")])
    dashed(ax, 0.5, "chance", INK)


def _r2_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "R² of the latent loss by horizon", "R² (dashed: copying the state)")
    names = list(dict.fromkeys(name for phase in phases for name in horizons(phase.evals)))
    for name, color in zip(names, itertools.cycle((BLUE, ORANGE, GREEN, PURPLE)), strict=False):
        _series(ax, phases, [(f"r2_{name}", plain(name, 12), color, "o")])
        copied: list[Series] = [(f"r2_copy_{name}", None, color, "")]
        _series(ax, phases, copied, linestyle=(0, (3, 2)), linewidth=1.0)
    # before its first steps a random predictor is far below any constant
    low, high = ax.get_ylim()
    ax.set_ylim(min(max(low, -0.5), -0.05), max(high, 0.1))
    dashed(ax, 0.0, "a constant", INK)
    legend_below(ax, columns=4)


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
    dashed(ax, HALF, "one half", INK)
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))
    legend_below(ax, columns=2)


def _ratio_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Loss against trivial predictors", "loss / best trivial loss")
    for phase in phases:
        step_N, value_N = _finite(phase.evals, trivial_ratio(phase.evals))
        _plot(ax, step_N, value_N, color=BLUE, marker="o")
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    dashed(ax, 1.0, "trivial", INK)
    dashed(ax, GOOD_RATIO, f"goal {GOOD_RATIO}", GREEN, below=True)


def _distance_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Online to target distance", "relative distance")
    _series(ax, phases, [("distance", None, PURPLE, "o")])
    ax.set_ylim(0, max(ax.get_ylim()[1], 1e-6))


def _gradient_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Gradient of each loss on the trunk", "L2 norm, unweighted")
    _pull_series(ax, phases, "grad")
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05 or 1.0)
    legend_below(ax, columns=4)


def _cosine_panel(ax: Axes, phases: list[Phase]) -> None:
    _frame(ax, phases, "Cosine of two gradients", "cosine (below 0: they oppose)")
    _pull_series(ax, phases, "cos")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.2), max(high, 0.2))
    dashed(ax, 0.0, "", INK)
    legend_below(ax, columns=2)


def _pull_series(ax: Axes, phases: list[Phase], kind: str) -> None:
    keys = dict.fromkeys(key for phase in phases for key in _pulls(phase, kind))
    looks = itertools.cycle(((BLUE, "o"), (ORANGE, "s"), (GREEN, "^")))
    for key, (color, marker) in zip(keys, looks, strict=False):
        label = plain(" and ".join(key.split("_")[1:]), 24)
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


def optimizer(phases: list[Phase]) -> list[str]:
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


def machine(phases: list[Phase]) -> list[str]:
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
) -> list[str]:
    def drawn(key: str, scale: float, title: str, unit: str, color: str, noisy: bool) -> Panel:
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

    panels = [drawn(*row) for row in series if any(_known(phase.steps, row[0]) for phase in phases)]
    return _draw(name, panels, label)


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
    if len(step_N) > POINTS:
        shown = np.unique(np.linspace(0, len(step_N) - 1, POINTS).astype(int))
        step_N, value_N = step_N[shown], value_N[shown]
    if len(step_N) == 1 and "marker" not in style:
        style["marker"] = "."
    ax.plot(step_N, value_N, **style)


def _frame(ax: Axes, phases: list[Phase], title: str, unit: str) -> None:
    ax.set_title(title, pad=16)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = phases[0].start, max(phase.end for phase in phases)
    ax.set_xlim(low - 0.01 * (high - low) - 0.5, high + 0.01 * (high - low) + 0.5)
    for i, phase in enumerate(phases):
        ax.axvspan(phase.start, phase.end, color=BAND if i % 2 == 0 else DARK_BAND, zorder=0)
        ax.text(
            (phase.start + phase.end) / 2,
            1.02,
            plain(phase.name),
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=SOFT,
            style="italic",
        )


def _draw(name: str, panels: list[Panel], label: str) -> list[str]:
    return [panel(f"{name}-{i}", label, draw) for i, draw in enumerate(panels)]
