"""Numbers that are not finite on one rank of two: both must decide alike, as one process would."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from tests.reliability import jobs
from tests.reliability.cohort import imported
from tests.reliability.injections import (
    HORIZONS,
    STEPS,
    WORDS,
    Injection,
    not_finite,
    passing_over,
    put_in,
)
from tests.reliability.injections import wrong_with as unlike
from tests.reliability.training import Ran, replaced

Patches = Callable[[int], list[AbstractContextManager]]  # of a rank


class Pairs:
    """Runs of two ranks on prepared data, in a folder."""

    def __init__(self, folder: Path, data: list[str]) -> None:
        imported()
        jobs.adopt()
        self.folder, self.data = folder, data
        self._like: dict[tuple[int, bool], Ran] = {}

    def train(self, name: str, patches: Patches, *more: str) -> tuple[Ran, list[int]]:
        """A run as its main rank tells of it, and the exit statuses of both."""

        def work(words: list[str]) -> None:
            with ExitStack() as stack:
                for patch in patches(int(os.environ["RANK"])):
                    stack.enter_context(patch)
                jobs.train(words)

        run = self.folder / name
        words = [*WORDS, *self.data, *more, f"--run.dir={run}"]
        ended = jobs.run_job(2, words, self.folder / f"{name}-log", grace=60.0, work=work)
        codes = [ended.codes[rank] for rank in sorted(ended.codes)]
        return Ran(run, codes[0], "", ended.said[0]), codes

    def wrong_with(self, name: str, injection: Injection, on: int) -> list[str]:
        """Say how a run with an injection on one rank differs from one that passes the step."""
        step, ahead = injection.step, injection.place == "target"
        more = HORIZONS if ahead else ()
        if (step, ahead) not in self._like:
            patches = lambda _: passing_over(step, scale=ahead)  # noqa: E731
            self._like[step, ahead], _ = self.train(f"like-{step}-{ahead}", patches, *more)
        ran, codes = self.train(name, lambda rank: put_in(injection) if rank == on else [], *more)
        bad = unlike(ran, self._like[step, ahead], injection)
        return bad if len(set(codes)) == 1 else [*bad, f"the ranks ended with {codes}"]

    def gives_up(self, name: str, injection: Injection, on: int) -> list[str]:
        """Say what is wrong with the end of a run whose every step is not finite on one rank."""
        long = injection._replace(steps=STEPS)
        ran, codes = self.train(name, lambda rank: put_in(long) if rank == on else [])
        bad = not_finite(ran)
        if codes != [1, 1] or "not finite in 3 steps in a row" not in ran.err:
            bad.append(f"the ranks ended with {codes}: {ran.err[-200:]}")
        if injection.step and ran.checkpoints[-1:] != [f"step-{injection.step:06d}"]:
            bad.append(f"leaves {ran.checkpoints}")
        return bad

    def splits(self, name: str, injection: Injection, on: int) -> list[str]:
        """Say what is wrong where one rank alone skips a step: its sum of gradients is damaged."""

        def summed(real: Any) -> Any:
            calls = [0]

            def sums(self: Any, parameters: Any, *rest: Any) -> Any:
                said = real(self, parameters, *rest)
                calls[0] += 1
                if calls[0] == injection.step + 1:
                    live = [p.grad for p in parameters if p.grad is not None]
                    live[injection.number % len(live)].view(-1)[0] = injection.value
                return said

            return sums

        place = "smbfast.run.ranks:Ranks.summed"
        ran, codes = self.train(name, lambda rank: [replaced(place, summed)] if rank == on else [])
        bad = not_finite(ran)
        if 0 in codes or "no longer those of rank 0" not in ran.err:
            bad.append(f"the ranks ended with {codes}: {ran.err[-300:]}")
        if any(name > f"step-{injection.step:06d}" for name in ran.checkpoints):
            bad.append(f"leaves {ran.checkpoints}")
        return bad
