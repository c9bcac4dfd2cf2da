"""Fits every model of a task: train alone fits, tuning chooses and calibrates, all rows are scored.

A model is a set of features, or several of its versions (inits), and the head that reads them. Rows
that are neither of train nor of tuning never reach a fit. Shape suffixes: N label rows, S versions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import logit

from smbfast.data.labels import Labels
from smbfast.judging.scored import Role, Scored
from smbfast.probing.binary import BinaryProbe, log_loss
from smbfast.probing.boosting import fit_boosting
from smbfast.probing.features import Features
from smbfast.probing.logistic import fit_logistic
from smbfast.probing.survival import fit_cox

ORACLES = {
    "bayes_filter": ("oracle_filter", "oracle: Bayes filter on the observed history"),
    "latent": ("oracle_latent", "oracle: sees the latent state"),
}
_LARGE = 50_000_000  # numbers in a matrix of features
_LEAST = 1e-12  # a probability is at least this far from 0 and 1 where its logit is taken

Progress = Callable[[str], None]
Head = Literal["linear", "standardised", "boosting"]


@dataclass(frozen=True)
class Model:
    """What is to be fitted.

    name, label, role: see `Scored`. versions: gives the features [N, F] of each version, one after
    the other, so that those of one model are in memory at a time. head: "linear" is a logistic or
    Cox regression, "standardised" the same of sparse features that are standardised first, and
    "boosting" is for binary tasks. reason: why there are no features, if so.
    """

    name: str
    label: str
    role: Role
    versions: Callable[[], Iterable[Features]]
    head: Head = "linear"
    reason: str | None = None


@dataclass(frozen=True)
class Fitted:
    """One version of a model, fitted.

    score_N float64: calibrated probability or log hazard of every row, higher = riskier.
    linear_N: the calibrated logit or the log hazard. tuning_loss: of linear_N on tuning, nats a row
    or, of a log hazard, an event. chosen: see `Scored`.
    """

    score_N: np.ndarray
    linear_N: np.ndarray
    tuning_loss: float
    chosen: dict[str, Any]


def fit(labels: Labels, feature_NF: Features, head: Head, progress: Progress) -> Fitted:
    """Fit a head on the train rows of a task.

    Raises:
        ValueError: the rows cannot be fitted; the message says why.
    """
    # each penalty is worth a line only where one takes minutes
    say = progress if feature_NF.size > _LARGE else lambda _: None
    split_N, scale = labels.split_N, head == "standardised"
    if labels.kind != "binary":
        cox = fit_cox(feature_NF, *labels.survival_N, split_N, say, standardise=scale)
        chosen = {"C": cox.penalty, "at_border": cox.at_border, "converged": cox.converged}
        chosen |= {"tuning_loss": cox.tuning_loss}
        return Fitted(cox.risk_N, cox.risk_N, cox.tuning_loss, chosen)
    if head == "boosting":
        trees = fit_boosting(feature_NF, labels.binary_N, split_N, say)
        return _calibrated(labels, trees, {"trees": trees.num_trees})
    line = fit_logistic(feature_NF, labels.binary_N, split_N, say, standardise=scale)
    chosen = {"C": line.penalty, "at_border": line.at_border, "converged": line.converged}
    return _calibrated(labels, line, chosen)


def scored(
    labels: Labels,
    models: Sequence[Model],
    oracle: dict[str, np.ndarray],
    progress: Progress = lambda _: None,
) -> list[Scored]:
    """Return what each model says of every label row, in the order of `models`, then the oracles.

    Args:
        labels: rows of train, of tuning, and of held_out where that is judged.
        oracle: scores `bayes_filter` and `latent`, float64 [N] each, or none.
    """
    given = [_scored(labels, model, progress) for model in models]
    return [*given, *_oracles(oracle)]


def _scored(labels: Labels, model: Model, progress: Progress) -> Scored:
    progress(f"{labels.task}: {model.label}")
    none = Scored(model.name, model.label, model.role, np.empty((0, len(labels))))
    if model.reason is not None:
        return Scored(**{**vars(none), "reason": model.reason})
    try:
        versions = [fit(labels, own, model.head, progress) for own in model.versions()]
    except ValueError as error:
        return Scored(**{**vars(none), "reason": str(error)})
    chosen = [own.chosen for own in versions]
    return Scored(
        model.name,
        model.label,
        model.role,
        np.stack([own.score_N for own in versions]),
        chosen[0] if len(chosen) == 1 else {"versions": chosen},
    )


def _oracles(oracle: dict[str, np.ndarray]) -> list[Scored]:
    return [Scored(*ORACLES[column], "oracle", own_N[None]) for column, own_N in oracle.items()]


def _calibrated(labels: Labels, probe: BinaryProbe, own: dict[str, Any]) -> Fitted:
    tuning_N = labels.split_N == "tuning"
    score_N = probe.probability_N
    linear_N = logit(np.clip(score_N, _LEAST, 1 - _LEAST))
    loss = log_loss(linear_N[tuning_N], labels.binary_N[tuning_N])
    chosen = own | {
        "tuning_log_loss": probe.tuning_log_loss,
        "calibration": asdict(probe.calibration),
    }
    return Fitted(score_N, linear_N, loss, chosen)
