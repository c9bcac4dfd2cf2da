"""Estimates of metrics: the value, and what it is in every draw of patients and of versions.

A draw takes patients with replacement, and of a model with several versions (inits or training
seeds) versions too, so that an interval holds for the procedure and not for one outcome of it. All
models of a task see the same draws, which makes every difference paired. Shape suffixes: J judged
rows, B draws, S versions of a model.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from smbfast.statistics import holm, resample, seeds

Cell = dict[str, float | None]
Key = TypeVar("Key", bound=Hashable)
LEAST_DRAWS = 200
_WEIGHTS = 200_000_000  # weights of one task at most: above that fewer draws are taken


@dataclass(frozen=True)
class Estimate:
    """value: on all judged patients, nan where it is not defined; drawn_B: in each draw."""

    value: float
    drawn_B: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.drawn_B - other.drawn_B)

    def cell(self) -> Cell:
        """Return value, low and high (95 %) as JSON values, None where there is none."""
        if not np.isfinite(self.value):
            return {"value": None, "low": None, "high": None}
        return dict(resample.interval(self.value, self.drawn_B)._asdict())

    def p(self) -> float | None:
        """Return the two-sided p value of the hypothesis that the difference is 0."""
        return holm.p_value(self.drawn_B)


def num_draws(asked: int, rows: int) -> int:
    """Return how many draws are taken of `asked`: of many rows fewer, and then at least 200."""
    return min(asked, max(LEAST_DRAWS, _WEIGHTS // max(rows, 1)))


def estimates(
    metrics: dict[Key, list[resample.Metric]], subject_J: np.ndarray, draws: int, seed: int
) -> dict[Key, Estimate]:
    """Return the estimate of each metric, which is given for every version of a model.

    The value is the mean over versions. Models of as many versions see the same draw of them.
    """
    flat = {(key, s): metric for key, own in metrics.items() for s, metric in enumerate(own)}
    values, drawn = resample.resampled(flat, subject_J, draws, seed)
    estimated = {}
    weights = {s: seeds.seed_weights(s, draws, seed) for s in {len(m) for m in metrics.values()}}
    for key, own in metrics.items():
        value_S = np.array([values[key, s] for s in range(len(own))])
        drawn_BS = np.stack([drawn[key, s] for s in range(len(own))], 1)
        estimated[key] = Estimate(float(value_S.mean()), (weights[len(own)] * drawn_BS).sum(1))
    return estimated


def on_rows(metric: resample.Metric, rows: np.ndarray) -> resample.Metric:
    """Return a metric of `rows` (indices), a part of the judged rows, that takes the weights of all
    judged rows."""
    return lambda weight_BJ: metric(weight_BJ[:, rows])
