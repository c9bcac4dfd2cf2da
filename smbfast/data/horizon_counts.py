"""Counts which horizons the records of shards cover, and chooses those of horizons=auto.

Legend: B buckets, H horizons, S timelines, L lines.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from smbfast.batch import UNKNOWN
from smbfast.data.horizons import (
    LEAST_SHARE,
    MOST,
    STANDARD,
    Horizons,
    PairCounts,
    usable,
)
from smbfast.data.sections import SECTIONS
from smbfast.data.shards import Block, Shard

_DEATH = SECTIONS.index("death")
_BUCKETS = 1 << 16  # that are counted together: our choice


def candidates(bucket: int, censored: str) -> Horizons:
    """Return the standard horizons that are no shorter than a bucket."""
    every = Horizons(STANDARD, bucket, censored)
    fits = (name for name, span in zip(STANDARD, every.spans_H, strict=True) if span >= bucket)
    return replace(every, names=tuple(fits))


def chosen(counted: Horizons) -> Horizons:
    """Return the longest horizons with enough usable pairs.

    Args:
        counted: candidates with their shares.

    Raises:
        ValueError: none has.
    """
    shares = counted.shares
    assert shares is not None
    least = LEAST_SHARE * shares.num_positions
    places = [h for h, num in enumerate(shares.num_usable) if num and num >= least][-MOST:]
    if not places:
        raise ValueError(
            f"objective.horizons=auto needs a horizon of which at least {LEAST_SHARE:.0%} of the "
            f"positions are followed up; {counted.text}. Name shorter ones (objective.horizons), "
            "name the codes that end a record (data.terminal), or take objective.censored=none"
        )
    columns = shares.num_usable, shares.num_deaths, shares.num_deaths_usable
    taken = (tuple(column[h] for h in places) for column in columns)
    own = PairCounts(shares.num_positions, *taken)
    return replace(counted, names=tuple(counted.names[h] for h in places), shares=own)


def counted_pairs(shards: Iterable[Shard], horizons: Horizons) -> PairCounts:
    """Count the pairs of all bucket ends before a terminal event, in bounded memory."""
    num_positions, sums_3H = 0, np.zeros((3, len(horizons)), np.int64)
    for shard in shards:
        for block in shard.blocks():
            num, own_3H = _of_block(block, horizons)
            num_positions, sums_3H = num_positions + num, sums_3H + own_3H
    return PairCounts(num_positions, *(tuple(row) for row in sums_3H.tolist()))


def _of_block(block: Block, horizons: Horizons) -> tuple[int, np.ndarray]:
    """Return positions, and pairs that are usable, with a death, and both, int64 [3, H]."""
    time_B, num_buckets_S = block.columns["bucket_time_B"], block.num_S3[:, 1]
    last_B, terminal_B, death_B = (
        np.repeat(column_S, num_buckets_S)
        for column_S in (*block.about_S5.T[3:], _death_times(block))
    )
    whole = replace(horizons, censored="none")
    num_positions, sums_3H = 0, np.zeros((3, len(horizons)), np.int64)
    for first in range(0, len(time_B), _BUCKETS):
        own = slice(first, first + _BUCKETS)
        time, ends = time_B[own], (last_B[own], terminal_B[own])
        before_B = usable(time, *ends, whole)[:, 0]
        usable_BH = usable(time, *ends, horizons)
        death = death_B[own, None]
        dies_BH = (time[:, None] < death) & (death <= time[:, None] + horizons.spans_H)
        dies_BH &= before_B[:, None]  # UNKNOWN is before all times
        num_positions += int(before_B.sum())
        sums_3H += [m.sum(0) for m in (usable_BH, dies_BH, dies_BH & usable_BH)]
    return num_positions, sums_3H


def _death_times(block: Block) -> np.ndarray:
    """Return when the bucket of each timeline's first death begins, int64 [S], UNKNOWN without."""
    death_S = np.full(len(block.end_S3), UNKNOWN)
    line = np.flatnonzero(block.columns["line_section_L"] == _DEATH)[::-1]  # the first is last
    owner = block.end_S3[:, 2].searchsorted(line, side="right")
    offset_S, num_buckets_S = block.start_S3[:, 0], block.num_S3[:, 1]
    end_B = block.columns["bucket_end_B"] + np.repeat(offset_S, num_buckets_S)
    token = block.columns["line_start_L"][line] + offset_S[owner]
    death_S[owner] = block.columns["bucket_time_B"][end_B.searchsorted(token, side="right")]
    return death_S
