"""Compares steps that a run computes again, after a restart, with what they gave before.

Steps after the last checkpoint are lost with a process, but not the lines that it logged. The same
step from the same state gives the same bits, so a number that differs was wrong one of the two
times: memory, a GPU or its driver. One that a restart repeats, such as a gradient that is not
finite, is of the data or the settings. Another machine or number of ranks differs by rounding.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("sft", "jepa", "codes", "grad_norm")
ROUNDING = 1e-3  # relative, to which other machines may round, in bf16 too: our choice


@dataclass
class Recomputed:
    """The steps that were logged behind the checkpoint from which a run goes on."""

    before: dict[int, dict] = field(default_factory=dict)  # lines of the log by their step
    worst: float = 0.0  # the largest relative difference
    first: str = ""  # where the first one beyond rounding is
    unlike: int = 0  # steps that differ at all
    steps: list[int] = field(default_factory=list)  # that were compared

    @classmethod
    def of(cls, log: Path, offset: int) -> "Recomputed":
        """Read the steps behind `offset` bytes of a log; a line that was cut off is left out."""
        before: dict[int, dict] = {}
        with log.open("rb") as file:
            file.seek(offset)
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and record.get("kind") == "step":
                    before[record["step"]] = record
        return cls(before)

    def add(self, record: dict) -> str | None:
        """Compare a step that was made; return what is to be said of those compared, or None.

        Words come behind the last step that was logged before.
        """
        old = self.before.get(record["step"])
        self.before = {n: line for n, line in self.before.items() if n > record["step"]}
        if old is not None:
            self._compare(record, old)
        return self._words() if self.steps and not self.before else None

    def _compare(self, record: dict, old: dict) -> None:
        gaps = {name: _gap(record[name], old.get(name)) for name in NAMES}
        name = max(NAMES, key=lambda n: gaps[n])
        self.steps.append(record["step"])
        self.unlike += gaps[name] > 0
        self.worst = max(self.worst, gaps[name])
        if gaps[name] > ROUNDING and not self.first:
            words = {"grad_norm": "a gradient's norm"}.get(name, f"a loss {name}")
            new, was = _word(record[name]), _word(old.get(name))
            self.first = f"step {record['step']} gives {words} of {new} and gave {was}"

    def _words(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        self.steps, unlike, num = [], self.unlike, len(self.steps)
        span = f"steps {first} to {last} were" if first < last else f"step {first} was"
        text = f"{span} computed again after the restart:"
        if not unlike:
            return f"{text} the same bits"
        if not self.first:
            return f"{text} within {self.worst:.0e}, as other machines or numbers of ranks round"
        return (
            f"{text} {unlike} of {num} otherwise; {self.first} before. From the "
            "same state one of the two is wrong, unless machine or kernels have changed: look at "
            "the memory and the GPU that computed it"
        )


def _gap(one: float | None, other: float | None) -> float:
    """Return the relative difference; a step that was skipped is infinitely far from one made."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    if one == other:
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def _word(value: float | None) -> str:
    return "none, since it was skipped," if value is None else f"{value:.6g}"
