"""How common an event is by a time, from durations of which a part is censored.

At one time, events (and competing events) come before censorings, as Kaplan and Meier have it.

Shape suffixes: N label rows, B draws, U distinct durations, H times asked for, M rows asked for,
R rows that are not censored, E rows with the event.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_GRID = 2048  # risks at which an incidence under competing events is summed up
_CELLS = 8_000_000  # entries held at once


class FollowUp(NamedTuple):
    """How each label row's follow-up ended: with the event, a competing one, or censored.

    duration_N: float64, in any one unit, >= 0; event_N: bool; competing_N: bool, or None where
    nothing competes. A row with neither is censored at its duration.
    """

    duration_N: np.ndarray
    event_N: np.ndarray
    competing_N: np.ndarray | None = None

    def checked(self) -> "FollowUp":
        """Return it with plain dtypes.

        Raises:
            ValueError: a duration is negative or not finite, lengths differ, or a row has both the
                event and a competing one.
        """
        duration_N = np.asarray(self.duration_N, np.float64)
        event_N = np.asarray(self.event_N, bool)
        competing_N = None if self.competing_N is None else np.asarray(self.competing_N, bool)
        lengths = {len(a) for a in (duration_N, event_N, competing_N) if a is not None}
        if len(lengths) > 1:
            raise ValueError(f"durations and events must be of the same rows; got {lengths} rows")
        if not (np.isfinite(duration_N) & (duration_N >= 0)).all():
            raise ValueError("durations must be finite and not negative; they are not")
        if competing_N is not None and (event_N & competing_N).any():
            raise ValueError(
                "a row ends with the event or with a competing one; "
                f"got {int((event_N & competing_N).sum())} rows with both"
            )
        return FollowUp(duration_N, event_N, competing_N)

    @property
    def ended_N(self) -> np.ndarray:
        """Which rows are not censored, bool [N]."""
        return self.event_N if self.competing_N is None else self.event_N | self.competing_N


@dataclass(frozen=True)
class Steps:
    """A step function of time: 1 before the first time, then the value of the last time passed."""

    time_U: np.ndarray
    value_U: np.ndarray

    def at(self, time_M: np.ndarray) -> np.ndarray:
        """Return the value at each time, float64 [M]; a step counts from its own time on."""
        index_M = np.searchsorted(self.time_U, time_M, side="right")
        return np.concatenate([[1.0], self.value_U])[index_M]


def censoring(follow_up: FollowUp) -> Steps:
    """Return the probability of not being censored by a time (Kaplan-Meier of censorings).

    Competing events are no censorings. At a time with both, events leave the risk set first, as in
    scikit-survival. The rows are those of reference: the judged ones, or a larger set like them.
    """
    follow_up = follow_up.checked()
    time_U, row_N = np.unique(follow_up.duration_N, return_inverse=True)
    all_U = np.bincount(row_N, minlength=len(time_U))
    ended_U = np.bincount(row_N[follow_up.ended_N], minlength=len(time_U))
    risk_U = all_U[::-1].cumsum()[::-1] - ended_U
    left_U = 1 - (all_U - ended_U) / np.maximum(risk_U, 1)
    return Steps(time_U, np.cumprod(left_U))


def cumulative_incidence(
    follow_up: FollowUp, time_H: np.ndarray, weight_BN: np.ndarray
) -> np.ndarray:
    """Return the probability of the event by each time, float64 [B, H], under weights int [B, N].

    Aalen-Johansen; without competing events one less Kaplan-Meier.
    """
    return incidence_by(follow_up, time_H)(weight_BN)


def incidence_by(follow_up: FollowUp, time_H: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return `cumulative_incidence` as a function of the weights, for which rows are sorted once.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    follow_up = follow_up.checked()
    time_U, of_N = np.unique(follow_up.duration_N, return_inverse=True)
    num_times, index_H = len(time_U), np.searchsorted(time_U, time_H, side="right")
    ended_R, event_E = np.flatnonzero(follow_up.ended_N), np.flatnonzero(follow_up.event_N)
    of_R, of_E = of_N[ended_R], of_N[event_E]

    def incidence(weight_BN: np.ndarray) -> np.ndarray:
        total_BH = np.empty((len(weight_BN), len(time_H)))
        for draw, weight_N in enumerate(weight_BN):
            risk_U = np.bincount(of_N, weight_N, num_times)[::-1].cumsum()[::-1]
            risk_U = np.maximum(risk_U, 1)
            any_U = np.bincount(of_R, weight_N.take(ended_R), num_times) / risk_U
            own_U = np.bincount(of_E, weight_N.take(event_E), num_times) / risk_U
            left_U = np.concatenate([[1.0], np.cumprod(1 - any_U)[:-1]])
            total_BH[draw] = np.concatenate([[0.0], np.cumsum(left_U * own_U)])[index_H]
        return total_BH

    return incidence


def kaplan_meier(duration_N: np.ndarray, event_N: np.ndarray, time_H: np.ndarray) -> np.ndarray:
    """Return the probability of no event by each time, float64 [H] (Kaplan-Meier).

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    whole_1N = np.ones((1, len(duration_N)), np.int32)
    return 1 - cumulative_incidence(FollowUp(duration_N, event_N), time_H, whole_1N)[0]


def aalen_johansen(follow_up: FollowUp, time_H: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the probabilities of the event and of a competing one by each time, float64 [H] each.

    The second is None where nothing competes.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    whole_1N = np.ones((1, len(follow_up.duration_N)), np.int32)
    event_H = cumulative_incidence(follow_up, time_H, whole_1N)[0]
    if follow_up.competing_N is None:
        return event_H, None
    swapped = FollowUp(follow_up.duration_N, follow_up.competing_N, follow_up.event_N)
    return event_H, cumulative_incidence(swapped, time_H, whole_1N)[0]


@dataclass(frozen=True)
class Baseline:
    """Hazards of a subject whose log hazard is 0: steps of the event's, and of what competes.

    The event's are held as logarithms: a fit that separates few rows gives log hazards in the
    thousands, of which neither exp nor its inverse is a number.
    """

    time_U: np.ndarray
    log_event_U: np.ndarray  # -inf where nobody had the event
    competing_U: np.ndarray | None

    @property
    def event_U(self) -> np.ndarray:
        """Return the steps of the event's hazard, float64 [U]; inf where that is too large."""
        return _exp(self.log_event_U)

    def cumulative_hazard(self, time_H: np.ndarray) -> np.ndarray:
        """Return the event's cumulative hazard by each time, float64 [H]."""
        return _exp(self._log_total()[np.searchsorted(self.time_U, time_H, side="right")])

    def probability(self, risk_M: np.ndarray, time_H: np.ndarray) -> np.ndarray:
        """Return the probability of the event by each time, float64 [M, H], at log hazards [M].

        With competing events it is the cumulative incidence: a step of the event's hazard finds
        those whom neither event has taken, and the hazard of the competing event is everybody's
        (our choice). That sum is made at 2,048 risks and read between them.
        """
        index_H = np.searchsorted(self.time_U, time_H, side="right")
        log_own_U = self._log_total()
        if self.competing_U is None:
            return -np.expm1(-_exp(risk_M[:, None] + log_own_U[index_H]))
        if len(risk_M) == 0:
            return np.zeros((0, len(time_H)))
        grid_M = np.linspace(risk_M.min(), risk_M.max(), _GRID)
        other_U = np.concatenate([[0.0], np.cumsum(self.competing_U)])
        at_grid_MH = np.empty((_GRID, len(time_H)))
        rows = max(1, _CELLS // len(log_own_U))
        for start in range(0, _GRID, rows):
            risk_M1 = grid_M[start : start + rows, None]
            # of one time, the event's step is before the competing one's
            free_MU = np.exp(-_exp(risk_M1 + log_own_U[:-1]) - other_U[:-1])
            step_MU = free_MU * -np.expm1(-_exp(risk_M1 + self.log_event_U))
            sum_MU = np.concatenate([np.zeros((len(step_MU), 1)), np.cumsum(step_MU, 1)], 1)
            at_grid_MH[start : start + rows] = sum_MU[:, index_H]
        return np.stack([np.interp(risk_M, grid_M, column) for column in at_grid_MH.T], 1)

    def _log_total(self) -> np.ndarray:
        """Return the log cumulative hazard of the event before the first time and after each."""
        total_U = np.logaddexp.accumulate(self.log_event_U)
        return np.concatenate([[-np.inf], total_U])


def breslow(risk_N: np.ndarray, follow_up: FollowUp) -> Baseline:
    """Return the baseline hazards of rows with log hazards float [N] (Breslow's estimate).

    A competing event ends a row's time at risk; its own hazard is Nelson and Aalen's, the same for
    all rows.

    Raises:
        ValueError: as `FollowUp.checked` says.
    """
    follow_up = follow_up.checked()
    time_U, row_N = np.unique(follow_up.duration_N, return_inverse=True)
    at_risk_U = np.full(len(time_U), -np.inf)
    np.logaddexp.at(at_risk_U, row_N, np.asarray(risk_N, np.float64))
    at_risk_U = np.logaddexp.accumulate(at_risk_U[::-1])[::-1]
    with np.errstate(divide="ignore"):
        log_num_U = np.log(np.bincount(row_N[follow_up.event_N], minlength=len(time_U)))
    event_U = log_num_U - at_risk_U
    if follow_up.competing_N is None:
        return Baseline(time_U, event_U, None)
    people_U = np.bincount(row_N, minlength=len(time_U))[::-1].cumsum()[::-1]
    other_U = np.bincount(row_N[follow_up.competing_N], minlength=len(time_U)) / people_U
    return Baseline(time_U, event_U, other_U)


def _exp(log: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(log)
