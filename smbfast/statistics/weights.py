"""What a metric under weights is: the form that everything in this room shares.

Shape suffixes: N label rows, B draws.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray], np.ndarray]
"""Weights int [B, N] -> the metric of each draw, float64 [B]; nan where it is not defined.

A weight counts how often the row is there: a metric under weights is that of rows repeated.
"""


def weighted_sums(weight_BN: np.ndarray, value_N: np.ndarray) -> np.ndarray:
    """Return the sum of the values under the weights of each draw, float64 [B].

    One draw at a time: all of them as float64 would be written to memory and read back.
    """
    return np.array([weight_N.astype(np.float64) @ value_N for weight_N in weight_BN], np.float64)


def ratio(top_B: np.ndarray, bottom_B: np.ndarray) -> np.ndarray:
    """Return top / bottom, float64; nan where nothing is below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom_B > 0, top_B / bottom_B, np.nan)
