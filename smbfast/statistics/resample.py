"""Computes metrics under many integer weightings at once, and intervals by resampling patients.

A bootstrap draw takes patients with replacement. The weight of a label row is the number of times
that its patient was drawn, so the rows of a patient stay together. Every model of a task sees the
same draws, which makes differences between models paired. Scores are sorted once, and draws are
vectorised.

Shape suffixes: N label rows, B draws, P patients, G groups of equal score, E rows with an event.
"""

from collections.abc import Hashable
from typing import NamedTuple, TypeVar

import numpy as np

from smbfast.statistics.binary import auprc, auroc, brier
from smbfast.statistics.survival import c_index
from smbfast.statistics.weights import Metric

__all__ = [
    "Interval",
    "Metric",
    "auprc",
    "auroc",
    "brier",
    "c_index",
    "interval",
    "patient_weights",
    "resampled",
]

Name = TypeVar("Name", bound=Hashable)  # what a metric is called by

_CELLS = 1_000_000  # weights held at once: they, and what is made of them, stay in a cache


class Interval(NamedTuple):
    """A value with its 95 % interval; None where too few draws could be measured."""

    value: float
    low: float | None
    high: float | None


def patient_weights(subject_N: np.ndarray, draws: range, seed: int) -> np.ndarray:
    """Return how often each row counts in each of `draws`, int32 [B, N]: alike within a patient.

    A draw depends on the seed, its number and the number of patients alone.
    """
    return _weights(np.unique(subject_N, return_inverse=True)[1], draws, seed)


def _weights(patient_N: np.ndarray, draws: range, seed: int) -> np.ndarray:
    """Return the weights of `patient_weights`, of rows whose patients are numbered from 0."""
    num_patients = int(patient_N.max(initial=-1)) + 1
    weight_BP = np.empty((len(draws), num_patients), np.int32)
    for at, draw in enumerate(draws):
        chosen = np.random.default_rng([seed, draw]).integers(num_patients, size=num_patients)
        weight_BP[at] = np.bincount(chosen, minlength=num_patients)
    return weight_BP.take(patient_N, 1)


def resampled(
    metrics: dict[Name, Metric], subject_N: np.ndarray, draws: int, seed: int
) -> tuple[dict[Name, float], dict[Name, np.ndarray]]:
    """Return each metric on all rows, and in each of `draws` draws (the same for all metrics)."""
    whole_1N = np.ones((1, len(subject_N)), np.int32)
    values = {name: float(metric(whole_1N)[0]) for name, metric in metrics.items()}
    size = max(1, _CELLS // max(1, len(subject_N)))
    patient_N = np.unique(subject_N, return_inverse=True)[1]
    drawn: dict[Name, list[np.ndarray]] = {name: [np.empty(0)] for name in metrics}
    for start in range(0, draws, size):
        weight_BN = _weights(patient_N, range(start, min(start + size, draws)), seed)
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
