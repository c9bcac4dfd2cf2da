"""Logistic probe: L2 logistic regression fitted on train, its penalty chosen on the tuning split.

Features are scaled on train (`scaling`). The penalty with the least tuning log loss is taken: our
choice, where EHRSHOT takes the best AUROC of a coarser grid, which hardly tells penalties apart and
says nothing of probabilities. Shape suffixes: N rows, F features, W = F + 1 weights, T rows of
train, C rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import expit, logit

from smbfast.judging.risk_function import RiskFunction
from smbfast.probing.binary import BinaryProbe, calibrate, log_loss, require_classes
from smbfast.probing.features import Features
from smbfast.probing.ridge import Basis, fit_path
from smbfast.probing.scaling import Scaling, chunks, directions, scaling, scores

_SLACK = 0.1  # nats a row above the least tuning log loss that end the path: our choice


@dataclass(frozen=True)
class LogisticProbe(BinaryProbe):
    """penalty: C; at_border, converged: see `RidgeFit`; risk: what was fitted, calibrated."""

    penalty: float
    at_border: bool
    converged: bool
    risk: RiskFunction


def fit_logistic(
    feature_NF: Features,
    true_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
    *,
    standardise: bool = False,
) -> LogisticProbe:
    """Fit on train, choose C and calibrate on tuning, and score every row.

    C has the least tuning log loss; of equal ones the stronger penalty is taken.

    Args:
        feature_NF: float [N, F], dense, sparse or in a file, which is read once for each step;
            true_N: bool; split_N: str, where rows that are neither `train` nor `tuning` are scored
            alone.
        standardise: see `scaling`.

    Raises:
        ValueError: train has not both classes, or tuning has no row.
    """
    require_classes(true_N, split_N)
    train_N, tuning_N = split_N == "train", split_N == "tuning"
    train, true_T = feature_NF[train_N], true_N[train_N].astype(np.float64)
    scaled = scaling(train, standardise=standardise)
    constant_W = np.append(np.zeros(feature_NF.shape[1]), logit(true_T.mean()))
    fit = fit_path(
        partial(_objective, train=train, true_T=true_T, scaled=scaled),
        constant_W,
        np.append(np.ones(feature_NF.shape[1]), 0.0),
        len(true_T),
        score=lambda weight_W: scores(feature_NF, scaled, weight_W[:-1]) + weight_W[-1],
        tuning_loss=lambda logit_N: log_loss(logit_N[tuning_N], true_N[tuning_N]),
        slack=_SLACK,
        progress=progress,
        basis=partial(_basis, train, scaled),
    )
    own = calibrate(fit.score_N[tuning_N], true_N[tuning_N])
    weight_F, offset = scaled.weights(fit.weight_W[:-1])
    risk = RiskFunction(weight_F, offset, float(fit.weight_W[-1]), own.slope, own.intercept)
    return LogisticProbe(
        fit.score_N, fit.tuning_loss, own, fit.penalty, fit.at_border, fit.converged, risk
    )


def _basis(train: Features, scaled: Scaling, weight_W: np.ndarray) -> Basis | None:
    """Return how the loss curves at these weights; the intercept by itself."""
    rate_T = expit(scores(train, scaled, weight_W[:-1]) + weight_W[-1])
    curvature_T = rate_T * (1 - rate_T)
    basis = directions(train, scaled, curvature_T)
    if basis is None:
        return None
    turn_WW = np.pad(basis.turn_WW, (0, 1))
    turn_WW[-1, -1] = 1.0
    return Basis(turn_WW, np.append(basis.curve_W, curvature_T.mean()))


def _objective(
    weight_W: np.ndarray, train: Features, true_T: np.ndarray, scaled: Scaling
) -> tuple[float, np.ndarray]:
    """Return the mean log loss and its gradient; the last weight is the intercept."""
    own_F, offset = scaled.weights(weight_W[:-1])
    loss, total, product_F = 0.0, 0.0, np.zeros(len(own_F))
    for part, chunk_CF in chunks(train):
        logit_C = chunk_CF @ own_F + (offset + weight_W[-1])
        loss += float((np.logaddexp(0, logit_C) - true_T[part] * logit_C).sum())
        error_C = expit(logit_C) - true_T[part]
        product_F += error_C @ chunk_CF
        total += float(error_C.sum())
    gradient_W = np.append(scaled.gradient(product_F, total), total)
    return loss / len(true_T), gradient_W / len(true_T)
