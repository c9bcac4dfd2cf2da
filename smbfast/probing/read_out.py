"""Chooses the read-out of a run: the pool whose embeddings say most about its tasks, on tuning.

Each pool is probed as it will be judged, fitted on train and scored on tuning. The one with the
least mean tuning log loss over the binary tasks is taken; where no task is binary, the one with the
least mean of 1 - Harrell's C on tuning; of equal ones the narrower (our choice). No row of another
split is read.

Shape suffixes: N label rows, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smbfast.data.labels import Labels
from smbfast.probing.embedding_file import EmbeddingFile
from smbfast.probing.features import Features
from smbfast.probing.logistic import fit_logistic
from smbfast.probing.pooling import width_of
from smbfast.probing.survival import fit_cox
from smbfast.settings import POOLS, Pool
from smbfast.statistics import resample

WIDEST = 16_384  # numbers of an embedding that a run chooses by itself: our choice
_LOGISTIC = "tuning log loss of a logistic probe"
_COX = "1 - C of a Cox probe on tuning"


@dataclass(frozen=True)
class Choice:
    """A pool, what the pools were compared by, the scores of each, and why others were left out.

    scores: by pool, the mean over `tasks` of what `by` names; smaller is better. Empty where
    nothing could be compared.
    """

    pool: Pool
    by: str
    scores: dict[Pool, float]
    tasks: list[str]
    left_out: dict[Pool, str]

    def record(self) -> dict[str, Any]:
        """Return what is recorded beside the pool, as JSON values."""
        return {
            "by": self.by,
            "tasks": self.tasks,
            "scores": self.scores,
            "left_out": self.left_out,
        }

    def text(self) -> str:
        """Return the choice and its reasons in one line."""
        parts = [f"pool {self.pool}: {self.by}"]
        if self.tasks:
            scores = ", ".join(f"{pool} {score:.4f}" for pool, score in self.scores.items())
            parts.append(f"mean of {', '.join(self.tasks)}: {scores}")
        parts += [f"{pool} left out: {why}" for pool, why in self.left_out.items()]
        return "; ".join(parts)


def candidates(width: int, num_layers: int) -> tuple[list[Pool], dict[Pool, str]]:
    """Return the pools that a run may choose from, narrowest first, and why others are left out.

    Args:
        width, num_layers: of the model.
    """
    widths = {pool: width_of(pool, width, num_layers) for pool in POOLS}
    wide = {p: f"{w:,} numbers, above {WIDEST:,}" for p, w in widths.items() if w > WIDEST}
    return sorted((p for p in POOLS if p not in wide), key=lambda p: widths[p]), wide


def choose_pool(
    tasks: list[Labels],
    files: Mapping[Pool, EmbeddingFile],
    left_out: dict[Pool, str],
    progress: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Return the pool of a run.

    Args:
        tasks: those to be probed; of their rows those of train and tuning are read.
        files: the embeddings of at least these rows by each pool, narrowest first.
        left_out: the pools that are not among them, and why.
    """
    read = [labels.take(np.isin(labels.split_N, ("train", "tuning"))) for labels in tasks]
    for kind, by, score in (
        ("binary", _LOGISTIC, _log_loss),
        ("time_to_event", _COX, _disorder),
    ):
        by_task: dict[str, dict[Pool, float]] = {}
        for labels in read:
            if labels.kind == kind and (own := _scores(labels, files, score, progress)):
                by_task[labels.task] = own
        if by_task:
            mean = {p: float(np.mean([own[p] for own in by_task.values()])) for p in files}
            best = min(mean, key=mean.__getitem__)  # of equal ones the first, which is narrower
            return Choice(best, f"least {by}", mean, list(by_task), left_out)
    return Choice(next(iter(files)), "no task to choose by", {}, [], left_out)


def _scores(
    labels: Labels,
    files: Mapping[Pool, EmbeddingFile],
    score: Callable[[Labels, Features], float],
    progress: Callable[[str], None],
) -> dict[Pool, float]:
    """Return the score of each pool; of none where one cannot be measured."""
    scores: dict[Pool, float] = {}
    for pool, file in files.items():
        has_N, feature_NF = file.features(labels.subject_N, labels.time_N)
        try:
            scores[pool] = score(labels.take(has_N), feature_NF)
        except ValueError:
            return {}
        progress(f"pool {pool}, {labels.task}: {scores[pool]:.4f}")
    return scores if np.isfinite(list(scores.values())).all() else {}


def _log_loss(labels: Labels, feature_NF: Features) -> float:
    """Return the tuning log loss of the logistic probe, in nats."""
    return fit_logistic(feature_NF, labels.binary_N, labels.split_N).tuning_log_loss


def _disorder(labels: Labels, feature_NF: Features) -> float:
    """Return 1 - Harrell's C on tuning; NaN where no pair is comparable."""
    tuning = labels.split_N == "tuning"
    duration_N, event_N = labels.survival_N
    cox = fit_cox(feature_NF, duration_N, event_N, labels.split_N)
    own = resample.c_index(cox.risk_N[tuning], duration_N[tuning], event_N[tuning])
    return 1 - float(own(np.ones((1, int(tuning.sum())), np.int32))[0])
