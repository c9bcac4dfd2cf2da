"""Metrics of a binary outcome, each under many weightings of the rows at once, and its calibration.

Shape suffixes: N label rows, B draws, G groups of equal score, P rows with the outcome, M without.
"""

from typing import TypedDict

import numpy as np
from scipy.special import expit, logit

from smbfast.statistics.pairs import Pairs
from smbfast.statistics.weights import Metric, ratio

_NEAREST = 1e-9  # to 0 and 1 that a probability may come before its logit is taken (our choice)
_STEPS = 40  # of Newton's method, after which a draw has no solution (separated classes)
_FEWEST = 10  # people in a bin of the calibration curve
_NORMAL = 1.959963984540054  # the 97.5 % point of the normal law


class Bin(TypedDict):
    """One bin of a calibration curve: means, the interval of the observed share, and people."""

    predicted: float
    observed: float
    low: float
    high: float
    num: int


def auroc(score_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the area under the ROC curve as a metric; equal scores count one half."""
    true_N = np.asarray(true_N, bool)
    positive_P, negative_M = np.flatnonzero(true_N), np.flatnonzero(~true_N)
    pairs = Pairs(
        score_N[positive_P],
        np.zeros(len(positive_P), np.int64),
        score_N[negative_M],
        np.ones(len(negative_M), np.int64),
    )

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(*pairs.sums(weight_BN.take(positive_P, 1), weight_BN.take(negative_M, 1)))

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
        return ratio((positive_BG * precision_BG).sum(1), positive_BG.sum(1))

    return metric


def brier(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the mean squared difference between probability and outcome as a metric."""
    square_N = (probability_N - true_N.astype(np.float64)) ** 2

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(weight_BN @ square_N, weight_BN.sum(1).astype(np.float64))

    return metric


def brier_skill(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return 1 - Brier score / that of the prevalence: 0 for whoever says only how common it is.

    The prevalence is that of the draw. nan for one class only.
    """
    score, true_N = brier(probability_N, true_N), true_N.astype(np.float64)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        share_B = ratio(weight_BN @ true_N, weight_BN.sum(1).astype(np.float64))
        return 1 - ratio(score(weight_BN), share_B * (1 - share_B))

    return metric


def slope(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the calibration slope: the coefficient of logit(probability) in a logistic regression
    of the outcome on it, with an intercept (Cox 1958). 1 is perfect, below 1 too extreme.

    nan where the classes are separated, or all probabilities are equal.
    """
    return _recalibration(probability_N, true_N, slope=True)


def intercept(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return calibration in the large: the intercept of a logistic regression of the outcome with
    logit(probability) as offset (slope 1). 0 is perfect, above 0 the outcome is more common than
    predicted. nan for one class only.
    """
    return _recalibration(probability_N, true_N, slope=False)


def curve(
    probability_N: np.ndarray, true_N: np.ndarray, subject_N: np.ndarray, num_bins: int = 10
) -> list[Bin]:
    """Return the calibration curve: observed against predicted by deciles of the prediction.

    Equal predictions stay in one bin, and a bin of fewer than 10 people joins its neighbour. The
    interval (95 %) is Wilson's with the people in the bin as its number: rows of one patient are
    not independent, so it is on the wide side (our choice).

    Args:
        probability_N: float, true_N: bool, subject_N: whose the row is.
    """
    parts = bins(probability_N, subject_N, num_bins)
    return [_bin(probability_N[rows], true_N[rows], subject_N[rows]) for rows in parts]


def bins(probability_N: np.ndarray, subject_N: np.ndarray, num_bins: int = 10) -> list[np.ndarray]:
    """Return the rows of each bin of a calibration curve, least prediction first; see `curve`."""
    if len(probability_N) == 0:
        return []
    edges = np.quantile(probability_N, np.arange(1, num_bins) / num_bins)
    bin_N = np.searchsorted(np.unique(edges), probability_N, side="right")
    parts: list[np.ndarray] = []
    for number in np.unique(bin_N):
        rows = np.flatnonzero(bin_N == number)
        if parts and len(np.unique(subject_N[parts[-1]])) < _FEWEST:
            parts[-1] = np.concatenate([parts[-1], rows])
        else:
            parts.append(rows)
    if len(parts) > 1 and len(np.unique(subject_N[parts[-1]])) < _FEWEST:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def _bin(probability_N: np.ndarray, true_N: np.ndarray, subject_N: np.ndarray) -> Bin:
    people, observed = len(np.unique(subject_N)), float(true_N.mean())
    square = _NORMAL**2
    middle = (observed + square / (2 * people)) / (1 + square / people)
    variance = observed * (1 - observed) / people + square / (4 * people**2)
    half = _NORMAL * np.sqrt(variance) / (1 + square / people)
    return {
        "predicted": float(probability_N.mean()),
        "observed": observed,
        "low": max(0.0, float(middle - half)),
        "high": min(1.0, float(middle + half)),
        "num": people,
    }


def _recalibration(probability_N: np.ndarray, true_N: np.ndarray, slope: bool) -> Metric:
    """Fit the outcome on logit(probability) under the weights of each draw, by Newton's method."""
    score_N = logit(np.clip(probability_N, _NEAREST, 1 - _NEAREST))
    if slope and len(score_N):
        equal = np.ptp(score_N) == 0
        # centred, the two coefficients hardly depend on each other
        score_N = np.zeros(len(score_N)) if equal else score_N - score_N.mean()
    true_N = true_N.astype(np.float64)
    # draws begin at the solution of all rows, from where few steps are left
    whole_12 = _newton(score_N, true_N, np.ones((1, len(true_N))), np.array([[0.0, 1.0]]), slope)
    start_12 = np.where(np.isfinite(whole_12), whole_12, [[0.0, 1.0]])

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        start_B2 = np.repeat(start_12, len(weight_BN), 0)
        return _newton(score_N, true_N, weight_BN, start_B2, slope)[:, int(slope)]

    return metric


def _newton(
    score_N: np.ndarray, true_N: np.ndarray, weight_BN: np.ndarray, fit_B2: np.ndarray, slope: bool
) -> np.ndarray:
    """Return intercept and slope, float64 [B, 2]; nan where there is no solution."""
    fit_B2, open_B = fit_B2.copy(), np.ones(len(weight_BN), bool)
    with np.errstate(all="ignore"):
        for _ in range(_STEPS):
            weight = weight_BN[open_B]
            rate = expit(fit_B2[open_B, :1] + fit_B2[open_B, 1:] * score_N)
            residual = weight * (true_N - rate)
            rate *= 1 - rate
            rate *= weight  # the curvature of each row
            gradient_0, curvature_00 = residual.sum(1), rate.sum(1)
            if slope:
                gradient_1, curvature_01 = residual @ score_N, rate @ score_N
                rate *= score_N
                curvature_11 = rate @ score_N
                determinant = curvature_00 * curvature_11 - curvature_01**2
                step = np.stack(
                    [
                        curvature_11 * gradient_0 - curvature_01 * gradient_1,
                        curvature_00 * gradient_1 - curvature_01 * gradient_0,
                    ],
                    axis=1,
                )
                step /= determinant[:, None]
            else:
                step = np.stack([gradient_0 / curvature_00, np.zeros(len(weight))], 1)
            fit_B2[open_B] += np.clip(step, -2, 2)  # a step that is too long is cut short
            # a step below 1e-7 was the last that matters: the error is squared by each
            open_B[open_B] = ~(np.abs(step).max(1) < 1e-7)
            if not open_B.any():
                break
    fit_B2[open_B] = np.nan
    return fit_B2


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
