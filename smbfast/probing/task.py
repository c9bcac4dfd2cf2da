"""Measures one task: every model on the same rows, with intervals and paired differences.

Shape suffixes: N label rows, J rows of the split that is judged, F features.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from smbfast.data.labels import Labels, splits_read
from smbfast.probing import binary, boosting, logistic, survival
from smbfast.probing.features import Features
from smbfast.statistics import resample

ORACLE_NAMES = {"bayes_filter": "oracle_filter", "latent": "oracle_latent"}
_LARGE = 50_000_000  # numbers in a matrix of features


@dataclass(frozen=True)
class Protocol:
    """The number of draws (`cox_bootstraps` for the C-index), the seed, and the split that is
    judged."""

    bootstraps: int = 1000
    cox_bootstraps: int = 200
    seed: int = 0
    judged_on: Literal["tuning", "held_out"] = "tuning"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are read: held_out only where it is judged."""
        return splits_read(self.judged_on == "held_out")


@dataclass(frozen=True)
class Measured:
    """The record of a task in probe.json, and score_N of the first model for every row given
    (probability or log hazard; None if the task is not measurable)."""

    record: dict[str, Any]
    score_N: np.ndarray | None


def measure(
    labels: Labels,
    features: dict[str, Features],
    oracle: dict[str, np.ndarray],
    readable: dict[str, str],
    protocol: Protocol,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Probe each set of features ([N, F], by model name, the trained model first) and score the
    oracles (`bayes_filter`, `latent`: float64 [N]; empty if there are none) on the judged split.
    For a binary task the first is probed by boosted trees as well, as `<its name>_boosting`.

    `readable` gives a name to print for each model. A task that cannot be measured gives a record
    with the reason and no models.
    """
    record: dict[str, Any] = {
        "task": labels.task,
        "kind": labels.kind,
        "rows": {split: labels.counts()[split] for split in protocol.splits},
        "positives": {split: labels.positives()[split] for split in protocol.splits},
        "patients": {
            split: len(np.unique(labels.subject_N[labels.split_N == split]))
            for split in protocol.splits
        },
        "reason": _not_measurable(labels, protocol),
        "models": [],
        "differences": [],
    }
    if record["reason"]:
        return Measured(record, None)
    scores: dict[str, np.ndarray] = {}
    first = next(iter(features))
    heads = [(name, feature_NF, _fit) for name, feature_NF in features.items()]
    if labels.kind == "binary":
        heads.insert(1, (f"{first}_boosting", features[first], _fit_trees))
    for name, feature_NF, fit in heads:
        progress(f"{labels.task}: {readable[name]}")
        model: dict[str, Any] = {"name": name, "label": readable[name], "metrics": {}}
        record["models"].append(model)
        try:
            scores[name], model["chosen"] = fit(labels, feature_NF, progress)
        except ValueError as error:
            model["reason"] = str(error)
    for column, score_N in oracle.items():
        name = ORACLE_NAMES[column]
        scores[name] = score_N
        record["models"].append({"name": name, "label": readable[name], "metrics": {}})
    progress(f"{labels.task}: intervals")
    _judge(record, labels, scores, protocol, first)
    return Measured(record, scores.get(first))


def _not_measurable(labels: Labels, protocol: Protocol) -> str | None:
    empty = [split for split in protocol.splits if labels.counts()[split] == 0]
    if empty:
        return f"no row with an embedding in {', '.join(empty)}"
    if labels.kind == "binary":
        return binary.not_measurable(labels.binary_N, labels.split_N, protocol.judged_on)
    return survival.not_measurable(*labels.survival_N, labels.split_N, protocol.judged_on)


def _fit(
    labels: Labels,
    feature_NF: Features,
    progress: Callable[[str], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    # each penalty is worth a line only where one takes minutes
    tell = progress if feature_NF.size > _LARGE else lambda _: None
    if labels.kind == "binary":
        fit = logistic.fit_logistic(feature_NF, labels.binary_N, labels.split_N, tell)
        own = {"C": fit.penalty, "at_border": fit.at_border, "converged": fit.converged}
        return fit.probability_N, own | _chosen(fit)
    cox = survival.fit_cox(feature_NF, *labels.survival_N, labels.split_N, tell)
    own = {"C": cox.penalty, "at_border": cox.at_border, "converged": cox.converged}
    return cox.risk_N, own | {"tuning_loss": cox.tuning_loss}


def _fit_trees(
    labels: Labels,
    feature_NF: Features,
    progress: Callable[[str], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    tell = progress if feature_NF.size > _LARGE else lambda _: None
    fit = boosting.fit_boosting(feature_NF, labels.binary_N, labels.split_N, tell)
    return fit.probability_N, {"trees": fit.num_trees} | _chosen(fit)


def _chosen(fit: binary.BinaryProbe) -> dict[str, Any]:
    return {"tuning_log_loss": fit.tuning_log_loss, "calibration": asdict(fit.calibration)}


def _judge(
    record: dict[str, Any],
    labels: Labels,
    scores: dict[str, np.ndarray],
    protocol: Protocol,
    first: str,
) -> None:
    """Fill in metrics and differences: all models on the same rows of the judged split and the same
    draws."""
    judged_N = labels.split_N == protocol.judged_on
    judged = labels.take(judged_N)
    metrics = {
        (name, metric): compute
        for name, score_N in scores.items()
        for metric, compute in _metrics(judged, score_N[judged_N]).items()
    }
    binary = labels.kind == "binary"
    draws = protocol.bootstraps if binary else protocol.cox_bootstraps
    values, drawn = resample.resampled(metrics, judged.subject_N, draws, protocol.seed)
    for model in record["models"]:
        for name, metric in values:
            if name == model["name"]:
                key = (name, metric)
                model["metrics"][metric] = _as_record(resample.interval(values[key], drawn[key]))
    for against in ("untrained", "counts"):
        for name, metric in values:
            if name == against and first in scores:
                one, other = (first, metric), (against, metric)
                difference = resample.interval(
                    values[one] - values[other], drawn[one] - drawn[other]
                )
                named = {"model": first, "against": against, "metric": metric}
                record["differences"].append(named | _as_record(difference))


def _metrics(judged: Labels, score_J: np.ndarray) -> dict[str, resample.Metric]:
    if judged.kind == "binary":
        return {
            "auroc": resample.auroc(score_J, judged.binary_N),
            "auprc": resample.auprc(score_J, judged.binary_N),
            "brier": resample.brier(score_J, judged.binary_N),
        }
    return {"c_index": resample.c_index(score_J, *judged.survival_N)}


def _as_record(interval: resample.Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
