"""Metrics of a binary outcome, each under many weightings of the rows at once, and its calibration.

Shape suffixes: N label rows, B draws, P rows with the outcome, M without.
"""

from typing import TypedDict

import numpy as np
from scipy.special import expit, logit

from smbfast.statistics.pairs import Pairs
from smbfast.statistics.weights import Metric, ratio, weighted_sums

_NEAREST = 1e-9  # to 0 and 1 that a probability may come before its logit is taken (our choice)
_STEPS = 40  # of Newton's method, after which a draw has no solution (separated classes)
_LAST = 1e-5  # a step this short is the last: the next would be about its square
_FEW = 10  # people in a bin of the calibration curve that are too few to show
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
    true_N = np.asarray(true_N, bool)
    order_N = np.argsort(-score_N, kind="stable").astype(np.int32)
    sorted_N, hit_N = score_N[order_N], true_N[order_N]
    positive_P, negative_M = order_N[hit_N], order_N[~hit_N]
    # a threshold takes all rows of equal score: how many of each kind are at or above it
    own_P = sorted_N[hit_N]
    true_P = np.searchsorted(-own_P, -own_P, side="right").astype(np.int32)
    false_P = np.searchsorted(-sorted_N[~hit_N], -own_P, side="right").astype(np.int32)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        value_B = np.full(len(weight_BN), np.nan)
        for draw, weight_N in enumerate(weight_BN):
            weight_P = weight_N.take(positive_P)
            right_P = _sums(weight_P).take(true_P)
            called_P = right_P + _sums(weight_N.take(negative_M)).take(false_P)
            if len(right_P) and right_P[-1] > 0:
                precision_P = right_P / np.maximum(called_P, 1)
                value_B[draw] = weight_P @ precision_P / right_P[-1]
        return value_B

    return metric


def brier(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the mean squared difference between probability and outcome as a metric."""
    square_N = (probability_N - true_N.astype(np.float64)) ** 2

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(weighted_sums(weight_BN, square_N), weight_BN.sum(1).astype(np.float64))

    return metric


def brier_skill(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return 1 - Brier score / that of the prevalence: 0 for whoever says only how common it is.

    The prevalence is that of the draw. nan for one class only.
    """
    score, true_N = brier(probability_N, true_N), true_N.astype(np.float64)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        share_B = ratio(weighted_sums(weight_BN, true_N), weight_BN.sum(1).astype(np.float64))
        return 1 - ratio(score(weight_BN), share_B * (1 - share_B))

    return metric


def slope(probability_N: np.ndarray, true_N: np.ndarray) -> Metric:
    """Return the calibration slope: the coefficient of logit(probability) in a logistic regression
    of the outcome on it, with an intercept (Cox 1958). 1 is perfect, below 1 too extreme.

    A probability of exactly 0 or 1 is taken as 1e-9 from it (our choice): one that is wrong has no
    finite logit, and pulls the slope towards 0. nan where the classes are separated, or all
    probabilities are equal.
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

    Equal predictions stay in one bin, and a bin of at most 10 people joins its neighbour, as does
    one with 1 to 10 people of either outcome, whom a share of the bin would tell. The interval
    (95 %) is Wilson's with the people in the bin as its number: rows of one patient are not
    independent, so it is on the wide side (our choice).

    Args:
        probability_N: float, true_N: bool, subject_N: whose the row is.
    """
    parts = bins(probability_N, true_N, subject_N, num_bins)
    return [_bin(probability_N[rows], true_N[rows], subject_N[rows]) for rows in parts]


def bins(
    probability_N: np.ndarray, true_N: np.ndarray, subject_N: np.ndarray, num_bins: int = 10
) -> list[np.ndarray]:
    """Return the rows of each bin of a calibration curve, least prediction first; see `curve`."""
    if len(probability_N) == 0:
        return []
    edges = np.quantile(probability_N, np.arange(1, num_bins) / num_bins)
    bin_N = np.searchsorted(np.unique(edges), probability_N, side="right")

    def tells(rows: np.ndarray) -> bool:
        people = (len(np.unique(subject_N[rows[true_N[rows] == one]])) for one in (True, False))
        return len(np.unique(subject_N[rows])) <= _FEW or any(0 < n <= _FEW for n in people)

    parts: list[np.ndarray] = []
    for number in np.unique(bin_N):
        rows = np.flatnonzero(bin_N == number)
        if parts and tells(parts[-1]):
            parts[-1] = np.concatenate([parts[-1], rows])
        else:
            parts.append(rows)
    while len(parts) > 1 and tells(parts[-1]):
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
    score_N, spread = logit(np.clip(probability_N, _NEAREST, 1 - _NEAREST)), 1.0
    if slope and len(score_N):
        # of mean 0 and deviation 1 the two coefficients hardly depend on each other, and a step is
        # as good for probabilities of 0 and 1, whose logits lie far out
        spread = float(score_N.std()) if np.ptp(score_N) > 0 else 1.0
        score_N = (score_N - score_N.mean()) / spread
    true_N = true_N.astype(np.float64)
    # draws begin at the solution of all rows, from where few steps are left; all rows begin where
    # the curvature is largest: a slope of 1 may be so far off that no step leads back
    begin_12 = np.array([[0.0, 0.0 if slope else 1.0]])
    whole_12 = _newton(score_N, true_N, np.ones((1, len(true_N))), begin_12, slope)
    start_12 = np.where(np.isfinite(whole_12), whole_12, begin_12)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        start_B2 = np.repeat(start_12, len(weight_BN), 0)
        return _newton(score_N, true_N, weight_BN, start_B2, slope)[:, int(slope)] / spread

    return metric


def _newton(
    score_N: np.ndarray, true_N: np.ndarray, weight_BN: np.ndarray, fit_B2: np.ndarray, slope: bool
) -> np.ndarray:
    """Return intercept and slope, float64 [B, 2]; nan where there is no solution.

    One draw at a time; its rows of weight 0 are left out. Where few rows lie far out, long steps
    may lead astray: then short ones begin again, from where the curvature is largest.
    """
    fit_B2 = fit_B2.copy()
    begin_2 = np.array([0.0, 0.0 if slope else 1.0])
    for draw, weight_N in enumerate(weight_BN):
        rows = np.flatnonzero(weight_N)
        own = score_N[rows], true_N[rows], weight_N[rows].astype(np.float64)
        for start_2, longest in ((fit_B2[draw], 2.0), (begin_2, 0.25)):
            fit_B2[draw], converged = _solved(*own, start_2, slope, longest)
            if converged:
                break
    return fit_B2


def _solved(
    score_N: np.ndarray,
    true_N: np.ndarray,
    weight_N: np.ndarray,
    fit_2: np.ndarray,
    slope: bool,
    longest: float,
) -> tuple[np.ndarray, bool]:
    """Return intercept and slope after steps of at most `longest`, and whether they converged; nan
    if not."""
    for _ in range(_STEPS):
        step_2 = _step(score_N, true_N, weight_N, fit_2, slope)
        fit_2 = fit_2 + np.clip(step_2, -longest, longest)
        if np.abs(step_2).max() < _LAST:
            return fit_2, True
    return np.full(2, np.nan), False


def _step(
    score_N: np.ndarray, true_N: np.ndarray, weight_N: np.ndarray, fit_2: np.ndarray, slope: bool
) -> np.ndarray:
    """Return the step of Newton's method for intercept and slope, float64 [2]."""
    rate_N = expit(fit_2[0] + fit_2[1] * score_N)
    residual_N = weight_N * (true_N - rate_N)
    curvature_N = weight_N * rate_N * (1 - rate_N)
    gradient_0, curvature_00 = residual_N.sum(), curvature_N.sum()
    with np.errstate(all="ignore"):
        if not slope:
            return np.array([gradient_0 / curvature_00, 0.0])
        gradient_1, curvature_01 = residual_N @ score_N, curvature_N @ score_N
        curvature_11 = (curvature_N * score_N) @ score_N
        step_2 = np.array(
            [
                curvature_11 * gradient_0 - curvature_01 * gradient_1,
                curvature_00 * gradient_1 - curvature_01 * gradient_0,
            ]
        )
        return step_2 / (curvature_00 * curvature_11 - curvature_01**2)


def _sums(weight_N: np.ndarray) -> np.ndarray:
    """Return the sums of the weights before each place, float64 [N + 1]."""
    sum_N = np.zeros(len(weight_N) + 1)
    np.cumsum(weight_N, out=sum_N[1:])
    return sum_N
