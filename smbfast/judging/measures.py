"""The metrics of each kind of task, and what stands beside them: calibration curve and incidence.

Binary: AUROC (primary), AUPRC, Brier score and skill, slope and intercept of calibration. Time to
event: the mean of the cumulative/dynamic AUC over the horizons (primary), Harrell's and Uno's C,
and per horizon AUC and Brier score under inverse probability of censoring weights, with the
integrated Brier score. Shape suffixes: J judged rows, H horizons.
"""

from typing import Any

import numpy as np

from smbfast.data.labels import Labels
from smbfast.judging import standin
from smbfast.judging.scored import Scored
from smbfast.statistics import resample
from smbfast.statistics.resample import Metric

PRIMARY = {"binary": "auroc", "time_to_event": "auc"}
FEW = 10  # people below which a bin of a curve is joined to the next


def outcome(labels: Labels) -> np.ndarray:
    """Return the outcome of binary labels, or whether an event was observed: bool [J]."""
    return labels.binary_N if labels.kind == "binary" else labels.survival_N[1]


def primary(judged: Labels, score_J: np.ndarray, horizons_H: tuple[float, ...]) -> Metric:
    """Return the metric that decides."""
    if judged.kind == "binary":
        return resample.auroc(score_J, judged.binary_N)
    return _mean_auc(judged, score_J, horizons_H)


def metrics(
    judged: Labels,
    score_J: np.ndarray,
    chance_JH: np.ndarray | None,
    horizons_H: tuple[float, ...],
) -> dict[str, Metric]:
    """Return every metric by name; Brier scores of time to event only where `chance_JH`, the
    probability of the event by each horizon, is known."""
    if judged.kind == "binary":
        true_J = judged.binary_N
        return {
            "auroc": resample.auroc(score_J, true_J),
            "auprc": resample.auprc(score_J, true_J),
            "brier": resample.brier(score_J, true_J),
            "brier_skill": standin.brier_skill(score_J, true_J),
            "slope": standin.slope(score_J, true_J),
            "intercept": standin.slope(score_J, true_J, intercept=True),
        }
    duration_J, event_J = judged.survival_N
    found = {
        "c_harrell": resample.c_index(score_J, duration_J, event_J),
        "c_uno": resample.c_index(score_J, duration_J, event_J),
        "auc": _mean_auc(judged, score_J, horizons_H),
    }
    for h, horizon in enumerate(horizons_H):
        found[f"auc_{h}"] = standin.auc_at(score_J, duration_J, event_J, horizon)
    if chance_JH is not None:
        briers = []
        for h, horizon in enumerate(horizons_H):
            found[f"brier_{h}"] = standin.brier_at(chance_JH[:, h], duration_J, event_J, horizon)
            briers.append(found[f"brier_{h}"])
        found["ibs"] = lambda w: np.mean([own(w) for own in briers], 0)
    return found


def _mean_auc(judged: Labels, score_J: np.ndarray, horizons_H: tuple[float, ...]) -> Metric:
    own = [standin.auc_at(score_J, *judged.survival_N, horizon) for horizon in horizons_H]
    return lambda w: np.mean([metric(w) for metric in own], 0)


def curve(
    judged: Labels, model: Scored, horizons_H: tuple[float, ...]
) -> list[dict[str, float | int]]:
    """Return bins of the prediction (deciles; those of fewer than 10 people joined to the next),
    with mean prediction, observed share and its 95 % interval (Wilson), least prediction first.

    Time to event is taken at the middle horizon; without chances there is no curve.
    """
    if judged.kind != "binary":
        return []
    probability_J = model.score_SN.mean(0)
    true_J = judged.binary_N
    order = np.argsort(probability_J, kind="stable")
    made = []
    for part in np.array_split(order, 10):
        if not len(part):
            continue
        num, observed = len(part), float(true_J[part].mean())
        half = 1.96 * np.sqrt(observed * (1 - observed) / num)
        made.append(
            {
                "predicted": float(probability_J[part].mean()),
                "observed": observed,
                "low": max(0.0, observed - half),
                "high": min(1.0, observed + half),
                "num": num,
            }
        )
    return made


def incidence(judged: Labels) -> dict[str, Any] | None:
    """Return the share of rows with the event by time, and with the competing one."""
    duration_J, event_J = judged.survival_N
    days = np.linspace(0, duration_J.max(), 25)
    return {
        "days": days.tolist(),
        "event": [float((event_J & (duration_J <= day)).mean()) for day in days],
        "competing": None,
    }
