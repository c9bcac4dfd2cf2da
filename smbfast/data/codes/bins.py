"""Bins of the numbers of a code.

Values arrive as float32. They are made decimal first (6 significant digits), so that a recorded 7.2
is 7.2, and are then floored to 3 significant digits. Floored values are numbered in order, by an
integer key that runs from most negative to largest. An edge is such a key too; hence a value is at
or above an edge exactly where its key is, and who is counted in a bin is who is encoded into it.
That, the subjects of equal weight and the merging are our choice.

Legend: N values, K keys of one code in ascending order, G groups of neighbouring keys.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

MIN_SUBJECTS = 10  # training subjects behind every fitted token
MAX_BINS = 10
KEY_BITS = 18  # keys of float32 lie within +-77,401
KEY_OFFSET = 1 << (KEY_BITS - 1)

_LOWEST = -46  # float32 begins at 1.4e-45
_POWER = np.array([float(f"1e{k}") for k in range(_LOWEST, 53)])


def decimal_keys(value_N: np.ndarray) -> np.ndarray:
    """Return the key of each finite value, int64 [N], monotone in the value; 0 is the key of 0."""
    size_N = np.abs(value_N.astype(np.float64))
    size_N[size_N == 0] = 1.0
    exponent_N = np.floor(np.log10(size_N)).astype(np.int64)
    # logarithms differ between machines, comparisons do not
    exponent_N -= size_N < _POWER[exponent_N - _LOWEST]
    exponent_N += size_N >= _POWER[exponent_N + 1 - _LOWEST]
    six_N = np.rint(size_N * _POWER[5 - exponent_N - _LOWEST]).astype(np.int64)
    negative_N = value_N < 0
    three_N = (six_N + 999 * negative_N) // 1000
    carry_N = three_N == 1000  # 9.999996 became 10.0, or -9.991 became -10.0
    three_N[carry_N] = 100
    exponent_N += carry_N
    key_N = (exponent_N - _LOWEST) * 900 + three_N - 99
    key_N[value_N == 0] = 0
    np.negative(key_N, out=key_N, where=negative_N)
    return key_N


def key_value(key: int) -> float:
    """Return the number of at most three digits that a key stands for."""
    if key == 0:
        return 0.0
    exponent, digits = divmod(abs(key) - 1, 900)
    size = float(f"{digits + 100}e{exponent + _LOWEST - 2}")
    return size if key > 0 else -size


def fit_edges(
    key_K: np.ndarray,
    weight_K: np.ndarray,
    subjects_K: np.ndarray,
    few: Sequence[Iterable[int]],
) -> list[int]:
    """Return the keys that begin the second and later bins of a code, in ascending order.

    A key with a tenth of the weight is a bin of its own, the others are cut at quantiles of their
    weight. Neighbours are merged until each bin has 10 subjects and there are at most 10 bins.

    Args:
        key_K: int64, ascending.
        weight_K: int64 >= 0; their sum must stay below 2^58.
        subjects_K: int64, distinct subjects of each key.
        few: the subjects of each key that has fewer than 10 (of others it is not read).
    """
    heavy_K = weight_K * MAX_BINS >= weight_K.sum()
    light_K = np.where(heavy_K, 0, weight_K)
    middle_K = 2 * np.cumsum(light_K) - light_K
    num_bins = max(MAX_BINS - int(heavy_K.sum()), 1)
    quantile_K = middle_K * num_bins // max(2 * int(light_K.sum()), 1)
    begins_K = np.ones(len(key_K), bool)
    begins_K[1:] = heavy_K[1:] | heavy_K[:-1] | (quantile_K[1:] != quantile_K[:-1])
    start_G = np.flatnonzero(begins_K)
    most_G = np.maximum.reduceat(subjects_K, start_G).tolist()
    starts = start_G.tolist()
    groups: list[set[int] | None] = [  # None: 10 or more
        None if most >= MIN_SUBJECTS else {s for ids in few[a:b] for s in ids}
        for most, a, b in zip(most_G, starts, [*starts[1:], len(key_K)], strict=True)
    ]
    merged = _merged(np.add.reduceat(weight_K, start_G).tolist(), groups)
    return [int(key_K[starts[g]]) for g in merged[1:]]


def _merged(weights: list[int], subjects: list[set[int] | None]) -> list[int]:
    """Return the first group of each bin: the most even bins that have ten subjects.

    Of all ways to merge neighbours the one with the smallest sum of squared weights, which no split
    makes larger; in whole numbers, so that every machine finds the same.
    """
    num = len(weights)
    enough = [_ten_subjects(subjects, g) for g in range(num)]
    if num <= MAX_BINS and enough == list(range(1, num + 1)):
        return list(range(num))
    upto = [0, *accumulate(weights)]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by the group after the last bin
    whole = []
    for _ in range(min(MAX_BINS, num)):
        longer = {}
        for end in range(1, num + 1):
            ways = [
                (cost + (upto[end] - upto[g]) ** 2, [*firsts, g])
                for g, (cost, firsts) in best.items()
                if g < num and enough[g] <= end
            ]
            if ways:
                longer[end] = min(ways)
        best = longer
        if num in best:
            whole.append(best[num])
    return min(whole)[1]


def _ten_subjects(subjects: list[set[int] | None], first: int) -> int:
    """Return the group before which a bin that begins at `first` has ten subjects."""
    union: set[int] = set()
    for g in range(first, len(subjects)):
        group = subjects[g]
        if group is None or len(union := union | group) >= MIN_SUBJECTS:
            return g + 1
    return len(subjects) + 1
