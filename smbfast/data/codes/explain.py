"""How codes become tokens, as a table to read.

Nothing in it is said of fewer than ten training subjects: families of fewer are one row, `(rare)`,
which is left out if the row itself has fewer, and cells of fewer are a star. A cell of codes that
have tokens of their own is not shown, and totals are of what is shown, so that no star can be found
by subtraction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smbfast.data.clean import clean
from smbfast.data.codes.ladder import OWN, RUNGS, SECTION
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.codes.summary import EVENTS, FamilySummary, summary
from smbfast.data.codes.vocabulary import (
    NUMBERS_WITHOUT_BIN,
    TEXTS_DROPPED,
    TEXTS_WITHOUT_TOKEN,
)
from smbfast.data.sections import SectionMap

_FALLEN = RUNGS[OWN + 1 :]  # where events go whose code has no token of its own
_FAMILY_WIDTH = 23  # which makes the wider table 100 columns
_STAR = "*: fewer than ten subjects, in no total"


def explain(families: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> list[str]:
    """Return the table of a vocabulary of codes, lines of at most 100 columns.

    Args:
        families: `FamilySummary` rows as dicts, of the train split.
        counts: of all prepared splits, as `CodeSerializer.counts`, with `tokens`.
    """
    head = [("codes", 7), ("tokens", 7), ("bins", 6), ("events", 8)]
    head += [(name, 9) for name in _FALLEN]
    rows, total = _shown(families)
    cells = []
    for row in [*rows, total]:
        numbers = [f"{row[name]:,}" for name in ("codes", "tokens", "bins")]
        if row is total:
            numbers[1] = ""  # families may share a token
        cells.append([*numbers, _share(row["events"], total["events"]), *_fallen(row, _FALLEN)])
    events = max(counts.get("events", 0), 1)
    lost = [
        f"  {_share(counts.get(name, 0), events):>6} {words}"
        for name, words in (
            (NUMBERS_WITHOUT_BIN, "have a number whose code has no bins"),
            (TEXTS_WITHOUT_TOKEN, "have a text that has no token"),
            (TEXTS_DROPPED, "have a text beside a number, which is kept"),
        )
    ]
    return [
        *_table(rows, head, cells),
        "",
        "events: share of all events of the train split. Behind it: share of the row's events",
        "whose code has the token of an ancestor, a prefix, its family or its section.",
        _STAR,
        "Values that are in no token, of events in all splits:",
        *lost,
        f"{counts.get('tokens', 0) / events:.2f} tokens an event, with gaps and ages",
    ]


def text_summary(
    statistics: CodeStatistics, sections: SectionMap, parents: Mapping[str, list[str]]
) -> list[FamilySummary]:
    """Return the rows of `explain_text`: what section rules make of the codes of the train split.

    `rungs["section"]` are the events that no rule maps.
    """
    rows = summary(_Rules(sections, parents), statistics)
    own, unruled = RUNGS[OWN], RUNGS[SECTION]
    for row in rows:
        # events of a text row are mapped or not, so a share of either tells the other
        if own in row.few and unruled not in row.few and row.rungs[unruled]:
            row.few.append(unruled)
    return rows


def explain_text(families: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> list[str]:
    """Return the table of a text format, lines of at most 100 columns.

    Args:
        families: rows of `text_summary` as dicts, of the train split.
        counts: of all prepared splits, as `Serializer.counts`, with `tokens`.
    """
    rows, total = _shown(families)
    cells = [
        [
            f"{row['codes']:,}",
            _share(row["events"], total["events"]),
            *_fallen(row, [RUNGS[SECTION]]),
        ]
        for row in [*rows, total]
    ]
    return [
        *_table(rows, [("codes", 7), ("events", 8), ("unmapped", 9)], cells),
        "",
        "events: share of all events of the train split. unmapped: share of the row's events whose",
        "code no rule gives a section, so that they stand in the fallback.",
        _STAR,
        f"{counts.get('tokens', 0) / max(counts.get('events', 0), 1):.2f} tokens an event",
    ]


@dataclass(frozen=True)
class _Rules:
    """The section rules of a text format, which has no tokens of codes."""

    sections: SectionMap
    parents: Mapping[str, list[str]]

    def code_place(self, code: str) -> tuple[int, int, int]:
        section, ruled = self.sections(code, self.parents.get(code))
        return 0, section, OWN if ruled else SECTION

    def own_tokens(self, code: str) -> tuple[range, int]:
        return range(0), 0


def _shown(families: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Return the rows that may be shown, and the total of what is shown of them."""
    rows = [row for row in families if EVENTS not in row["few"]]
    names = ("codes", "tokens", "bins", "events")
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in names}
    total["rungs"] = {
        name: sum(row["rungs"][name] for row in rows if name not in row["few"]) for name in RUNGS
    }
    return rows, total | {"few": []}


def _fallen(row: Mapping[str, Any], rungs: Sequence[str]) -> list[str]:
    return [
        "*" if name in row["few"] else _share(row["rungs"][name], row["events"]) for name in rungs
    ]


def _table(
    rows: Sequence[Mapping[str, Any]], head: list[tuple[str, int]], cells_of: list[list[str]]
) -> list[str]:
    """Put family and section before the columns of `head`; the last cells are the total's."""
    names = [(clean(row["family"]), row["section"]) for row in rows] + [("total", "")]
    wide = min(max(len(family) for family, _ in [*names, ("family", "")]), _FAMILY_WIDTH)

    def line(family: str, section: str, cells: list[str]) -> str:
        family = family if len(family) <= wide else family[: wide - 1] + "…"
        row = f"{family:<{wide}} {section:<12}"
        widths = [width for _, width in head]
        row += "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return row.rstrip()

    lines = [line("family", "section", [name for name, _ in head])]
    lines += [line(*name, cells) for name, cells in zip(names, cells_of, strict=True)]
    return lines


def _share(num: int, of: int) -> str:
    """Return a share in percent of one decimal; what is not zero does not look like it."""
    if not num:
        return "-"
    percent = 100 * num / of
    return "<0.1%" if percent < 0.05 else f"{percent:.1f}%"
