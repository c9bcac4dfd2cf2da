"""The metrics of each kind of task, and what stands beside them: calibration curve and incidence.

Binary: AUROC (primary), AUPRC, Brier score and skill, slope and intercept of calibration. Time to
event: the mean of the cumulative/dynamic AUC over the horizons (primary), Harrell's and Uno's C,
and per horizon AUC and Brier score under inverse probability of censoring weights, with the
integrated Brier score. Censoring is that of the rows that are judged. Shape suffixes: J judged
rows, H horizons, K bins, M rows of a bin.
"""

from typing import Any

import numpy as np

from smbfast.base.counts import FEW
from smbfast.data.labels import Labels
from smbfast.judging.scored import Scored
from smbfast.statistics import binary, incidence, resample, survival
from smbfast.statistics.incidence import FollowUp
from smbfast.statistics.weights import Metric

PRIMARY = {"binary": "auroc", "time_to_event": "auc"}
FITTED = ("slope", "intercept")  # metrics that are fitted in each draw, which takes longest
_POINTS = 25  # of a curve of incidence
_CURVE_DRAWS = 200


def outcome(labels: Labels) -> np.ndarray:
    """Return the outcome of binary labels, or whether an event was observed: bool [J]."""
    return labels.binary_N if labels.kind == "binary" else labels.survival_N[1]


def competing_of(labels: Labels) -> np.ndarray | None:
    """Return whether a competing event ended each row, bool [J]; None where nothing competes."""
    return labels.competing_N


def follow_up(labels: Labels) -> FollowUp:
    """Return how the follow-up of time-to-event labels ended."""
    return FollowUp(*labels.survival_N, competing_of(labels))


def primary(judged: Labels, score_J: np.ndarray, horizons_H: tuple[float, ...]) -> Metric:
    """Return the metric that decides: that of the judged rows, higher = better."""
    if judged.kind == "binary":
        return binary.auroc(score_J, judged.binary_N)
    rows = follow_up(judged)
    times_H, censoring = np.array(horizons_H), incidence.censoring(rows)
    return survival.mean_dynamic_auc(score_J, rows, times_H, censoring)


def metrics(
    judged: Labels,
    score_J: np.ndarray,
    chance_JH: np.ndarray | None,
    horizons_H: tuple[float, ...],
) -> dict[str, Metric]:
    """Return every metric by name; Brier scores of time to event only where `chance_JH`, the
    probability of the event by each horizon, is known."""
    if judged.kind == "binary":
        named = ("auroc", "auprc", "brier", "brier_skill", "slope", "intercept")
        return {name: getattr(binary, name)(score_J, judged.binary_N) for name in named}
    rows = follow_up(judged)
    censoring = incidence.censoring(rows)
    own = {
        "auc": primary(judged, score_J, horizons_H),
        "c_harrell": survival.harrell_c(score_J, rows),
        "c_uno": survival.uno_c(score_J, rows, censoring, horizons_H[-1]),
    }
    for h, days in enumerate(horizons_H):
        own[f"auc_{h}"] = survival.dynamic_auc(score_J, rows, days, censoring)
        if chance_JH is not None:
            own[f"brier_{h}"] = survival.brier_ipcw(chance_JH[:, h], rows, days, censoring)
    if chance_JH is not None and len(horizons_H) > 1:
        times_H = np.array(horizons_H)
        own["ibs"] = survival.integrated_brier(chance_JH, rows, times_H, censoring)
    return own


def curve(judged: Labels, model: Scored, horizons_H: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return the calibration curve, least prediction first: mean prediction, observed share with
    its 95 % interval, and people. Predictions of several versions are averaged.

    Time to event is taken at the middle horizon, the observed share being the cumulative incidence
    by then; a model without probabilities has no curve.
    """
    if judged.kind == "binary":
        own = binary.curve(model.score_SN.mean(0), judged.binary_N, judged.subject_N)
        return [dict(part) for part in own]
    if model.chance_SNH is None:
        return []
    middle = len(horizons_H) // 2
    chance_J = model.chance_SNH[:, :, middle].mean(0)
    return [
        _survival_bin(judged.take(part_M), chance_J[part_M], horizons_H[middle])
        for part_M in binary.bins(chance_J, outcome(judged), judged.subject_N)
    ]


def _survival_bin(part: Labels, chance_M: np.ndarray, days: float) -> dict[str, Any]:
    """Return one bin; the interval resamples patients 200 times."""
    rows, time_H = follow_up(part), np.array([days])

    def share(weight_BM: np.ndarray) -> np.ndarray:
        return incidence.cumulative_incidence(rows, time_H, weight_BM)[:, 0]

    values, drawn = resample.resampled({"share": share}, part.subject_N, _CURVE_DRAWS, 0)
    observed = resample.interval(values["share"], drawn["share"])
    return {
        "predicted": float(chance_M.mean()),
        "observed": observed.value,
        "low": observed.low,
        "high": observed.high,
        "num": len(np.unique(part.subject_N)),
    }


def incidence_curve(judged: Labels) -> dict[str, Any]:
    """Return how common the event, and what competes with it, is by up to 25 times up to the last
    event (Aalen and Johansen; without competing events one less Kaplan and Meier). Between two of
    the times more than ten people have each of them, or none has: a step tells of nobody. What
    competes for one to ten people in all is left out."""
    rows = follow_up(judged)
    last = float(rows.duration_N[rows.ended_N].max(initial=0.0))
    competes_J = competing_of(judged)
    is_few = competes_J is not None and 0 < len(np.unique(judged.subject_N[competes_J])) <= FEW
    kinds = [outcome(judged)] + ([] if competes_J is None or is_few else [competes_J])
    days_H = _without_few(np.linspace(0, last, _POINTS), judged.subject_N, kinds, rows)
    event_H, competing_H = incidence.aalen_johansen(rows, days_H)
    return {
        "days": days_H.tolist(),
        "event": event_H.tolist(),
        "competing": None if competing_H is None or is_few else competing_H.tolist(),
    }


def _without_few(
    days_H: np.ndarray, subject_J: np.ndarray, kinds: list[np.ndarray], rows: FollowUp
) -> np.ndarray:
    """Return the days without those that come 1 to 10 people's events after the day before."""

    def tells(after: float, until: float) -> bool:
        within_J = (rows.duration_N > after) & (rows.duration_N <= until)
        people = (len(np.unique(subject_J[within_J & kind_J])) for kind_J in kinds)
        return any(0 < n <= FEW for n in people)

    ends = [-np.inf]
    for days in days_H:
        if not tells(ends[-1], days):
            ends.append(float(days))
    # the last day ends the curve; what is left before it joins the step before
    while len(ends) > 2 and tells(ends[-1], days_H[-1]):
        ends.pop()
    return np.unique([*ends[1:], float(days_H[-1])])
