"""The table of how codes became tokens; nothing in it is said of fewer than ten subjects."""

from dataclasses import asdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data.codes import CodeStatistics, CodeVocabulary, summary
from smbfast.data.codes.explain import explain, explain_text, text_summary
from smbfast.data.codes.ladder import RUNGS
from smbfast.data.codes.summary import RARE
from smbfast.data.sections import SectionMap, family
from tests.data.event_tables import Event, batch_of, event

MAP = SectionMap.read()
COUNTS = {"events": 1000, "tokens": 1250, "numbers_without_bin": 20, "texts_without_token": 0}
COHORT: list[list[Event]] = [
    [
        event(0, "LAB//n", float(n)),
        event(1, "LAB//n", float(n)),
        event(2, "DRUG//x" if n < 12 else "DRUG//rare"),
        event(3, f"DIAGNOSIS//{n}"),
        event(4, f"THE_FAMILY_WHOSE_NAME_IS_LONGER_THAN_ALL//{n % 2}"),
    ]
    for n in range(15)
]
TABLE = """\
family section codes tokens bins events ancestor prefix family section
LAB measurements 1 2 1 40.0% - - - -
DIAGNOSIS conditions 15 1 0 20.0% - - 100.0% -
DRUG drugs 2 2 0 20.0% - - - *
THE_FAMILY_WHOSE_NAME_… observations 2 1 0 20.0% - - 100.0% -
total 20 1 100.0% - - 40.0% -"""


def counted(*cohort: list[Event]) -> CodeStatistics:
    statistics = CodeStatistics()
    statistics.add(batch_of(*cohort))
    return statistics


def rows_of(statistics: CodeStatistics) -> list[dict[str, Any]]:
    vocabulary = CodeVocabulary.fit(statistics, MAP, {}, {})
    return [asdict(row) for row in summary(vocabulary, statistics)]


def text_rows_of(statistics: CodeStatistics) -> list[dict[str, Any]]:
    return [asdict(row) for row in text_summary(statistics, MAP, {})]


def test_the_table_of_a_vocabulary() -> None:
    lines = explain(rows_of(counted(*COHORT)), COUNTS)
    assert all(len(line) <= 100 for line in lines)
    table = [" ".join(line.split()) for line in lines]
    assert table[:6] == TABLE.splitlines()
    assert lines[-4:] == [
        "    2.0% have a number whose code has no bins",
        "       - have a text that has no token",
        "       - have a text beside a number, which is kept",
        "1.25 tokens an event, with gaps and ages",
    ]


def test_families_of_few_are_one_row_where_ten_stand_behind_it() -> None:
    """Five subjects have a family each and six have another: together eleven."""
    few = [[event(0, "ODD_A//x" if n < 5 else "ODD_B//x")] for n in range(11)]
    for cohort, shown in (([*COHORT, *few], True), ([*COHORT, *few[:9]], False)):
        lines = explain(rows_of(counted(*cohort)), COUNTS)
        assert not any("ODD" in line for line in lines)
        assert any(line.startswith("(rare)") for line in lines) == shown
        total = next(line for line in lines if line.startswith("total"))
        assert total.split()[3] == "100.0%"


def test_the_table_of_a_text_format() -> None:
    lines = explain_text(text_rows_of(counted(*COHORT)), COUNTS)
    assert all(len(line) <= 100 for line in lines)
    assert [line.split() for line in lines[:6]] == [
        ["family", "section", "codes", "events", "unmapped"],
        ["LAB", "measurements", "1", "40.0%", "-"],
        ["DIAGNOSIS", "conditions", "15", "20.0%", "-"],
        ["DRUG", "drugs", "2", "20.0%", "-"],
        ["THE_FAMILY_WHOSE_NAME_…", "observations", "2", "20.0%", "100.0%"],
        ["total", "20", "100.0%", "20.0%"],
    ]


def test_the_complement_of_a_share_that_few_stand_behind_is_not_told() -> None:
    """Three subjects have codes of a family that a parent's rule maps to the fallback's section."""
    cohort = [[event(0, f"ODD//{n}"), event(1, "ODD//x")] for n in range(20)]
    for few, cells in ((3, ["100.0%", "*"]), (12, ["100.0%", "70.0%"])):
        rows = text_summary(counted(*cohort), MAP, {f"ODD//{n}": ["EXAM"] for n in range(few)})
        lines = explain_text([asdict(row) for row in rows], COUNTS)
        assert lines[1].split() == ["ODD", "observations", "21", *cells]
        assert lines[2].split() == ["total", "21", "100.0%", cells[1].replace("*", "-")]


codes = ("LAB//a", "LAB//b", "DRUG//a", "DRUG//b|c", "ODD//a", "ODD//b|c", "DIAGNOSIS//a")
cohorts = st.lists(
    st.lists(st.sampled_from(codes).map(lambda code: event(0, code)), min_size=1, max_size=4),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts)
def test_a_cell_is_shown_where_ten_subjects_stand_behind_it(cohort: list[list[Event]]) -> None:
    """Beside a plain count of subjects by row and rung."""
    statistics = counted(*cohort)
    vocabulary = CodeVocabulary.fit(statistics, MAP, {}, {})
    rows = rows_of(statistics)
    named = {row["family"] for row in rows}
    for row in rows:
        own = [
            {e[1] for e in events if row["family"] == (f if (f := family(e[1])) in named else RARE)}
            for events in cohort
        ]
        behind = {
            rung: sum(any(vocabulary.code_place(c)[2] == r for c in codes) for codes in own)
            for r, rung in enumerate(RUNGS)
        }
        behind["events"] = sum(map(bool, own))
        assert row["few"] == [name for name, num in behind.items() if 0 < num < 10]
        first = explain([row], COUNTS)[1].split()
        if "events" in row["few"]:
            assert first[0] == "total" and "%" not in "".join(first)
        else:
            stars = [name for name, cell in zip(RUNGS[1:], first[-4:], strict=True) if cell == "*"]
            assert first[0] == row["family"]
            assert stars == [name for name in row["few"] if name != "own"]
