"""The tokens that are not fitted: pad, begin, gaps between moments, ages, sections.

They are the same in every vocabulary, in this order.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from smbfast.data.sections import SECTIONS

Kind = Literal["structure", "gap", "age", "section", "code", "bin", "value"]

_SECOND = 1_000_000
_UNITS = {
    "minute": 60 * _SECOND,
    "hour": 3_600 * _SECOND,
    "day": 86_400 * _SECOND,
    "week": 7 * 86_400 * _SECOND,
    "month": 2_629_800 * _SECOND,  # a twelfth of 365.25 days
    "year": 31_557_600 * _SECOND,
}
_GAPS = (
    *((n, "minute") for n in (5, 15)),
    *((n, "hour") for n in (1, 2, 3, 6, 12)),
    *((n, "day") for n in (1, 2, 3)),
    *((n, "week") for n in (1, 2)),
    *((n, "month") for n in (1, 2, 3, 6)),
    *((n, "year") for n in (1, 2, 5)),
)
GAP_EDGES = np.array([n * _UNITS[unit] for n, unit in _GAPS], np.int64)  # microseconds
MAX_AGE = 120  # whole years


@dataclass(frozen=True)
class CodeToken:
    """One token of the vocabulary."""

    name: str  # unique
    text: str  # plain words: a pretrained embedding row starts from them
    kind: Kind
    section: int  # index into SECTIONS
    bin: int | None = None
    num_bins: int | None = None


def fixed_alphabet() -> list[CodeToken]:
    """Return pad, begin, one token per gap, per age 0..120 and per section."""
    demographics = SECTIONS.index("demographics")
    tokens = [
        CodeToken("<pad>", "padding", "structure", demographics),
        CodeToken("<begin>", "the record begins", "structure", demographics),
    ]
    for n, unit in _GAPS:
        words = f"{n} {unit}{'s' if n > 1 else ''} later"
        tokens.append(CodeToken(f"<{words}>", words, "gap", demographics))
    for age in range(MAX_AGE + 1):
        tokens.append(CodeToken(f"<age {age}>", f"age {age}", "age", demographics))
    for i, section in enumerate(SECTIONS):
        tokens.append(CodeToken(f"<{section}>", section, "section", i))
    return tokens


PAD, BEGIN = 0, 1  # places in the alphabet
FIRST_GAP = 2
FIRST_AGE = FIRST_GAP + len(_GAPS)
FIRST_SECTION = FIRST_AGE + MAX_AGE + 1
NUM_FIXED = FIRST_SECTION + len(SECTIONS)
