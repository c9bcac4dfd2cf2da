"""Bins of the numbers of a code.

Values arrive as float32. They are made decimal first (6 significant digits), so that a recorded 7.2
is 7.2, and are then floored to 3 significant digits. Floored values are numbered in order, by an
integer key that runs from most negative to largest. An edge is such a key too; hence a value is at
or above an edge exactly where its key is, and who is counted in a bin is who is encoded into it.
That, the subjects of equal weight and the merging are our choice.

Legend: N values, K keys of one code in ascending order, G groups of neighbouring keys.
"""

from collections.abc import Iterable, Sequence

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
    groups = _Groups(start_G, weight_K, subjects_K, few)
    groups.merge()
    return [int(key_K[g]) for g in groups.starts[1:]]


class _Groups:
    """Neighbouring keys that become bins: their first keys, weights and subjects (at most 10)."""

    def __init__(
        self,
        start_G: np.ndarray,
        weight_K: np.ndarray,
        subjects_K: np.ndarray,
        few: Sequence[Iterable[int]],
    ) -> None:
        self.starts = start_G.tolist()
        self.weights = np.add.reduceat(weight_K, start_G).tolist()
        most_G = np.maximum.reduceat(subjects_K, start_G)
        ends = [*self.starts[1:], len(weight_K)]
        self.subjects: list[set[int] | None] = [  # None: 10 or more
            None if most >= MIN_SUBJECTS else _enough({s for ids in few[a:b] for s in ids})
            for most, a, b in zip(most_G, self.starts, ends, strict=True)
        ]

    def merge(self) -> None:
        while len(self.starts) > 1:
            thin = [g for g, s in enumerate(self.subjects) if s is not None]
            if thin:
                g = min(thin, key=lambda g: (self.weights[g], g))
                right = g + 1 < len(self.starts)
                if g > 0 and not (right and self.weights[g + 1] < self.weights[g - 1]):
                    g -= 1
            elif len(self.starts) > MAX_BINS:
                pairs = [a + b for a, b in zip(self.weights, self.weights[1:], strict=False)]
                g = pairs.index(min(pairs))
            else:
                return
            self._join(g)

    def _join(self, g: int) -> None:
        """Make groups g and g + 1 one."""
        a, b = self.subjects[g], self.subjects.pop(g + 1)
        self.subjects[g] = None if a is None or b is None else _enough(a | b)
        self.weights[g] += self.weights.pop(g + 1)
        del self.starts[g + 1]


def _enough(subjects: set[int]) -> set[int] | None:
    return None if len(subjects) >= MIN_SUBJECTS else subjects
