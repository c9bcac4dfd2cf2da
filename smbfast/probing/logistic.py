"""Binary probe: scaled features, L2 logistic regression, penalty chosen on the tuning split.

The protocol of EHRSHOT (som-shahlab/ehrshot-benchmark): `MaxAbsScaler` and the regression are
fitted on train alone, also after the penalty is chosen. Shape suffixes: N rows, F features,
W = F + 1 weights, T rows of train, C rows of a chunk.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import MaxAbsScaler

from smbfast.probing.features import Features, Rows, max_abs

PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0, 1e2, 1e4)
"""Inverse strengths C, strongest penalty first."""
_TOL, _ITERATIONS = 1e-4, 1000  # no component of the gradient is larger when a fit has converged
_EPS = np.finfo(np.float64).eps
Fit = tuple[float, np.ndarray, bool]  # C, probabilities of all rows, whether it converged


@dataclass(frozen=True)
class BinaryProbe:
    """probability_N float64: of a true label, for every row given (all splits).

    chosen_by says which tuning score chose `penalty` (C); converged is False if the chosen fit
    stopped at the iteration limit.
    """

    probability_N: np.ndarray
    penalty: float
    chosen_by: str
    converged: bool


def not_measurable(true_N: np.ndarray, split_N: np.ndarray) -> str | None:
    """Return why a binary task cannot be measured, or None."""
    for split in ("train", "held_out"):
        if len(np.unique(true_N[split_N == split])) < 2:
            return f"{split} has one class only"
    return None


def probe_binary(
    feature_NF: Features,
    true_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> BinaryProbe:
    """Fit on train, choose C on tuning, and predict every row.

    C is chosen by tuning AUROC, and of equal ones the stronger penalty; by tuning log loss if the
    tuning split has one class only (our choice). Train must hold both classes, and tuning a row.
    """
    train, tuning = split_N == "train", split_N == "tuning"
    one_class = len(np.unique(true_N[tuning])) < 2
    best: BinaryProbe | None = None
    best_score = -np.inf
    fits = _streamed if isinstance(feature_NF, Rows) else _held
    for penalty, probability_N, converged in fits(feature_NF, true_N, train, progress):
        if one_class:
            score = -log_loss(true_N[tuning], probability_N[tuning], labels=[False, True])
        else:
            score = roc_auc_score(true_N[tuning], probability_N[tuning])
        # only a real gain moves on to a weaker penalty
        if score > best_score + 1e-12:
            by = "tuning log loss: tuning has one class only" if one_class else "tuning AUROC"
            best = BinaryProbe(probability_N, penalty, by, converged)
            best_score = score
    assert best is not None
    return best


def _held(
    feature_NF: np.ndarray | csr_matrix,
    true_N: np.ndarray,
    train_N: np.ndarray,
    progress: Callable[[str], None],
) -> Iterator[Fit]:
    """Fit features that are in memory."""
    scaler = MaxAbsScaler().fit(feature_NF[train_N])
    scaled_NF = scaler.transform(feature_NF)
    for penalty in PENALTIES:
        progress(f"C = {penalty:g}")
        model = LogisticRegression(C=penalty, solver="lbfgs", tol=_TOL, max_iter=_ITERATIONS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(scaled_NF[train_N], true_N[train_N])
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        yield penalty, model.predict_proba(scaled_NF)[:, 1], converged


def _streamed(
    feature_NF: Rows, true_N: np.ndarray, train_N: np.ndarray, progress: Callable[[str], None]
) -> Iterator[Fit]:
    """Fit features that lie in a file: the same objective, solver and stopping rule, its sums made
    chunk by chunk. Each step reads the file once."""
    train, true_T = feature_NF[train_N], true_N[train_N].astype(np.float64)
    scale_F = max_abs(train)
    for penalty in PENALTIES:
        progress(f"C = {penalty:g}, in chunks")
        solved = minimize(
            _objective,
            np.zeros(feature_NF.shape[1] + 1),
            args=(train, true_T, scale_F, 1 / (penalty * len(true_T))),
            method="L-BFGS-B",
            jac=True,
            # those of LogisticRegression
            options={"maxiter": _ITERATIONS, "maxls": 50, "gtol": _TOL, "ftol": 64 * _EPS},
        )
        probability_N = np.empty(len(true_N))
        for part, chunk_CF in feature_NF.chunks():
            probability_N[part] = expit(chunk_CF @ (solved.x[:-1] / scale_F) + solved.x[-1])
        yield penalty, probability_N, solved.status == 0


def _objective(
    weight_W: np.ndarray, train: Rows, true_T: np.ndarray, scale_F: np.ndarray, ridge: float
) -> tuple[float, np.ndarray]:
    """Return mean log loss + ridge / 2 |w|², and its gradient; the last weight is the intercept."""
    loss, gradient_W = 0.0, np.zeros_like(weight_W)
    own_F = weight_W[:-1] / scale_F
    for part, chunk_CF in train.chunks():
        logit_C = chunk_CF @ own_F + weight_W[-1]
        loss += float((np.logaddexp(0, logit_C) - true_T[part] * logit_C).sum())
        error_C = expit(logit_C) - true_T[part]
        gradient_W[:-1] += error_C @ chunk_CF
        gradient_W[-1] += error_C.sum()
    gradient_W[:-1] /= scale_F
    gradient_W /= len(true_T)
    gradient_W[:-1] += ridge * weight_W[:-1]
    return loss / len(true_T) + ridge / 2 * float(weight_W[:-1] @ weight_W[:-1]), gradient_W
