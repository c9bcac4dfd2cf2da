"""The scorecard does not rot: its rows have bars and mistakes that can be made.

That each row holds is what `python -m tests.reliability` says, which CI runs beside pytest.
"""

import json
import re
import signal
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from tests.mutants import DEFECTS, ROOT, Mutant, require_made
from tests.reliability import card, running
from tests.reliability.__main__ import RECORD, listed
from tests.reliability.__main__ import _outcome as outcome
from tests.reliability.jobs import Death, Ended
from tests.reliability.proof import MUTANT, SIZES, Proof, Row, Work, from_tests
from tests.reliability.rows import ranks
from tests.reliability.running import Task

ROWS = card.rows()
MUTANTS = [mutant for row in ROWS for mutant in row.mutants]


def test_each_row_has_a_bar_and_mistakes() -> None:
    for row in ROWS:
        assert row.mutants, row.id
        assert row.least("push") >= 1 and row.bar.keys() <= set(SIZES), row.id
        assert len(row.property) > 20 and callable(row.prove), row.id


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_can_be_made(mutant: Mutant) -> None:
    require_made(mutant)


def test_the_page_has_the_rows_as_they_are() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert listed(ROWS) in page, "run `python -m tests.reliability --list` and put it there"
    named = {name for words in re.findall(r"--row=([\w,]+)", page) for name in words.split(",")}
    assert named <= {row.id for row in ROWS}


def test_what_was_wrong_once_is_brought_back_by_mistakes_that_are_there() -> None:
    _, _, table = (ROOT / "docs" / "reliability.md").read_text().partition("## What was wrong once")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows if len(row) != 3] == [], "say what brings it back"
    defects = {mutant.name for mutant in DEFECTS}
    brought_back = set()
    for happened, held, by in rows:
        assert re.search(r"\brows? |::test_", held), happened
        names = re.findall(r"`([^`]+)`", by)
        assert names, happened
        for name in names:
            those = [m for m in (*DEFECTS, *MUTANTS) if fnmatchcase(m.name, name)]
            assert those, name
            brought_back |= {mutant.name for mutant in those}
            caught_by = {test.partition("[")[0] for mutant in those for test in mutant.tests}
            assert all(f"`{test}`" in held for test in caught_by), (name, caught_by)
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held):
            assert f"\ndef {test}(" in (ROOT / file).read_text(), test
    assert len(rows) > 20 and defects <= brought_back, defects - brought_back


def test_what_is_recorded_is_of_rows_that_are_there() -> None:
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    by_id = {row.id: row for row in ROWS}
    assert recorded.keys() <= by_id.keys()
    for name, record in recorded.items():
        assert set(record["caught"]) <= {m.name for m in by_id[name].mutants}, name


@pytest.mark.parametrize(
    ("proof", "holds", "caught"),
    [
        (Proof(5, "trials"), True, False),
        (Proof(4, "trials"), False, False),  # fewer than the bar
        (Proof(5, "trials", ["one broke it"]), False, True),
        (None, False, False),  # it raised, which is no finding
    ],
)
def test_a_row_holds_where_enough_trials_broke_nothing(proof, holds, caught) -> None:
    row = Row("X", "A property.", {"push": 5, "recorded": 50}, lambda work: proof, ())
    task = Task(row, "push", proof=proof)
    assert (task.holds, task.caught) == (holds, caught)
    assert [row.least(size) for size in SIZES] == [5, 5, 50]


def test_a_mistake_is_not_seen_by_waiting(tmp_path, monkeypatch) -> None:
    """A proof that came to its limit breaks its row, and shows nothing of a mistake."""
    mistake, limit = MUTANTS[0], {"push": 0, MUTANT: 0}
    row = Row("X", "A property.", {"push": 1}, lambda work: None, (mistake,), limit)
    tasks = [Task(row, "push"), Task(row, MUTANT, mistake)]
    monkeypatch.setattr(running, "_be_child", lambda *_: signal.pause())
    monkeypatch.setattr(running.Runner, "_mutated", lambda *_: tmp_path)
    monkeypatch.setattr(running, "_restore", lambda *_: None)
    for task in running.Runner(1, 0, tmp_path).run(list(tasks)):
        assert task.proof is not None and "no end after" in task.proof.bad[0]
        assert not task.holds and not task.caught
    assert outcome(tasks[1]).startswith(f"X {mistake.name}: NOT CAUGHT: no end after 0 s")


@pytest.mark.parametrize("code", [2, 4, 5])
def test_tests_that_cannot_be_run_show_nothing(monkeypatch, code) -> None:
    """As where a mistake keeps their file from being imported: none of them has failed."""
    monkeypatch.setattr(pytest, "main", lambda *_, **_more: code)
    with pytest.raises(RuntimeError, match=f"pytest ended with {code} and has not run tests/a.py"):
        from_tests("tests/a.py")


@pytest.mark.parametrize(
    "death", [Death(0, "end", 1, "launcher"), Death(0, "report", 1, "pause", 30.0)], ids=str
)
def test_a_job_in_which_nobody_died_shows_nothing(death) -> None:
    ended = Ended({0: 0, 1: 0}, {0: "", 1: ""}, {"0": 0, "1": 0})
    assert ranks._wrong(death, ended, {"state": "done"}) == [
        "the moment never came, or nothing was done then"
    ]
    assert ranks._wrong(death, replace(ended, seconds=31.0), {"state": "done"}) == []


def test_a_proof_has_the_trials_of_its_size(tmp_path) -> None:
    chosen = {
        size: Work(size, tmp_path).pick(push=1, recorded=3, mutant=7) for size in (*SIZES, MUTANT)
    }
    assert chosen == {"push": 1, "nightly": 3, "recorded": 3, MUTANT: 7}
    assert Work(MUTANT, tmp_path).pick(push=1, nightly=2) == 1
    enough = [(size, bad) for size in (*SIZES, MUTANT) for bad in ([], [None], [None, "broke"])]
    enough = [pair for pair in enough if Work(pair[0], tmp_path).has_enough(pair[1])]
    assert enough == [(MUTANT, [None, "broke"])], "else every trial is made"
