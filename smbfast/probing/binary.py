"""What every binary probe gives: a logit of each row, calibrated on the tuning split.

Calibration is Platt's: the probability is expit(slope * logit + intercept), slope and intercept by
maximum likelihood on the tuning split, so that no order of two rows changes. Shape suffixes: N
rows, S rows of tuning.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

FEW = 10  # rows of either class in tuning below which no slope is fitted: our choice


@dataclass(frozen=True)
class Calibration:
    """The probability of a logit is expit(slope * logit + intercept); slope is above 0."""

    slope: float = 1.0
    intercept: float = 0.0

    def probability(self, logit_N: np.ndarray) -> np.ndarray:
        """Return the calibrated probability of a true label, float64 [N]."""
        return expit(self.slope * logit_N + self.intercept)


@dataclass(frozen=True)
class BinaryProbe:
    """logit_N float64: of a true label, as it was fitted on train, for every row given.

    tuning_log_loss: of these logits, nats a row, before calibration.
    """

    logit_N: np.ndarray
    tuning_log_loss: float
    calibration: Calibration

    @property
    def probability_N(self) -> np.ndarray:
        """The calibrated probability of a true label, float64 [N]."""
        return self.calibration.probability(self.logit_N)


def not_measurable(true_N: np.ndarray, split_N: np.ndarray, judged: str = "held_out") -> str | None:
    """Return why a binary task cannot be measured on the split `judged`, or None."""
    for split in ("train", judged):
        if len(np.unique(true_N[split_N == split])) < 2:
            return f"{split} has one class only"
    return None


def require_classes(true_N: np.ndarray, split_N: np.ndarray) -> None:
    """Raise a ValueError if nothing can be fitted (train) or chosen (tuning) on these rows."""
    if len(np.unique(true_N[split_N == "train"])) < 2:
        raise ValueError("a binary probe needs rows of both classes in train; it has one or none")
    if not (split_N == "tuning").any():
        raise ValueError("a binary probe needs rows in tuning; there are none")


def log_loss(logit_N: np.ndarray, true_N: np.ndarray) -> float:
    """Return the mean negative log likelihood, nats a row."""
    return float(np.mean(np.logaddexp(0, logit_N) - true_N * logit_N))


def calibrate(logit_S: np.ndarray, true_S: np.ndarray) -> Calibration:
    """Fit slope and intercept on the rows of tuning.

    The slope stays 1 where either class has fewer than `FEW` rows, where the logits separate the
    classes or are all the same (no slope is the likeliest), and where it would turn the order of
    the rows round. With one class only nothing is fitted.
    """
    true_S = true_S.astype(bool)
    positive_P, negative_Q = logit_S[true_S], logit_S[~true_S]
    fewer = min(len(positive_P), len(negative_Q))
    if fewer == 0:
        return Calibration()
    overlap = positive_P.min() < negative_Q.max() and negative_Q.min() < positive_P.max()
    if fewer >= FEW and overlap:
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=100)
        # of logits with mean 0 and deviation 1 its steps are well conditioned
        middle, spread = logit_S.mean(), logit_S.std()
        model.fit(((logit_S - middle) / spread)[:, None], true_S)
        slope = float(model.coef_[0, 0] / spread)
        if slope > 0:
            return Calibration(slope, float(model.intercept_[0] - slope * middle))
    # the likeliest intercept makes the mean probability the share of true labels
    share = len(positive_P) / len(logit_S)
    reach = float(np.abs(logit_S).max()) + abs(np.log(share / (1 - share))) + 1
    return Calibration(1.0, brentq(lambda b: expit(logit_S + b).mean() - share, -reach, reach))
