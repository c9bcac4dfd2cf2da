"""The list of mutants does not rot: each can be made, and names tests that exist.

That each is caught is what `python tests/mutants.py` says, which runs outside pytest.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable
from functools import cache

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant

TESTS = sorted({test for mutant in MUTANTS for test in mutant.tests})
each = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@each
def test_its_old_text_occurs_once_and_what_it_makes_can_be_read(mutant: Mutant) -> None:
    mutants.require_made(mutant)


@each
def test_its_tests_are_functions_of_their_files(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file), test


@cache
def functions(file: str) -> set[str]:
    """The functions of a file of tests."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
def test_every_test_that_is_named_is_collected(request: pytest.FixtureRequest) -> None:
    """With its parameters, which the functions of a file do not show, or with all there are.

    This run has collected all of them where it is of all tests; of what is left a process is asked.
    """
    left = sorted(set(TESTS) - both_ways(item.nodeid for item in request.session.items))
    if left:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *mutants.ALONE, *left]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert set(left) <= both_ways(shown.stdout.splitlines())


def both_ways(collected: Iterable[str]) -> set[str]:
    """Names with their parameters, and without."""
    return {form for name in collected for form in (name, name.partition("[")[0])}


def test_the_list_is_long_enough_and_its_names_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_a_mutant_is_caught_survives_or_is_not_made(tmp_path, monkeypatch) -> None:
    """And its file is put back, whatever its tests say."""
    file = tmp_path / "sum.py"
    file.write_text("total = 1 + 1\n")
    one = Mutant("one", "", "sum.py", "1 + 1", "1 - 1", ("test_sum.py",))
    failed = "FAILED test_sum.py - assert 0 == 2"
    for code, outcome in (
        (1, "caught: assert 0 == 2"),
        (0, "SURVIVED"),
        (4, f"NOT RUN: exit code 4 of pytest\n{failed}"),
    ):
        seen = []

        def run_tests(tree, tests, cache, seen=seen, code=code):
            seen.append(((tree / "sum.py").read_text(), tests, cache))
            return code, failed

        monkeypatch.setattr(mutants, "run_tests", run_tests)
        assert mutants.try_mutant(one, tmp_path) == outcome
        assert seen == [("total = 1 - 1\n", ["test_sum.py"], None)]
        assert file.read_text() == "total = 1 + 1\n"
    file.write_text("total = 2\n")
    assert mutants.try_mutant(one, tmp_path) == "NOT MADE: its old text occurs 0 times"


def test_tests_that_run_together_have_time_for_each(tmp_path, monkeypatch) -> None:
    """Those of all mutants take longer than those of one may."""
    tests = [f"test_sum.py::test_{i}" for i in range(100)]
    seen = []

    def run_tests(tree, tests, cache=None, limit=mutants.LIMIT):
        seen.append((tree, len(tests), limit))
        return 0, "100 passed"

    monkeypatch.setattr(mutants, "run_tests", run_tests)
    mutants.check_unmutated([Mutant(t, "", "", "", "", (t,)) for t in tests], tmp_path)
    assert seen == [(tmp_path, 100, mutants.LIMIT + 100 * mutants.EACH)]
