"""Times at which time to event is judged, and the probability of the event by each of them.

Both come from rows that judge nothing by themselves: horizons from train alone, and like the
calibration of a binary probe, probabilities from tuning: a slope of the log hazard by partial
likelihood, and Breslow's baseline hazard. A log hazard that was fitted closely to train is too
extreme there, so that a baseline of train would make all probabilities so. Shape suffixes: N label
rows, S versions, H horizons, T rows of tuning.
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize_scalar

from smbfast.data.labels import Labels
from smbfast.judging.measures import follow_up
from smbfast.judging.scored import Scored
from smbfast.probing.binary import FEW
from smbfast.probing.survival import PartialLikelihood
from smbfast.statistics.incidence import breslow

_LADDER = np.array(
    [1 / 24, 1 / 8, 1 / 4, 1 / 2, 1, 2, 3, 5, 7, 14, 30, 60, 90, 180, 365, 730, 1095, 1825, 3650]
)  # days; from 1 hour to 10 years
_QUARTILES = (0.25, 0.5, 0.75)
_FOLLOWED = 0.05  # share of train that a horizon must leave without event and followed: our choice
_STEEPEST = 5.0  # largest slope of a log hazard that is tried


def horizons(labels: Labels) -> tuple[float, ...]:
    """Return at most three horizons in days, ascending: the quartiles of the times of events in
    train, each taken to the nearest of a ladder from 1 hour to 10 years (our choice).

    Those beyond which fewer than 5 % of train are without event and followed are left out; where
    none is left, the median time of an event stands alone.

    Raises:
        ValueError: train has no event.
    """
    train = labels.take(labels.split_N == "train")
    duration_N, event_N = train.survival_N
    if not event_N.any():
        raise ValueError(f"horizons of {labels.task} need events in train; it has none")
    middle = np.quantile(duration_N[event_N], _QUARTILES)
    distance = np.abs(np.log(np.maximum(middle, 1e-9))[:, None] - np.log(_LADDER))
    nearest_H = np.unique(_LADDER[distance.argmin(1)])
    competing_N = follow_up(train).competing_N
    free_N = np.zeros(len(train), bool) if competing_N is None else competing_N
    followed_H = [float(((duration_N > days) | free_N).mean()) for days in nearest_H]
    chosen = [
        float(days)
        for days, followed in zip(nearest_H, followed_H, strict=True)
        if followed >= _FOLLOWED and (event_N & (duration_N <= days)).any()
    ]
    return tuple(chosen) or (float(middle[1]),)


def with_chances(labels: Labels, model: Scored, horizons_H: tuple[float, ...]) -> Scored:
    """Return a model with the probability of the event by each horizon, where its log hazards reach
    the tuning rows and it has none yet; an oracle stays as it is."""
    tuning = labels.split_N == "tuning"
    known = model.chance_SNH is not None or model.role == "oracle" or model.reason is not None
    if known or not np.isfinite(model.score_SN[:, tuning]).all():
        return model
    rows = follow_up(labels.take(tuning))
    if not rows.event_N.any():
        return model
    times_H = np.array(horizons_H)
    chances, risk = [], None
    for score_N in model.score_SN:
        middle = score_N[tuning].mean()
        centred_N = score_N - middle
        slope = _slope(centred_N[tuning], rows.duration_N, rows.event_N)
        baseline = breslow(slope * centred_N[tuning], rows)
        chances.append(baseline.probability(slope * centred_N, times_H))
        if model.risk is not None:
            risk = replace(model.risk, slope=slope, shift=float(middle), baseline=baseline)
            risk = replace(risk, horizons_H=horizons_H)
    return replace(model, chance_SNH=np.stack(chances), risk=risk)


def _slope(risk_T: np.ndarray, duration_T: np.ndarray, event_T: np.ndarray) -> float:
    """Return the slope with the best partial likelihood, 1 where events are too few for one."""
    if int(event_T.sum()) < FEW:
        return 1.0
    likelihood = PartialLikelihood(duration_T, event_T)
    best = minimize_scalar(
        lambda slope: likelihood.loss(slope * risk_T)[0],
        bounds=(0.0, _STEEPEST),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(best.x)
