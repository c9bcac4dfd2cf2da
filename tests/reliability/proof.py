"""What a row of the scorecard is: a property, the trials that prove it, mistakes it must catch.

Modules of `tests.reliability.rows` import this one, and neither smbfast nor torch at their top: a
mistake is made in a copy of the tree, and the proof then imports smbfast from there.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.mutants import Mutant

SIZES = ("push", "nightly", "recorded")
MUTANT = "mutant"  # the size at which a proof runs on a mistake: just enough to see it
# seconds after which a proof is ended: it hangs, which breaks every property
LIMITS = {MUTANT: 300, "push": 300, "nightly": 3600, "recorded": 6 * 3600}
# of rows that cannot hang: on a busy machine a mistake of theirs must not be seen by waiting
PATIENT = {MUTANT: 900}

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a proof is given."""

    size: str  # one of SIZES, or MUTANT
    folder: Path  # empty, and removed afterwards
    seed: int = 0

    def pick(self, *, push: T, nightly: T | None = None, recorded: T | None = None, **more: T) -> T:
        """Return what is meant for this size.

        Args:
            push: also of a mutant, unless `mutant` is given.
            nightly: as recorded, or else as push, where it is not given.
            recorded: as nightly, or else as push, where it is not given.
            more: `mutant` alone.
        """
        large = next((v for v in (recorded, nightly) if v is not None), push)
        values = {"push": push, MUTANT: more.get(MUTANT, push), "recorded": large}
        values["nightly"] = large if nightly is None else nightly
        return values[self.size]

    def has_enough(self, bad: Sequence[str | None]) -> bool:
        """Whether the rest need not be tried: one trial that broke shows that a mistake is seen."""
        return self.size == MUTANT and any(bad)

    def say(self, text: str) -> None:
        """Print a line of progress, which `--verbose` shows."""
        print(text, flush=True)


@dataclass(frozen=True)
class Proof:
    """What came of the trials."""

    count: int  # of trials
    unit: str  # what a trial is, in the plural
    bad: list[str] = field(default_factory=list)  # each trial that broke the property, in words
    figure: str = ""  # what else is worth a glance


@dataclass(frozen=True)
class Row:
    """A line of the scorecard."""

    id: str
    property: str  # one sentence, however it is capitalised
    bar: Mapping[str, int]  # by size, the least number of trials
    prove: Callable[[Work], Proof]
    mutants: tuple[Mutant, ...]  # the first of them is tried at every size
    limit: Mapping[str, int] = field(default_factory=dict)  # by size, seconds, beside LIMITS

    def __post_init__(self) -> None:
        sentence = self.property[:1].upper() + self.property[1:].rstrip(".") + "."
        object.__setattr__(self, "property", sentence)

    def least(self, size: str) -> int:
        """The number of trials without which the row does not hold."""
        sizes = SIZES[: SIZES.index(size) + 1]
        return next((self.bar[s] for s in reversed(sizes) if s in self.bar), 1)

    def seconds(self, size: str) -> int:
        """When a proof of this size is ended."""
        return self.limit.get(size, LIMITS[size])


def from_tests(*tests: str, unit: str = "tests", work: Work | None = None) -> Proof:
    """Run tests of pytest in this process; the trials are those that passed or failed.

    Args:
        tests: as pytest is given them, from the root of the tree.
        unit: what a test is.
        work: whose folder they write to.

    Raises:
        RuntimeError: if pytest could not run them, which shows nothing, of a mistake neither.
    """
    import pytest

    class Outcomes:
        def __init__(self) -> None:
            self.passed: list[str] = []
            self.failed: list[str] = []
            self.skipped: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                getattr(self, report.outcome).append(report.nodeid)

    seen = Outcomes()
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    words += [f"--basetemp={work.folder / 'pytest'}"] if work else []
    code = pytest.main([*words, *tests], plugins=[seen])
    sys.stdout.flush()
    if code not in (0, 1):  # such as a file that cannot be imported
        raise RuntimeError(f"pytest ended with {int(code)} and has not run {', '.join(tests)}")
    bad = [f"{name} failed" for name in seen.failed]
    figure = f"{len(seen.skipped)} skipped" if seen.skipped else ""
    return Proof(len(seen.passed) + len(seen.failed), unit, bad, figure)
