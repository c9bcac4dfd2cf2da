"""Computes metrics under many integer weightings at once, and intervals by resampling patients.

A bootstrap draw takes patients with replacement. The weight of a label row is the number of times
that its patient was drawn, so the rows of a patient stay together. Every model of a task sees the
same draws, which makes differences between models paired. Scores are sorted once, and draws are
vectorised.

Shape suffixes: N label rows, B draws, P patients, G groups of equal score, E rows with an event.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)  # what a metric is called by

Metric = Callable[[np.ndarray], np.ndarray]
"""Weights int [B, N] -> the metric of each draw, float64 [B]; nan where it is not defined."""

_CELLS = 8_000_000  # entries held at once: 64 MB in int64


class Interval(NamedTuple):
    """A value with its 95 % interval; None where too few draws could be measured."""

    value: float
    low: float | None
    high: float | None


def patient_weights(subject_N: np.ndarray, draws: range, seed: int) -> np.ndarray:
    """Return how often each row counts in each of `draws`, int32 [B, N]: alike within a patient.

    A draw depends on the seed, its number and the number of patients alone.
    """
    subject_P, patient_N = np.unique(subject_N, return_inverse=True)
    weight_BP = np.empty((len(draws), len(subject_P)), np.int32)
    for at, draw in enumerate(draws):
        chosen = np.random.default_rng([seed, draw]).integers(len(subject_P), size=len(subject_P))
        weight_BP[at] = np.bincount(chosen, minlength=len(subject_P))
    return weight_BP[:, patient_N]


def resampled(
    metrics: dict[Name, Metric], subject_N: np.ndarray, draws: int, seed: int
) -> tuple[dict[Name, float], dict[Name, np.ndarray]]:
    """Return each metric on all rows, and in each of `draws` draws (the same for all metrics)."""
    whole_1N = np.ones((1, len(subject_N)), np.int32)
    values = {name: float(metric(whole_1N)[0]) for name, metric in metrics.items()}
    size = max(1, _CELLS // max(1, len(subject_N)))
    drawn: dict[Name, list[np.ndarray]] = {name: [np.empty(0)] for name in metrics}
    for start in range(0, draws, size):
        weight_BN = patient_weights(subject_N, range(start, min(start + size, draws)), seed)
        for name, metric in metrics.items():
            drawn[name].append(metric(weight_BN))
    return values, {name: np.concatenate(parts) for name, parts in drawn.items()}


def interval(value: float, drawn_B: np.ndarray) -> Interval:
    """Return the percentile interval (2.5 to 97.5).

    Draws in which the metric is not defined (one class only) are left out. With fewer than half of
    the draws left there is no interval (our choice).
    """
    defined = drawn_B[np.isfinite(drawn_B)]
    if len(defined) == 0 or 2 * len(defined) < len(drawn_B):
        return Interval(value, None, None)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def auroc(score_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the area under the ROC curve as a metric; equal scores count one half."""
    order_N, start_G = _groups(score_N)
    true_N = true_N[order_N].astype(bool)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        positive_BG, negative_BG = _sums(weight_BN[:, order_N], true_N, start_G)
        below_BG = np.cumsum(negative_BG, 1) - negative_BG
        ahead_B = (positive_BG * (below_BG + 0.5 * negative_BG)).sum(1)
        return _ratio(ahead_B, positive_BG.sum(1) * negative_BG.sum(1))

    return metric


def auprc(score_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return average precision: the sum over thresholds of precision times the step in recall."""
    order_N, start_G = _groups(-score_N)
    true_N = true_N[order_N].astype(bool)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        positive_BG, negative_BG = _sums(weight_BN[:, order_N], true_N, start_G)
        true_BG = np.cumsum(positive_BG, 1)
        called_BG = true_BG + np.cumsum(negative_BG, 1)
        precision_BG = true_BG / np.maximum(called_BG, 1)
        return _ratio((positive_BG * precision_BG).sum(1), positive_BG.sum(1))

    return metric


def brier(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the mean squared difference between probability and outcome as a metric."""
    square_N = (probability_N - true_N.astype(np.float64)) ** 2

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return _ratio(weight_BN @ square_N, weight_BN.sum(1).astype(np.float64))

    return metric


def c_index(risk_N: np.ndarray, duration_N: np.ndarray, event_N: np.ndarray) -> Metric:
    """Return Harrell's C: of the comparable pairs, the share in which the earlier event has the
    higher risk; equal risks count one half.

    A pair is comparable if one has an event and the other outlives it, or is censored at that very
    time. A pair weighs the product of its rows' weights. Memory is bounded, time is B·E·N.
    """
    event_E = np.flatnonzero(event_N)
    rows = max(1, _CELLS // max(1, 2 * len(risk_N)))

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        # exact: sums of halves far below 2**23
        weight_BN = weight_BN.astype(np.float32)
        concordant_B = np.zeros(len(weight_BN))
        comparable_B = np.zeros(len(weight_BN))
        for start in range(0, len(event_E), rows):
            part_E = event_E[start : start + rows]
            duration_E1, risk_E1 = duration_N[part_E, None], risk_N[part_E, None]
            pair_EN = (duration_N > duration_E1) | ((duration_N == duration_E1) & ~event_N)
            credit_EN = (risk_E1 > risk_N) + 0.5 * (risk_E1 == risk_N)
            weight_BE = weight_BN[:, part_E].astype(np.float64)
            comparable_BE = weight_BN @ pair_EN.astype(np.float32).T
            concordant_BE = weight_BN @ (pair_EN * credit_EN).astype(np.float32).T
            comparable_B += (weight_BE * comparable_BE).sum(1)
            concordant_B += (weight_BE * concordant_BE).sum(1)
        return _ratio(concordant_B, comparable_B)

    return metric


def _groups(key_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending order of the keys, and where each run of equal keys starts in it."""
    order_N = np.argsort(key_N, kind="stable")
    sorted_N = key_N[order_N]
    start_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    return order_N, start_G


def _sums(
    weight_BN: np.ndarray, true_N: np.ndarray, start_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    positive_BG = np.add.reduceat(weight_BN * true_N, start_G, axis=1)
    total_BG = np.add.reduceat(weight_BN, start_G, axis=1)
    return positive_BG.astype(np.float64), (total_BG - positive_BG).astype(np.float64)


def _ratio(top_B: np.ndarray, bottom_B: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom_B > 0, top_B / bottom_B, np.nan)
