"""Binary probe: scaled features, L2 logistic regression, penalty chosen on the tuning split.

The protocol of EHRSHOT (som-shahlab/ehrshot-benchmark): `MaxAbsScaler` and the regression are
fitted on train alone, also after the penalty is chosen. Shape suffixes: N rows, F features.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import MaxAbsScaler

PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0, 1e2, 1e4)
"""Inverse strengths C, strongest penalty first."""


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
    feature_NF: np.ndarray | csr_matrix,
    true_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> BinaryProbe:
    """Fit on train, choose C on tuning, and predict every row.

    C is chosen by tuning AUROC, and of equal ones the stronger penalty; by tuning log loss if the
    tuning split has one class only (our choice). Train must hold both classes, and tuning a row.
    """
    train, tuning = split_N == "train", split_N == "tuning"
    scaler = MaxAbsScaler().fit(feature_NF[train])
    scaled_NF = scaler.transform(feature_NF)
    one_class = len(np.unique(true_N[tuning])) < 2
    best: BinaryProbe | None = None
    best_score = -np.inf
    for penalty in PENALTIES:
        progress(f"C = {penalty:g}")
        model = LogisticRegression(C=penalty, solver="lbfgs", tol=1e-4, max_iter=1000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(scaled_NF[train], true_N[train])
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        probability_N = model.predict_proba(scaled_NF)[:, 1]
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
