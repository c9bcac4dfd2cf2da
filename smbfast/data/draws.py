"""Random draws by identity: what is drawn decides, never who draws it or when.

An identity is (seed, kind, step, subject, window, ...). Its hash is the key of a generator, or of a
permutation whose values are computed one at a time.
"""

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

_KINDS = {"order": 0, "cut": 1, "mask": 2, "stratum": 3, "position": 4}
FIXED = -1  # stands for the step in draws that never change (tuning positions, a sample)
_WORD = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 10  # with six, pairs of values are visibly uneven in ranges of ten


def generator(seed: int, kind: str, *identity: int) -> np.random.Generator:
    """Return a generator that depends only on what is drawn.

    SFC64 starts from a hash of the identity, which costs a fifth of what Philox and a
    `SeedSequence` do.

    Raises:
        KeyError: if the kind of draw does not exist.
    """
    start: Any = _Start(_digest(seed, kind, *identity))  # NumPy's stubs know `SeedSequence` alone
    return np.random.Generator(np.random.SFC64(start))


def below(size: int, seed: int, kind: str, *identity: int) -> int:
    """Return a random integer from 0 to `size - 1` that depends only on what is drawn."""
    return word(seed, kind, *identity) * size >> 64


def word(seed: int, kind: str, *identity: int) -> int:
    """Return a random integer of 64 bits that depends only on what is drawn."""
    return int.from_bytes(_digest(seed, kind, *identity)[:8], "little")


def permuted(place: int, size: int, key: int) -> int:
    """Return the value at `place` of the permutation of `range(size)` that a key chooses.

    No array is made: a Feistel network permutes the next power of two, and values outside of the
    range are permuted again (cycle walking), less than once on average from nine values up.

    Args:
        place: from 0 to `size - 1`.
        key: 64 random bits (`word`).
    """
    num_bits = max((size - 1).bit_length(), 4)  # networks on fewer bits are visibly uneven
    keys = []
    for _ in range(_ROUNDS):
        # a step of a congruential generator
        key = (key * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & _WORD
        keys.append(key)
    while True:
        num_left = num_bits >> 1
        num_right = num_bits - num_left
        left, right = place >> num_right, place & (1 << num_right) - 1
        for key in keys:
            mixed = (key ^ right) * 0x9E3779B97F4A7C15 & _WORD
            mixed = (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9 & _WORD
            left, right = right, left ^ mixed >> 64 - num_left
            num_left, num_right = num_right, num_left
        place = left << num_right | right
        if place < size:
            return place


def _digest(seed: int, kind: str, *identity: int) -> bytes:
    words = [i & _WORD for i in (seed, _KINDS[kind], *identity)]
    return hashlib.blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=24).digest()


class _Start(ISeedSequence):
    """Hands the 24 bytes of a hash to SFC64 as its first state."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.frombuffer(self._digest, dtype, n_words)
