"""What is judged: the scores of models for the rows of one task, and what is known of those rows.

Shape suffixes: N label rows, S versions of one model (inits or training seeds), H horizons.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from smbfast.judging.risk_function import RiskFunction

Role = Literal["own", "baseline", "beside", "oracle"]


@dataclass(frozen=True)
class Scored:
    """What one model says of every label row of a task.

    name: by which files and records know it; label: what tables call it.
    role: "own" is the trained model under a probe, "baseline" one that needs no training of a
        backbone, "beside" another trained model or a peer that was given, "oracle" one that sees
        what no model can.
    score_SN: float64 [S, N], higher = riskier: the probability of a binary task, calibrated on
        tuning, or the log hazard. Of S versions every figure is the mean. nan for rows that the
        model does not score, which are none of those that are judged.
    chosen: how it was fitted, as JSON values, for the record.
    reason: why it cannot be measured, if it cannot; score_SN then has no version.
    chance_SNH: float64, of a log hazard: the probability of the event by each horizon; None where
        no baseline hazard was fitted.
    risk: how the trained model scores any other node; None of other models.
    """

    name: str
    label: str
    role: Role
    score_SN: np.ndarray
    chosen: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    chance_SNH: np.ndarray | None = None
    risk: RiskFunction | None = None

    def take(self, rows: np.ndarray) -> "Scored":
        """Return the scores of the given rows (indices or a mask)."""
        chance_SNH = None if self.chance_SNH is None else self.chance_SNH[:, rows]
        return replace(self, score_SN=self.score_SN[:, rows], chance_SNH=chance_SNH)


@dataclass(frozen=True)
class Traits:
    """What is known of each label row at its prediction time, for groups of rows.

    age_N: years, nan where no birth is known; sex_N: str, "" where unknown; events_N: int64 number
    of events up to the prediction time; order_N: int64, 0 for the first node of its patient in this
    task, in order of time.
    """

    age_N: np.ndarray
    sex_N: np.ndarray
    events_N: np.ndarray
    order_N: np.ndarray

    def take(self, rows: np.ndarray) -> "Traits":
        """Return the given rows (indices or a mask)."""
        return Traits(self.age_N[rows], self.sex_N[rows], self.events_N[rows], self.order_N[rows])
