"""What became of each family of codes; a family of fewer than ten subjects is not named."""

from collections import Counter
from dataclasses import dataclass, field

from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.codes.ladder import RUNGS
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.sections import SECTIONS, family

RARE = "(rare)"


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


def summary(vocabulary: CodeVocabulary, statistics: CodeStatistics) -> list[FamilySummary]:
    """Return a row per family and section, most events first; `(rare)` is last."""
    statistics.settle()
    table = statistics.codes
    names = list(statistics.code_ids)
    few = table.few(0, len(table.key_K)) if len(table.key_K) else []
    groups: dict[tuple[str, int], list[tuple[str, int]]] = {}
    subjects: dict[tuple[str, int], set[int]] = {}
    large = set()
    for c, sums_M, ids in zip(table.key_K.tolist(), table.sum_KM.tolist(), few, strict=True):
        code = names[c]
        key = (family(code), vocabulary.code_place(code)[1])
        groups.setdefault(key, []).append((code, sums_M[1]))
        have = subjects.setdefault(key, set())
        have.update(ids)
        if sums_M[0] >= MIN_SUBJECTS or len(have) >= MIN_SUBJECTS:
            large.add(key)
    pooled = [row for key in sorted(groups) if key not in large for row in groups[key]]
    rows = [
        _summed(vocabulary, FamilySummary(key[0], SECTIONS[key[1]]), groups[key])
        for key in sorted(large)
    ]
    rows.sort(key=lambda row: (-row.events, row.family, row.section))
    return rows + ([_summed(vocabulary, FamilySummary(RARE, ""), pooled)] if pooled else [])


def _summed(
    vocabulary: CodeVocabulary, row: FamilySummary, codes: list[tuple[str, int]]
) -> FamilySummary:
    rungs: Counter[str] = Counter()
    tokens = set()
    for code, events in codes:
        place, _, rung = vocabulary.code_place(code)
        rungs[RUNGS[rung]] += events
        own, bins = vocabulary.own_tokens(code)
        tokens |= {place, *own}
        row.bins += bins
        row.events += events
    row.codes, row.tokens = len(codes), len(tokens)
    row.rungs = {name: rungs[name] for name in RUNGS}
    return row
