"""Few-shot fits: what a model learns from k rows of each class, as EHRSHOT asks.

Rows are drawn from train, and for choices as many from tuning; those of a smaller k are among those
of a larger one. Five replicates draw anew. All other rows are scored alone. Shape suffixes: N label
rows, R replicates.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from smbfast.data.labels import Labels
from smbfast.judging.judge import FewShot
from smbfast.judging.scored import Scored
from smbfast.probing.models import Model, fit

SHOTS = (8, 16, 32, 64, 128)
REPLICATES = 5
MODELS = ("smbfast", "counts", "values_boosting")


def few_shot(
    labels: Labels,
    models: Sequence[Model],
    scored: Sequence[Scored],
    judged_N: np.ndarray,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[FewShot]:
    """Fit three models of a binary task, `MODELS`, to few rows, and put the fit to all beside.

    A k of which train has not as many rows in each class is left out. Where tuning has fewer, it
    gives what it has.

    Args:
        scored: of all rows; the fit to all of train.
        judged_N: which rows are scored, bool.
    """
    shots: list[FewShot] = []
    whole = {model.name: model for model in scored}
    for model in models:
        if model.name not in MODELS or model.reason is not None:
            continue
        feature_NF = next(iter(model.versions()))
        for k in SHOTS:
            progress(f"{labels.task}: {model.label}, {k} rows of each class")
            parts = list(_drawn(labels, k, seed))
            if parts:
                with warnings.catch_warnings():  # a slope of few rows may run away; no rank changes
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    fits = [fit(part, feature_NF, model.head, lambda _: None) for part in parts]
                score_RJ = np.stack([own.score_N[judged_N] for own in fits])
                shots.append(FewShot(model.name, k, score_RJ))
        if model.name in whole and whole[model.name].reason is None:
            shots.append(FewShot(model.name, "all", whole[model.name].score_SN[:, judged_N]))
    return shots


def _drawn(labels: Labels, k: int, seed: int) -> Iterator[Labels]:
    """Yield the labels of each replicate, where rows that were not drawn are of no split."""
    train_N = labels.split_N == "train"
    if min(int((train_N & own_N).sum()) for own_N in (labels.binary_N, ~labels.binary_N)) < k:
        return
    for replicate in range(REPLICATES):
        split_N = np.full_like(labels.split_N, "")
        for stream, split in enumerate(("train", "tuning")):
            for value in (False, True):
                rows = np.flatnonzero((labels.split_N == split) & (labels.binary_N == value))
                random = np.random.default_rng([seed, replicate, stream, int(value)])
                split_N[random.permutation(rows)[:k]] = split
        yield replace(labels, split_N=split_N)
