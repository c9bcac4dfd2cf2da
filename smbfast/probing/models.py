"""Fits every model of a task: train alone fits, tuning chooses and calibrates, all rows are scored.

A model is a set of features, or several of its versions (inits), and the head that reads them. Rows
that are neither of train nor of tuning never reach a fit. Shape suffixes: N label rows, S versions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit

from smbfast.data.labels import Labels
from smbfast.judging.risk_function import RiskFunction
from smbfast.judging.scored import Role, Scored
from smbfast.probing.binary import BinaryProbe, log_loss
from smbfast.probing.boosting import fit_boosting
from smbfast.probing.features import Features
from smbfast.probing.logistic import fit_logistic
from smbfast.probing.stack import stacked
from smbfast.probing.survival import fit_cox

ORACLES = {
    "bayes_filter": ("oracle_filter", "oracle: Bayes filter on the observed history"),
    "latent": ("oracle_latent", "oracle: sees the latent state"),
}
STACK = "smbfast and the best baseline, stacked"
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
    or, of a log hazard, an event. chosen: see `Scored`. risk: of a linear head, which other nodes
    can be scored by.
    """

    score_N: np.ndarray
    linear_N: np.ndarray
    tuning_loss: float
    chosen: dict[str, Any]
    risk: RiskFunction | None = None


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
        return Fitted(cox.risk_N, cox.risk_N, cox.tuning_loss, chosen, cox.risk)
    if head == "boosting":
        trees = fit_boosting(feature_NF, labels.binary_N, split_N, say)
        return _calibrated(labels, trees, {"trees": trees.num_trees})
    line = fit_logistic(feature_NF, labels.binary_N, split_N, say, standardise=scale)
    chosen = {"C": line.penalty, "at_border": line.at_border, "converged": line.converged}
    return replace(_calibrated(labels, line, chosen), risk=line.risk)


def scored(
    labels: Labels,
    models: Sequence[Model],
    progress: Progress = lambda _: None,
) -> list[Scored]:
    """Return what each model says of every label row, in the order of `models`.

    Behind the models of role own stands `stack`, the embedding and the best baseline together.

    Args:
        labels: rows of train, of tuning, and of held_out where that is judged.
    """
    fitted = [(model, *_fitted(labels, model, progress)) for model in models]
    given = [_scored(labels, *one) for one in fitted]
    own = [place for place, model in enumerate(models) if model.role == "own"]
    if own:
        given.insert(own[-1] + 1, _stack(labels, fitted))
    return given


def _fitted(labels: Labels, model: Model, progress: Progress) -> tuple[list[Fitted], str | None]:
    """Return the versions of a model, or none and the reason."""
    if model.reason is not None:
        return [], model.reason
    progress(f"{labels.task}: {model.label}")
    try:
        return [fit(labels, own, model.head, progress) for own in model.versions()], None
    except ValueError as error:
        return [], str(error)


def _scored(labels: Labels, model: Model, versions: list[Fitted], reason: str | None) -> Scored:
    score_SN = np.array([own.score_N for own in versions]).reshape(-1, len(labels))
    chosen = [own.chosen for own in versions]
    about = chosen[0] if len(chosen) == 1 else {"versions": chosen} if chosen else {}
    risk = versions[0].risk if versions and model.role == "own" else None
    return Scored(model.name, model.label, model.role, score_SN, about, reason, risk=risk)


def _stack(labels: Labels, fitted: list[tuple[Model, list[Fitted], str | None]]) -> Scored:
    """Stack the trained model and the best of the baselines by tuning loss; the untrained backbone
    is none of them, as it reads the same record by the same way."""
    none = Scored("stack", STACK, "own", np.empty((0, len(labels))))
    rivals = [
        (versions[0], model)
        for model, versions, _ in fitted
        if model.role == "baseline" and model.name != "untrained" and versions
    ]
    own = [versions[0] for model, versions, _ in fitted if model.name == "smbfast" and versions]
    if not (own and rivals):
        return replace(none, reason="the embedding or every baseline has no fit")
    best, model = min(rivals, key=lambda rival: rival[0].tuning_loss)
    score_N, chosen = stacked(labels, own[0].linear_N, best.linear_N)
    if labels.kind == "binary":
        score_N = expit(score_N)
    return replace(none, score_SN=score_N[None], chosen=chosen | {"with": model.name})


def oracles(oracle: dict[str, np.ndarray]) -> list[Scored]:
    """Return the oracles of a task, of scores float64 [N] by the names in `ORACLES`."""
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
