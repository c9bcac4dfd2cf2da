"""Draws several runs over each other, by optimizer step, on axes that they share.

Each function returns panels, each text that starts with `<svg`; none where there is nothing to
plot.

Legend: N records of one run.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from smbfast.reporting.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    dashed,
    legend_below,
    panel,
    plain,
)
from smbfast.reporting.figures import smooth
from smbfast.reporting.runlog import Record, Run, column
from smbfast.reporting.verdict import trivial_ratio

# as in plots of calibration, so that a run has one colour
_LOOKS = ((BLUE, "o"), (GREEN, "D"), (ORANGE, "s"), (PURPLE, "^"), (GREY, "v"))
_POINTS = 400  # of a line: more are not finer on paper
_START = 0.1  # of the steps, whose high losses would flatten the rest: our choice
Values = Callable[[list[Record]], np.ndarray]
Line = tuple[np.ndarray, np.ndarray]  # steps and values, float64 [N] each


def losses(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Plot each loss of each run: pale the smoothed training steps, marked the tuning split."""
    panels = []
    for key, title, unit in (
        ("sft", "Next-token loss (SFT)", "cross-entropy (nats / token)"),
        ("jepa", "Latent prediction loss (JEPA)", "mean squared error"),
        ("codes", "Codes to come", "cross-entropy of a pair / 10"),
    ):
        trained, tuned = (
            [_line(run, kind, partial(_scaled, key=key)) for run in runs]
            for kind in ("steps", "evals")
        )
        if any(len(step_N) for step_N, _ in (*trained, *tuned)):
            panels.append(_loss_panel(f"loss-{key}", title, unit, names, trained, tuned))
    return panels


def _loss_panel(
    name: str,
    title: str,
    unit: str,
    names: Sequence[str],
    trained: Sequence[Line],
    tuned: Sequence[Line],
) -> str:
    def draw(ax: Axes) -> None:
        _words(ax, title, unit)
        for (step_N, value_N), (color, _) in zip(trained, itertools.cycle(_LOOKS), strict=False):
            _plot(ax, step_N, smooth(value_N), color=color, alpha=0.4, linewidth=1.0)
        _marked(ax, names, tuned)
        ends = _after_start([*trained, *tuned])
        if len(ends) and ends.max() > ends.min():
            room = 0.06 * (ends.max() - ends.min())
            ax.set_ylim(ends.min() - room, ends.max() + room)
        legend_below(ax, columns=_columns(names))

    return panel(name, f"{title} of each run by optimizer step", draw)


def _after_start(lines: Sequence[Line]) -> np.ndarray:
    """Return the values after the first tenth of all steps; all of them where none is later."""
    last = max((step_N[-1] for step_N, _ in lines if len(step_N)), default=0.0)
    late = [value_N[step_N >= _START * last] for step_N, value_N in lines]
    together = np.concatenate(late) if late else np.empty(0)
    return together if len(together) else np.concatenate([value_N for _, value_N in lines])


_HEALTH: list[tuple[str, str, str, tuple[float, str] | None]] = [
    ("online_rank", "Effective rank, online encoder", "directions in use", None),
    ("embedding_rank", "Effective rank, embeddings", "directions in use", None),
    ("target_rank", "Effective rank, target encoder", "directions in use", None),
    ("probe_auroc", "Online probe", "AUROC on tuning nodes", (0.5, "chance")),
    ("ratio", "JEPA against trivial predictors", "loss / best trivial loss", (1.0, "trivial")),
    ("r2", "R² of the latent loss", "R²", (0.0, "a constant")),
    ("distance", "Online to target distance", "relative distance", None),
]


def health(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Plot what says whether representations are well, at the evaluations of each run."""
    panels = []
    for key, title, unit, level in _HEALTH:
        values = trivial_ratio if key == "ratio" else partial(_scaled, key=key)
        lines = [_line(run, "evals", values) for run in runs]
        if any(len(step_N) for step_N, _ in lines):
            draw = partial(
                _draw_health, title=title, unit=unit, level=level, names=names, lines=lines
            )
            panels.append(panel(f"health-{key}", f"{title} of each run", draw))
    return panels


def _draw_health(
    ax: Axes,
    title: str,
    unit: str,
    level: tuple[float, str] | None,
    names: Sequence[str],
    lines: Sequence[Line],
) -> None:
    _words(ax, title, unit)
    _marked(ax, names, lines)
    if level is not None:
        dashed(ax, *level, INK)
    legend_below(ax, columns=_columns(names))


def machine(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Plot throughput, memory and the wait for data of each run, smoothed."""
    panels = []
    for key, scale, title, unit in (
        ("tokens_per_s", 1.0, "Throughput", "trunk tokens / s"),
        ("memory_gib", 1.0, "Peak memory", "GiB"),
        ("wait", 100.0, "Waiting for data", "% of step time"),
    ):
        lines = [_line(run, "steps", partial(_scaled, key=key, scale=scale)) for run in runs]
        if any(len(step_N) for step_N, _ in lines):
            draw = partial(_draw_machine, title=title, unit=unit, names=names, lines=lines)
            panels.append(panel(f"machine-{key}", f"{title} of each run", draw))
    return panels


def _draw_machine(
    ax: Axes, title: str, unit: str, names: Sequence[str], lines: Sequence[Line]
) -> None:
    _words(ax, title, unit)
    looks = itertools.cycle(_LOOKS)
    for name, (step_N, value_N), (color, _) in zip(names, lines, looks, strict=False):
        _plot(ax, step_N, smooth(value_N), color=color, label=plain(name, 30))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05 or 1.0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    legend_below(ax, columns=_columns(names))


def _scaled(records: list[Record], key: str, scale: float = 1.0) -> np.ndarray:
    return column(records, key) * scale


def _line(run: Run, kind: str, values: Values) -> Line:
    """Return the steps and the known values of all phases of a run, float64 [N] each."""
    records: list[Record] = [r for phase in run.phases for r in getattr(phase, kind)]
    value_N = values(records)
    finite_N = np.isfinite(value_N)
    return column(records, "step")[finite_N], value_N[finite_N]


def _marked(ax: Axes, names: Sequence[str], lines: Sequence[Line]) -> None:
    looks = itertools.cycle(_LOOKS)
    for name, (step_N, value_N), (color, marker) in zip(names, lines, looks, strict=False):
        style = {"color": color, "marker": marker, "linewidth": 1.2, "label": plain(name, 30)}
        _plot(ax, step_N, value_N, **style)


def _plot(ax: Axes, step_N: np.ndarray, value_N: np.ndarray, **style: Any) -> None:
    if len(step_N) > _POINTS:
        shown = np.unique(np.linspace(0, len(step_N) - 1, _POINTS).astype(int))
        step_N, value_N = step_N[shown], value_N[shown]
    if len(step_N):
        ax.plot(step_N, value_N, **style)


def _columns(names: Sequence[str]) -> int:
    """Return how many names stand beside each other below a panel."""
    longest = max(len(plain(name, 30)) for name in names)
    return 3 if longest <= 10 else 2 if longest <= 18 else 1


def _words(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, pad=6)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
