"""What became of each family of codes; a family of fewer than ten subjects is not named."""

from dataclasses import dataclass, field
from typing import Protocol

from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.codes.ladder import RUNGS, ten_subjects
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.sections import SECTIONS, family

RARE = "(rare)"


EVENTS = "events"


@dataclass
class FamilySummary:
    """Codes of one family (of one section) in the training split."""

    family: str
    section: str  # empty for those pooled as rare
    codes: int = 0
    tokens: int = 0  # own tokens of codes, bins and values, and shared ones that events go to
    bins: int = 0
    events: int = 0
    rungs: dict[str, int] = field(default_factory=dict)  # events by rung of the ladder
    # of these, what fewer than ten subjects stand behind, and EVENTS if that is the whole row:
    # not to be shown
    few: list[str] = field(default_factory=list)


class Places(Protocol):
    """What becomes of a code; a `CodeVocabulary` tells it, and so do the rules of a text format."""

    def code_place(self, code: str) -> tuple[int, int, int]:
        """Return (place of its token, section, rung) of a code."""

    def own_tokens(self, code: str) -> tuple[range, int]:
        """Return the places of a code's own tokens and how many of them are bins."""


Counted = tuple[str, int, list[int] | None]  # code, events, subjects (None: ten or more)


def summary(vocabulary: Places, statistics: CodeStatistics) -> list[FamilySummary]:
    """Return a row per family and section, most events first; `(rare)` is last."""
    statistics.settle()
    table = statistics.codes
    names = list(statistics.code_ids)
    few = table.few(0, len(table.key_K)) if len(table.key_K) else []
    groups: dict[tuple[str, int], list[Counted]] = {}
    for c, sums_M, ids in zip(table.key_K.tolist(), table.sum_KM.tolist(), few, strict=True):
        code = names[c]
        key = (family(code), vocabulary.code_place(code)[1])
        subjects = None if sums_M[0] >= MIN_SUBJECTS else ids
        groups.setdefault(key, []).append((code, sums_M[1], subjects))
    large = {key for key, rows in groups.items() if ten_subjects(row[2] for row in rows)}
    pooled = [row for key in sorted(groups) if key not in large for row in groups[key]]
    rows = [
        _summed(vocabulary, FamilySummary(key[0], SECTIONS[key[1]]), groups[key])
        for key in sorted(large)
    ]
    rows.sort(key=lambda row: (-row.events, row.family, row.section))
    return rows + ([_summed(vocabulary, FamilySummary(RARE, ""), pooled)] if pooled else [])


def _summed(vocabulary: Places, row: FamilySummary, codes: list[Counted]) -> FamilySummary:
    rungs: dict[str, list[Counted]] = {name: [] for name in RUNGS}
    tokens = set()
    for counted in codes:
        place, _, rung = vocabulary.code_place(counted[0])
        rungs[RUNGS[rung]].append(counted)
        own, bins = vocabulary.own_tokens(counted[0])
        tokens |= {place, *own}
        row.bins += bins
    row.codes, row.tokens = len(codes), len(tokens)
    row.rungs = {name: sum(c[1] for c in rungs[name]) for name in RUNGS}
    row.events = sum(row.rungs.values())
    row.few = [
        name for name in RUNGS if rungs[name] and not ten_subjects(c[2] for c in rungs[name])
    ]
    if not ten_subjects(c[2] for c in codes):
        row.few.append(EVENTS)
    return row
