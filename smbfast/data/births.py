"""Finds when subjects were born, and leaves out births that a decision node must not see.

Legend: N events, S subjects (S1 = S + 1 offsets).
"""

from collections import Counter

import numpy as np

from smbfast.batch import UNKNOWN
from smbfast.data.meds import BIRTH, STATIC, EventBatch


def without_late_births(batch: EventBatch, counts: Counter[str]) -> tuple[EventBatch, np.ndarray]:
    """Leave out births after a subject's first event; return also which of the rest are births.

    What a birth gives stands before every bucket, so a node between the two would see what is to
    come.

    Args:
        counts: `late_births` is raised by the number of events left out.

    Returns:
        The batch without them, and bool [N] of its events.
    """
    birth_N = batch.code_N == (batch.codes.index(BIRTH) if BIRTH in batch.codes else -1)
    if not birth_N.any():
        return batch, birth_N
    subject_N = np.repeat(np.arange(len(batch.offset_S1) - 1), np.diff(batch.offset_S1))
    first_S = np.full(len(batch.offset_S1) - 1, np.iinfo(np.int64).max)
    timed_N = ~birth_N & (batch.time_N != STATIC)
    np.minimum.at(first_S, subject_N[timed_N], batch.time_N[timed_N])
    keep_N = ~birth_N | (batch.time_N <= first_S[subject_N])
    if keep_N.all():
        return batch, birth_N
    counts["late_births"] += int((~keep_N).sum())
    num_before_N1 = np.concatenate([[0], np.cumsum(keep_N)])
    return batch.rows(np.flatnonzero(keep_N), num_before_N1[batch.offset_S1]), birth_N[keep_N]


def births(batch: EventBatch, birth_N: np.ndarray) -> np.ndarray:
    """Return when each subject was born, int64 [S] microseconds since 1970, UNKNOWN if not told."""
    birth_S = np.full(len(batch.offset_S1) - 1, UNKNOWN)
    at = np.flatnonzero(birth_N & (batch.time_N != STATIC))
    subject = np.searchsorted(batch.offset_S1, at, side="right") - 1
    birth_S[subject[::-1]] = batch.time_N[at[::-1]]  # the first of several
    return birth_S
