"""Metrics of a time to an event, each under many weightings of the rows at once.

Censoring is weighed out by its inverse probability (IPCW): whoever had the event at T counts
1 / G(T), where G is the probability of not being censored by then. G is given (`censoring`) and
does not change with the draw (our choice: it is known far better than the metric).

Where another event competes (Wolbers 2014, Blanche 2013), a row that had it never has the event. It
stays a control for good: with the weight 1 / G of its own time where weights are by IPCW.

Shape suffixes: N label rows, B draws, H times, C cases, M controls.
"""

import numpy as np

from smbfast.statistics.incidence import FollowUp, Steps, incidence_by
from smbfast.statistics.pairs import Pairs
from smbfast.statistics.weights import Metric, ratio, weighted_sums


def c_index(risk_N: np.ndarray, duration_N: np.ndarray, event_N: np.ndarray) -> Metric:
    """Return Harrell's C where nothing competes; see `harrell_c`."""
    return harrell_c(risk_N, FollowUp(duration_N, event_N))


def harrell_c(risk_N: np.ndarray, follow_up: FollowUp) -> Metric:
    """Return Harrell's C: of the comparable pairs, the share in which the earlier event has the
    higher risk; equal risks count one half.

    A pair is comparable if one has an event and the other outlives it, or is censored at that very
    time. Whoever had a competing event outlives all (cause-specific C). A pair weighs the product
    of its rows' weights. Exact; time is N log N for each draw.

    Args:
        risk_N: float, higher = earlier event.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    follow_up = follow_up.checked()
    case_C, case_key_C, key_N = _keys(follow_up)
    pairs = Pairs(risk_N[case_C], case_key_C, risk_N, key_N)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(*pairs.sums(weight_BN.take(case_C, 1), weight_BN))

    return metric


def uno_c(
    risk_N: np.ndarray, follow_up: FollowUp, censoring: Steps, tau: float | None = None
) -> Metric:
    """Return Uno's C: Harrell's with pairs weighed by 1 / G² at the time of the event.

    Unlike Harrell's it does not depend on when rows are censored. Whoever had a competing event
    before the case weighs 1 / (G(case) G(own)). nan where G is 0 at the time of an event below tau.

    Args:
        risk_N: float, higher = earlier event.
        censoring: G.
        tau: events at or after it count only as rows that outlive others; None takes all.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    follow_up = follow_up.checked()
    alone = FollowUp(follow_up.duration_N, follow_up.event_N)
    case_C, case_key_C, key_N = _keys(alone)
    if tau is not None:
        below_C = follow_up.duration_N[case_C] < tau
        case_C, case_key_C = case_C[below_C], case_key_C[below_C]
    competing_N = np.zeros(len(key_N), bool)
    if follow_up.competing_N is not None:
        competing_N = follow_up.competing_N
    inverse_C = _inverse(censoring.at(follow_up.duration_N[case_C]))
    pairs = Pairs(risk_N[case_C], case_key_C, risk_N, key_N)
    # the other way round: competing events before the case's. A greater key is an earlier time.
    other_M = np.flatnonzero(competing_N)
    last = int(key_N.max(initial=0))
    back = Pairs(risk_N[case_C], last - case_key_C, risk_N[other_M], last - key_N[other_M] + 1)
    inverse_M = _inverse(censoring.at(follow_up.duration_N[other_M]))

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        case_BC = weight_BN.take(case_C, 1) * inverse_C
        right_B, all_B = pairs.sums(case_BC * inverse_C, weight_BN)
        if len(other_M):
            more = back.sums(case_BC, weight_BN.take(other_M, 1) * inverse_M)
            right_B, all_B = right_B + more[0], all_B + more[1]
        return ratio(right_B, all_B)

    return metric


def dynamic_auc(risk_N: np.ndarray, follow_up: FollowUp, time: float, censoring: Steps) -> Metric:
    """Return the cumulative/dynamic AUC at a time: of pairs of one who had the event by then and
    one who had not, the share in which the first has the higher risk; equal risks count one half.

    nan where the draw has no case or no control, or G is 0 where it is needed.

    Args:
        risk_N: float, higher = earlier event.
        time: in the unit of durations; longer than it no censored row needs to be followed.
        censoring: G.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    follow_up = follow_up.checked()
    case_C, control_M, weight_C, weight_M = _at(follow_up, time, censoring)
    pairs = Pairs(
        risk_N[case_C],
        np.zeros(len(case_C), np.int64),
        risk_N[control_M],
        np.ones(len(control_M), np.int64),
    )

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        case_BC = weight_BN.take(case_C, 1) * weight_C
        return ratio(*pairs.sums(case_BC, weight_BN.take(control_M, 1) * weight_M))

    return metric


def mean_dynamic_auc(
    risk_N: np.ndarray, follow_up: FollowUp, time_H: np.ndarray, censoring: Steps
) -> Metric:
    """Return the mean of the cumulative/dynamic AUC over times, as scikit-survival weighs it.

    A time weighs as many events as come between the time before and itself: the step of the
    cumulative incidence of the draw. With one time it is that time's AUC.

    Raises:
        ValueError: as `FollowUp.checked` says, or times are none or do not ascend.
    """
    follow_up, time_H = follow_up.checked(), _ascending(time_H, 1)
    metrics = [dynamic_auc(risk_N, follow_up, float(time), censoring) for time in time_H]
    incidence = incidence_by(follow_up, time_H)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        auc_BH = np.stack([of_time(weight_BN) for of_time in metrics], 1)
        if len(time_H) == 1:
            return auc_BH[:, 0]
        incidence_BH = incidence(weight_BN)
        step_BH = np.diff(incidence_BH, axis=1, prepend=0.0)
        return ratio((step_BH * auc_BH).sum(1), incidence_BH[:, -1])

    return metric


def brier_ipcw(
    probability_N: np.ndarray, follow_up: FollowUp, time: float, censoring: Steps
) -> Metric:
    """Return the Brier score at a time: the mean squared difference between the probability of the
    event by then and whether it came, censoring weighed out (Graf 1999).

    Args:
        probability_N: float in [0, 1], of the event by `time`.
        time: in the unit of durations.
        censoring: G. nan where it is 0 where it is needed.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    square_N = _squares(probability_N, follow_up.checked(), time, censoring)

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(weighted_sums(weight_BN, square_N), weight_BN.sum(1).astype(np.float64))

    return metric


def integrated_brier(
    probability_NH: np.ndarray, follow_up: FollowUp, time_H: np.ndarray, censoring: Steps
) -> Metric:
    """Return the Brier score integrated over times by trapezes, over their span.

    Args:
        probability_NH: float in [0, 1], of the event by each time.

    Raises:
        ValueError: as `FollowUp.checked` says, or times are fewer than two or do not ascend.
    """
    follow_up, time_H = follow_up.checked(), _ascending(time_H, 2)
    square_NH = np.stack(
        [
            _squares(probability_NH[:, at], follow_up, float(time), censoring)
            for at, time in enumerate(time_H)
        ],
        axis=1,
    )
    square_N = np.trapezoid(square_NH, time_H, axis=1) / (time_H[-1] - time_H[0])

    def metric(weight_BN: np.ndarray) -> np.ndarray:
        return ratio(weighted_sums(weight_BN, square_N), weight_BN.sum(1).astype(np.float64))

    return metric


def _keys(follow_up: FollowUp) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cases, their keys, and the keys of all rows as controls, for `Pairs`.

    The key of a case is the place of its time among the times of events; of any other row, how many
    of those times it lived through.
    """
    duration_N, event_N, competing_N = follow_up
    case_C = np.flatnonzero(event_N)
    time_U = np.unique(duration_N[case_C])
    key_N = np.where(
        event_N,
        np.searchsorted(time_U, duration_N),
        np.searchsorted(time_U, duration_N, side="right"),
    )
    if competing_N is not None:
        key_N[competing_N] = len(time_U)
    return case_C, key_N[case_C], key_N


def _at(
    follow_up: FollowUp, time: float, censoring: Steps
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return cases by a time, controls at it, and their weights by IPCW [C] and [M]."""
    duration_N, event_N, competing_N = follow_up
    case_C = np.flatnonzero(event_N & (duration_N <= time))
    control_N = duration_N > time
    weight_N = np.ones(len(duration_N))
    if competing_N is not None:
        gone_N = competing_N & (duration_N <= time)
        # relative to 1 / G(time) of all others, which would cancel
        weight_N[gone_N] = censoring.at(np.array([time]))[0] * _inverse(
            censoring.at(duration_N[gone_N])
        )
        control_N = control_N | gone_N
    control_M = np.flatnonzero(control_N)
    weight_C = _inverse(censoring.at(duration_N[case_C]))
    return case_C, control_M, weight_C, weight_N[control_M]


def _squares(
    probability_N: np.ndarray, follow_up: FollowUp, time: float, censoring: Steps
) -> np.ndarray:
    """Return what each row adds to the Brier score at a time, float64 [N]."""
    duration_N, event_N, _ = follow_up
    case_N = event_N & (duration_N <= time)
    by_then_N = follow_up.ended_N & (duration_N <= time)
    known_N = by_then_N | (duration_N > time)
    inverse_N = np.zeros(len(duration_N))
    inverse_N[known_N] = _inverse(censoring.at(np.minimum(duration_N[known_N], time)))
    return (probability_N - case_N) ** 2 * inverse_N


def _inverse(share_N: np.ndarray) -> np.ndarray:
    """Return 1 / share; nan where it is 0."""
    with np.errstate(divide="ignore"):
        return np.where(share_N > 0, 1 / share_N, np.nan)


def _ascending(time_H: np.ndarray, fewest: int) -> np.ndarray:
    time_H = np.asarray(time_H, np.float64)
    if len(time_H) < fewest or (np.diff(time_H) <= 0).any():
        raise ValueError(f"times must be at least {fewest} and ascend; got {time_H.tolist()}")
    return time_H
