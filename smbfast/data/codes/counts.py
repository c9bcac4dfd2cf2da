"""Sums by integer key, and whether a union of keys has ten subjects.

Sums are of integers, so any order of adding and merging gives the same. Ids of subjects are kept
only while a key has fewer than 10 of them: the union of such sets with "10 or more" tells exactly
whether a union of keys has 10 subjects.

Legend: R rows (key, subject), K keys, M columns, P pairs of a key and a subject, H high keys.
"""

from itertools import pairwise

import numpy as np

from smbfast.data.codes.bins import MIN_SUBJECTS

_SETTLE = 1 << 18  # rows that wait before they are sorted into a table


class SubjectCounts:
    """Sums by integer key; column 0 is the number of distinct subjects.

    A key is `high << low_bits | low`. Reading needs `settle()`, which sorts in what was added.
    """

    def __init__(self, num_columns: int, low_bits: int = 0, *, with_few: bool = True) -> None:
        self.low_bits = low_bits
        self.with_few = with_few  # whether ids of subjects are kept
        self.key_K = np.empty(0, np.int64)  # ascending
        self.sum_KM = np.empty((0, num_columns), np.int64)
        self.few_key_P = np.empty(0, np.int64)  # keys with fewer than 10 subjects, ascending
        self.few_subject_P = np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(self, key_R: np.ndarray, subject_R: np.ndarray, sum_RM: np.ndarray) -> None:
        """Add rows, one per distinct (key, subject); a subject comes in one call only."""
        if len(key_R) == 0:
            return
        order_R = np.argsort(key_R, kind="stable")
        key_R, subject_R = key_R[order_R], subject_R[order_R]
        key_K, sum_KM = sums_of(key_R, sum_RM[order_R])
        few_R = np.repeat((sum_KM[:, 0] < MIN_SUBJECTS) & self.with_few, sum_KM[:, 0])
        self._wait(key_K, sum_KM, key_R[few_R], subject_R[few_R])

    def merge(self, other: "SubjectCounts", key_K: np.ndarray) -> None:
        """Add all of the settled `other`, whose keys are called `key_K` here."""
        at_P = np.searchsorted(other.key_K, other.few_key_P)
        self._wait(key_K, other.sum_KM, key_K[at_P], other.few_subject_P)

    def settle(self) -> None:
        """Sort in what was added."""
        if not self._waiting:
            return
        parts = [(self.key_K, self.sum_KM, self.few_key_P, self.few_subject_P), *self._waiting]
        self._waiting, self._num_waiting = [], 0
        key, sums, few_key_P, few_subject_P = (np.concatenate(p) for p in zip(*parts, strict=True))
        order = np.argsort(key, kind="stable")
        self.key_K, self.sum_KM = sums_of(key[order], sums[order])
        num_P = self.sum_KM[np.searchsorted(self.key_K, few_key_P), 0]
        still_P = num_P < MIN_SUBJECTS
        few_key_P, few_subject_P = few_key_P[still_P], few_subject_P[still_P]
        order = np.argsort(few_key_P, kind="stable")
        self.few_key_P, self.few_subject_P = few_key_P[order], few_subject_P[order]

    @property
    def num_rows(self) -> int:
        """An upper bound of the number of keys."""
        return len(self.key_K) + self._num_waiting

    def low(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return the lower parts of the keys of rows first:last, int64."""
        return self.key_K[first:last] & ((1 << self.low_bits) - 1)

    def bounds(self, num_high: int) -> np.ndarray:
        """Return where the rows of each upper part begin, int64 [num_high + 1]."""
        firsts_H = np.arange(num_high + 1, dtype=np.int64) << self.low_bits
        return np.searchsorted(self.key_K, firsts_H)

    def few(self, first: int, last: int) -> list[list[int]]:
        """Return the subjects of each of rows first:last; of 10 or more, an empty list."""
        bounds = np.append(self.key_K[first:last], self.key_K[last - 1] + 1)
        at = np.searchsorted(self.few_key_P, bounds)
        return [self.few_subject_P[a:b].tolist() for a, b in pairwise(at)]

    def _wait(self, *part: np.ndarray) -> None:
        key_K, sum_KM, few_key_P, few_subject_P = part
        self._waiting.append((key_K, sum_KM, few_key_P, few_subject_P))
        self._num_waiting += len(key_K) + len(few_key_P)
        if self._num_waiting > max(_SETTLE, len(self.key_K)):
            self.settle()


def runs_of(sorted_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of a sorted array and how often each stands there."""
    start = np.flatnonzero(np.concatenate([[len(sorted_R) > 0], sorted_R[1:] != sorted_R[:-1]]))
    return sorted_R[start], np.diff(np.append(start, len(sorted_R)))


def sums_of(sorted_R: np.ndarray, sum_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of a sorted array and the sums of the rows of each."""
    if len(sorted_R) == 0:
        return sorted_R, sum_RM
    key_K, count_K = runs_of(sorted_R)
    return key_K, np.add.reduceat(sum_RM, np.cumsum(count_K) - count_K, axis=0)
