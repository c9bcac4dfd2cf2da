"""p-values: of a difference, from its bootstrap, and of many of them together (Holm 1979)."""

from collections.abc import Sequence

import numpy as np


def p_value(drawn_B: np.ndarray) -> float | None:
    """Return the two-sided p of a difference from its draws, float64 [B].

    Twice the smaller share of draws at or beyond 0 on one side, the value itself counted as a draw:
    at least 2 / (B + 1). None where fewer than half of the draws are defined, as for intervals.
    """
    defined = drawn_B[np.isfinite(drawn_B)]
    if len(defined) == 0 or 2 * len(defined) < len(drawn_B):
        return None
    tail = min((defined <= 0).sum(), (defined >= 0).sum()) + 1
    return min(1.0, float(2 * tail / (len(defined) + 1)))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p in the same order; what is None stays None and does not count.

    Raises:
        ValueError: a p is not in [0, 1].
    """
    measured = [value for value in p if value is not None]
    for value in measured:
        if not 0 <= value <= 1:
            raise ValueError(f"p-values must lie in [0, 1]; got {value}")
    adjusted: list[float | None] = [None] * len(p)
    highest, left = 0.0, len(measured)
    for at in sorted((i for i, v in enumerate(p) if v is not None), key=lambda i: p[i] or 0.0):
        highest = max(highest, min(1.0, left * (p[at] or 0.0)))
        adjusted[at] = highest
        left -= 1
    return adjusted
