"""Boosting probe: gradient-boosted trees on the features as they are, fitted on train; the tuning
split says when to stop.

Its settings are fixed, our choice: of fifteen tried on counts with values of four simulated cohorts
(seeds 0-3, three tasks each, judged on tuning patients that stop nothing), small trees that look at
a third of the features for each split gave the best AUROC, 0.799 for 0.783 of trees with 31 leaves.
Trees are grown on at most 100,000 rows of train, and counted on as many of tuning, or on fewer
where the features are more than 1,300: our choice, so that neither time nor memory grow with a
dataset. All rows are scored, a part at a time. Shape suffixes: N rows, F features, R rows of train
that are grown on, S rows of tuning, C rows of a part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from smbfast.probing.binary import BinaryProbe, calibrate, log_loss, require_classes
from smbfast.probing.features import Features, dense, parts

MOST_FEATURES = 4096  # a node of a tree then holds 5 MB of histograms
MOST_ROWS, MOST_NUMBERS = 100_000, 1 << 27  # of train or tuning at once: 1 GiB in float64
_TREES, _BLOCK = 1000, 50  # trees at most, and how many are grown at once: each time bins anew
_PATIENCE = 50  # trees without a gain that end a fit
_SETTINGS = {
    "learning_rate": 0.05,
    "max_leaf_nodes": 6,
    "max_features": 0.3,
    "min_samples_leaf": 20,
    "l2_regularization": 10.0,
    "max_bins": 64,
}


@dataclass(frozen=True)
class BoostingProbe(BinaryProbe):
    """num_trees: how many the tuning split chose."""

    num_trees: int


def fit_boosting(
    feature_NF: Features,
    true_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> BoostingProbe:
    """Fit on train, choose the number of trees and calibrate on tuning, and score every row.

    The number has the least tuning log loss; of equal ones it is the smallest.

    Args:
        feature_NF: float [N, F], nan = unknown where they are dense; true_N: bool; split_N: str,
            where rows that are neither `train` nor `tuning` are scored alone.

    Raises:
        ValueError: train has not both classes, tuning has no row, or the features are too many.
    """
    require_classes(true_N, split_N)
    num_rows, num_features = feature_NF.shape
    if num_features > MOST_FEATURES:
        raise ValueError(f"boosting takes at most {MOST_FEATURES:,} features, got {num_features:,}")
    most = min(MOST_ROWS, MOST_NUMBERS // max(num_features, 1))
    train_R, tuning_S = (_drawn(true_N, split_N == split, most) for split in ("train", "tuning"))
    model, num_trees = _grown(
        (dense(feature_NF, train_R), true_N[train_R]),
        (dense(feature_NF, tuning_S), true_N[tuning_S]),
        progress,
    )
    logit_N = np.empty(num_rows)
    for part in parts(feature_NF.shape):
        feature_CF = dense(feature_NF, np.arange(part.start, part.stop))
        staged = model.staged_decision_function(feature_CF)
        logit_N[part] = next(islice(staged, num_trees - 1, None)).ravel()
    tuning = split_N == "tuning"
    own = calibrate(logit_N[tuning], true_N[tuning])
    return BoostingProbe(logit_N, log_loss(logit_N[tuning], true_N[tuning]), own, num_trees)


def _drawn(true_N: np.ndarray, wanted_N: np.ndarray, most: int) -> np.ndarray:
    """Return the wanted rows, in order, or about `most` of them by chance if they are more: of each
    class its share."""
    row_R = np.flatnonzero(wanted_N)
    if len(row_R) <= most:
        return row_R
    random, chosen = np.random.default_rng(0), []
    for own_R in (row_R[true_N[row_R]], row_R[~true_N[row_R]]):
        size = int(np.ceil(len(own_R) * most / len(row_R)))
        chosen.append(random.choice(own_R, size, replace=False))
    return np.sort(np.concatenate(chosen))


def _grown(
    train: tuple[np.ndarray, np.ndarray],
    tuning: tuple[np.ndarray, np.ndarray],
    progress: Callable[[str], None],
) -> tuple[HistGradientBoostingClassifier, int]:
    """Return a model, and how many of its trees count."""
    feature_RF, true_R = train
    # scikit-learn bins no column without a value; of one value it makes no split, which is the same
    feature_RF = np.where(np.isnan(feature_RF).all(0), 0.0, feature_RF)
    feature_SF, true_S = tuning
    # its own early stopping takes patients of train by chance
    model = HistGradientBoostingClassifier(
        **_SETTINGS, early_stopping=False, warm_start=True, random_state=0
    )
    losses: list[float] = []
    while len(losses) < _TREES:
        progress(f"{len(losses) + _BLOCK} trees")
        model.set_params(max_iter=len(losses) + _BLOCK).fit(feature_RF, true_R)
        fresh = islice(model.staged_decision_function(feature_SF), len(losses), None)
        losses += [log_loss(logit_S.ravel(), true_S) for logit_S in fresh]
        if np.argmin(losses) < len(losses) - _PATIENCE:
            break
    return model, int(np.argmin(losses)) + 1
