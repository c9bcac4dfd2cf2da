"""Logistic probe: L2 logistic regression fitted on train, its penalty chosen on the tuning split.

Features are scaled on train (`scaling`). The penalties are half a decade apart, and the one with
the least tuning log loss is taken: our choice, where EHRSHOT takes the AUROC of a coarser grid,
which hardly tells penalties apart and says nothing of probabilities. Shape suffixes: N rows, F
features, W = F + 1 weights, T rows of train.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from smbfast.probing.binary import BinaryProbe, calibrate, log_loss, require_classes
from smbfast.probing.features import Features
from smbfast.probing.scaling import Scaling, chunks, scaling, scores

PENALTIES = tuple(float(10.0**power) for power in np.arange(-6, 4.5, 0.5))
"""Inverse strengths C, strongest penalty first."""
_TOL, _ITERATIONS = 1e-6, 1000  # no component of the gradient is larger when a fit has converged
_GAIN = 1e-6  # nats; what a fit's stopping rule leaves is no reason for a weaker penalty
_WORSE = 1.5  # a path ends where the tuning log loss is as many times the least: our choice
_EPS = np.finfo(np.float64).eps


@dataclass(frozen=True)
class LogisticProbe(BinaryProbe):
    """penalty: C. at_border: whether it is the first or last of the grid, so that one outside of it
    might be better. converged: False if the fit stopped at the iteration limit."""

    penalty: float
    at_border: bool
    converged: bool


def fit_logistic(
    feature_NF: Features,
    true_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> LogisticProbe:
    """Fit on train, choose C and calibrate on tuning, and score every row.

    C has the least tuning log loss; of equal ones the stronger penalty is taken. Once that loss is
    half as much again as the least one, no weaker penalty is tried.

    Args:
        feature_NF: float [N, F], dense, sparse or in a file; true_N: bool; split_N: str, where rows
            that are neither `train` nor `tuning` are scored alone.

    Raises:
        ValueError: train has not both classes, or tuning has no row.
    """
    require_classes(true_N, split_N)
    tuning = split_N == "tuning"
    best = None
    for penalty, logit_N, converged in _path(feature_NF, true_N, split_N == "train", progress):
        loss = log_loss(logit_N[tuning], true_N[tuning])
        if best is None or loss < best[0] - _GAIN:
            best = loss, logit_N, penalty, converged
        elif loss > _WORSE * best[0]:  # weaker ones overfit more, and take the longest
            break
    assert best is not None
    loss, logit_N, penalty, converged = best
    own = calibrate(logit_N[tuning], true_N[tuning])
    border = penalty in (PENALTIES[0], PENALTIES[-1])
    return LogisticProbe(logit_N, loss, own, penalty, border, converged)


def _path(
    feature_NF: Features, true_N: np.ndarray, train_N: np.ndarray, progress: Callable[[str], None]
) -> Iterator[tuple[float, np.ndarray, bool]]:
    """Yield C, the logit of every row, and whether the fit converged, strongest penalty first.

    A fit starts from the one before. Features in a file are read once for each step.
    """
    train, true_T = feature_NF[train_N], true_N[train_N].astype(np.float64)
    scaled = scaling(train)
    weight_W = np.append(np.zeros(feature_NF.shape[1]), logit(true_T.mean()))
    for penalty in PENALTIES:
        progress(f"C = {penalty:.2g}")
        solved = minimize(
            _objective,
            weight_W,
            args=(train, true_T, scaled, 1 / (penalty * len(true_T))),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": _ITERATIONS, "maxls": 50, "gtol": _TOL, "ftol": 64 * _EPS},
        )
        weight_W = solved.x
        yield penalty, scores(feature_NF, scaled, weight_W[:-1]) + weight_W[-1], solved.status == 0


def _objective(
    weight_W: np.ndarray, train: Features, true_T: np.ndarray, scaled: Scaling, ridge: float
) -> tuple[float, np.ndarray]:
    """Return mean log loss + ridge / 2 |w|², and its gradient; the last weight is the intercept."""
    own_F, offset = scaled.weights(weight_W[:-1])
    loss, total, product_F = 0.0, 0.0, np.zeros(len(own_F))
    for part, chunk_CF in chunks(train):
        logit_C = chunk_CF @ own_F + (offset + weight_W[-1])
        loss += float((np.logaddexp(0, logit_C) - true_T[part] * logit_C).sum())
        error_C = expit(logit_C) - true_T[part]
        product_F += error_C @ chunk_CF
        total += float(error_C.sum())
    gradient_W = np.append(scaled.gradient(product_F, total), total) / len(true_T)
    gradient_W[:-1] += ridge * weight_W[:-1]
    return loss / len(true_T) + ridge / 2 * float(weight_W[:-1] @ weight_W[:-1]), gradient_W
