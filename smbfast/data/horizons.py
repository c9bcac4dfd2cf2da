"""Horizons of time behind a position of a record, and which of them its follow-up covers.

A position is the end of a bucket (in the format `codes`, of a moment). Its horizon H is the time
(t, t + H] behind it, of which whole buckets count (design of ours, after the time horizons of
MOTOR, arXiv 2301.03150).

Legend: B buckets, H horizons.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from smbfast.base.counts import share
from smbfast.batch import UNKNOWN
from smbfast.settings.model import hours_of

STANDARD = ("6h", "1d", "3d", "7d", "30d", "180d", "365d", "1095d")
MOST = 4  # that `auto` takes
LEAST_SHARE = 0.2  # of the pairs of a horizon that must be usable for `auto` to take it
_HOUR = 3_600_000_000  # microseconds


@dataclass(frozen=True)
class PairCounts:
    """Pairs of a position before a terminal event and a horizon, by horizon."""

    num_positions: int
    num_usable: tuple[int, ...]
    num_deaths: tuple[int, ...]  # pairs with a death within the horizon, by the section of its code
    num_deaths_usable: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """Return its fields, for JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "PairCounts":
        """Read the result of `record`, as JSON gives it back.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        tuples = (tuple(map(int, record[f.name])) for f in fields(cls)[1:])
        return cls(int(record["num_positions"]), *tuples)


@dataclass(frozen=True)
class Horizons:
    """The horizons of a run and what decides where they are known."""

    names: tuple[str, ...]  # such as 30d, ascending
    bucket: int = 0  # length of a bucket in microseconds; 0 where a bucket is a moment
    censored: str = "drop"  # `objective.censored`
    shares: PairCounts | None = field(default=None, compare=False)  # in the train split

    def __len__(self) -> int:
        return len(self.names)

    @property
    def spans_H(self) -> np.ndarray:
        """Their lengths, int64 microseconds."""
        return np.array([hours_of(name) * _HOUR for name in self.names], np.int64)

    @property
    def text(self) -> str:
        """The horizons and what of them is known in the train split, in words."""
        counts = self.shares
        if counts is None:
            return ", ".join(self.names)
        known = (share(num, counts.num_positions) for num in counts.num_usable)
        shown = ", ".join(f"{name} {part}" for name, part in zip(self.names, known, strict=True))
        if not any(counts.num_deaths):
            return f"{shown} of positions known"
        pairs = zip(counts.num_deaths_usable, counts.num_deaths, strict=True)
        dying = ", ".join(share(num, of) if of else "-" for num, of in pairs)
        return f"{shown} of positions known; with a death inside {dying}"

    @property
    def longest(self) -> int:
        """The length of the longest, in microseconds."""
        return int(self.spans_H[-1])


def usable(
    time_B: np.ndarray, last: np.ndarray | int, terminal: np.ndarray | int, horizons: Horizons
) -> np.ndarray:
    """Return for which horizons it is known what follows a bucket: bool [B, H].

    The time t of a position is the last microsecond of its bucket. A pair is usable if the record
    goes on to t + H, or has a terminal event, behind which nothing is to come; with
    `censored="none"` every pair is. At or after a terminal event none is.

    Args:
        time_B: when each bucket begins, int64 microseconds since 1970.
        last: the time of the last event of its record, int64 [B] or one for all.
        terminal: the time of the first terminal event, UNKNOWN where there is none; likewise.
    """
    at_B = time_B + max(horizons.bucket - 1, 0)
    ends, known = np.asarray(terminal), np.asarray(terminal) != UNKNOWN
    followed_BH = at_B[:, None] + horizons.spans_H <= np.asarray(last)[..., None]
    if horizons.censored == "none":
        followed_BH = np.ones_like(followed_BH)
    before_B = np.where(known, at_B < ends, True)
    return (followed_BH | known[..., None]) & before_B[:, None]
