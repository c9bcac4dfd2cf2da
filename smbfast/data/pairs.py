"""Positions of a window, and what its record holds within each horizon behind them.

Positions are drawn by identity (seed, step, subject, window), never by who draws or when. Which
pairs of position and horizon are known is the matter of `smbfast.data.horizons`.

Legend: B buckets of the window, H horizons, K classes, Y pairs of a horizon and a class, N
positions, P pairs, L lines of the record from the window on, Z codes that come.
"""

from collections.abc import Sequence

import numpy as np

from smbfast.batch import Timeline, WindowPairs
from smbfast.data.draws import FIXED, generator
from smbfast.data.horizons import Horizons, usable


def window_pairs(
    window: Timeline,
    horizons: Horizons,
    *,
    positions: int,
    seed: int,
    step: int,
    latent: bool,
    codes: bool,
) -> WindowPairs:
    """Draw at most `positions` positions of a window, with all their known horizons.

    A bucket that goes on in the next window has no end here, so it is no position.

    Args:
        window: with what its record holds ahead (`Timeline.ahead`).
        latent: whether the pairs that have tokens of the window are wanted (horizon JEPA).
        codes: whether all known pairs are wanted, with the codes that come.
    """
    assert window.ahead is not None
    known_BH, end_BH = known_pairs(window, horizons)
    if not codes:
        known_BH &= has_token(window, end_BH)
    place_N = np.flatnonzero(known_BH.any(1))
    if len(place_N) > positions:
        random = generator(seed, "position", step, window.subject, window.start)
        place_N = np.sort(random.permutation(place_N)[:positions])
    position_P, horizon_P = np.nonzero(known_BH[place_N])
    token_N = window.bucket_end_B[place_N].astype(np.int64) - 1
    end_P = end_BH[place_N[position_P], horizon_P]
    if not latent:
        end_P = token_N[position_P] + 1
    none = np.empty(0, np.int64)
    pair_Z, class_Z = none, none
    if codes:
        time_P = window.bucket_time_B[place_N[position_P]]
        pair_Z, class_Z = _codes_ahead(window, time_P, time_P + horizons.spans_H[horizon_P])
    return WindowPairs(token_N, position_P, horizon_P, end_P, pair_Z, class_Z)


def prevalence(
    windows: Sequence[Timeline], horizons: Horizons, num_classes: int, *, positions: int, seed: int
) -> np.ndarray:
    """Return the share of pairs of each horizon in which each class occurs, float64 [H, K].

    It is counted at the positions of some windows, and is above 0 and below 1: (k + 0.5) / (n + 1).
    """
    num_H1, num_Y = np.zeros((len(horizons), 1)), np.zeros(len(horizons) * num_classes, np.int64)
    for window in windows:
        own = window_pairs(
            window, horizons, positions=positions, seed=seed, step=FIXED, latent=False, codes=True
        )
        num_H1[:, 0] += np.bincount(own.horizon_P, minlength=len(horizons))
        place_Z = own.horizon_P[own.pair_Z] * num_classes + own.class_Z
        num_Y += np.bincount(place_Z, minlength=len(num_Y))
    num_HK = num_Y.reshape(len(horizons), num_classes)
    return (num_HK + 0.5) / (num_H1 + 1)


def known_pairs(window: Timeline, horizons: Horizons) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs are known, bool [B, H], and the token after the last one of the window in
    each horizon, int64 [B, H]."""
    ahead, time_B = window.ahead, window.bucket_time_B
    assert ahead is not None
    known_BH = usable(time_B, ahead.last, ahead.terminal, horizons)
    if window.goes_on:
        known_BH[-1] = False
    past_BH = time_B.searchsorted(time_B[:, None] + horizons.spans_H, side="right")
    return known_BH, window.bucket_end_B[past_BH - 1].astype(np.int64)


def has_token(window: Timeline, end_BH: np.ndarray) -> np.ndarray:
    """Return for which pairs the window has a token in the horizon, bool [B, H]."""
    return end_BH > window.bucket_end_B[:, None]


def _codes_ahead(
    window: Timeline, after_P: np.ndarray, until_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each class that occurs after one time and until another, once: its pair, its number.

    A line counts if its class has not occurred between the pair's first line and itself.
    """
    assert window.ahead is not None
    time_L, class_L = window.ahead.time_L, window.ahead.class_L
    first_P = time_L.searchsorted(after_P, side="right").tolist()
    end_P = time_L.searchsorted(until_P, side="right").tolist()
    order_L = np.argsort(class_L, kind="stable")
    before_L = np.full(len(class_L), -1)  # the line before this one with the same class
    same = class_L[order_L][1:] == class_L[order_L][:-1]
    before_L[order_L[1:][same]] = order_L[:-1][same]
    # pair by pair: a long record has far more lines than any one horizon
    spans = zip(first_P, end_P, strict=True)
    lines = [first + np.flatnonzero(before_L[first:end] < first) for first, end in spans]
    pair_Z = np.repeat(np.arange(len(lines)), [len(own) for own in lines])
    line_Z = np.concatenate([np.empty(0, np.int64), *lines])
    return pair_Z, class_L[line_Z].astype(np.int64)
