"""Runs of every shape are killed at random moments and go on, until they equal their twins.

Of a shape, a twin is trained that nobody kills. Then lives are lived: a new run is killed, begun
again by the same command, killed again, and at last let be. A kill comes at a random moment, or
among the calls that write what is not committed yet, or in a step of a phase, in turn. Where two
checkpoints are there, the newest of them may be damaged before the run goes on.
"""

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from tests.reliability import small_runs
from tests.reliability.proof import Proof, Work
from tests.reliability.small_runs import SAVE_EVERY, TOTAL, Aim, Shape, without_mask

KINDS = ("step", "write", "time", "write", "step", "write at once")
DAMAGES = ("flip", "cut", "remove", "zero", "record", "manifest")
# kills of which a tenth must come inside a write, and of a shape, some in every phase: of fewer, it
# is chance
MANY, MANY_OF_A_SHAPE = 40, 8


@dataclass
class Killing:
    """Kills runs, and counts what came of it."""

    work: Work
    per_life: int  # kills of a run before it is let be
    damages: int = 0  # checkpoints to damage
    whole: bool = False  # whether those that prepare also check themselves and draw a report
    kills: int = 0
    damaged: int = 0
    redone: int = 0  # the most steps that a kill took, where the newest checkpoint was intact
    bad: list[str] = field(default_factory=list)
    hit: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"kills {self.work.seed}")
        self._kinds = cycle(KINDS)
        self._lives = 0
        self._is_damaged = False  # the checkpoint that was the newest at the kill before

    def shape(self, shape: Shape, kills: int) -> None:
        """Kill runs of a shape as many times, or more, and compare each with its twin."""
        before = self.kills
        twin = self._twin(shape)
        while self.kills - before < kills and len(self.bad) < 20:
            self._life(shape, twin, min(self.per_life, kills - (self.kills - before)))
        missed = sorted(set(twin.phases.values()) - set(self.hit))
        if missed and kills >= MANY_OF_A_SHAPE:
            self.bad.append(f"{shape}: no kill came in {', '.join(missed)}")
        shutil.rmtree(twin.run)

    def at_steps(self, shape: Shape, steps: tuple[int, ...]) -> None:
        """Kill one run in the n-th step of each of its processes, for each n."""
        twin = self._twin(shape)
        run = self._run(shape)
        for n in steps:
            self._kill(shape, run, Aim("step", n))
        self._finish(shape, twin, run)

    def proof(self) -> Proof:
        """What came of all kills."""
        inside = self.hit["inside a write"]
        if self.kills >= MANY and 10 * inside < self.kills:
            self.bad.append(f"only {inside} of {self.kills} inside a write")
        wrong = "0 wrong bits" if not self.bad else f"{len(self.bad)} wrong"
        figure = f"{wrong}, <= {self.redone} steps redone, {inside} inside a write"
        if self.damages:
            figure += f", and {self.damaged} damaged checkpoints"
        return Proof(self.kills, "kills", self.bad, figure)

    def _run(self, shape: Shape) -> Path:
        self._lives += 1
        return self.work.folder / f"{shape}-{self._lives}"

    def _begin(self, shape: Shape, run: Path, aim: Aim | None = None) -> small_runs.Begun:
        words = small_runs.words_of(self.work.folder, shape, run)
        whole = self.whole and shape.prepares
        words += [] if whole else ["--objective.self_check=false"]
        return small_runs.begin(words, run, aim, world=shape.world, report=whole)

    def _twin(self, shape: Shape) -> "_Twin":
        run = self.work.folder / f"{shape}-twin"
        began = time.monotonic()
        small_runs.require_end(self._begin(shape, run, Aim("write", 10**9)))
        seconds = time.monotonic() - began
        none = without_mask(run)
        if none:
            self.bad.append(f"{shape}: steps {none} predict nothing")
        phases = {x["step"]: x["phase"] for x in small_runs.lines_of(run) if x["kind"] == "step"}
        if sorted(phases) != list(range(1, TOTAL + 1)):
            self.bad.append(f"{shape}: the log has steps {sorted(phases)}")
        return _Twin(run, seconds, small_runs.num_writes(run), phases)

    def _life(self, shape: Shape, twin: "_Twin", kills: int) -> None:
        run = self._run(shape)
        for _ in range(kills):
            if not self._kill(shape, run, self._aim(run, twin)):
                break
        else:
            self._finish(shape, twin, run)
            return
        self._compare(shape, twin, run)

    def _aim(self, run: Path, twin: "_Twin") -> Aim:
        """Draw a moment of what a run has before it.

        It is one in a phase that was not hit yet, or inside a write if few were, else in turn.
        """
        saved = small_runs.checkpoints(run)
        newest = small_runs.step_of(saved[-1]) if saved else 0
        share, kind = (TOTAL - newest + 2) / (TOTAL + 2), next(self._kinds)
        missed = [s for s in range(max(newest, 1), TOTAL) if not self.hit[twin.phases[s]]]
        if missed:
            return Aim("step", self._draw.choice(missed) - newest + 1)
        if self.hit["inside a write"] < 0.15 * (self.kills + 1):
            kind = "write at once"
        if kind == "time":
            return Aim("time", seconds=self._draw.random() * share * twin.seconds)
        if kind == "step":
            return Aim("step", self._draw.randint(1, max(TOTAL - newest, 1)))
        n = self._draw.randint(1, max(1, int(share * twin.writes)))
        return Aim("write", n, 0.0 if kind == "write at once" else self._draw.random() * 3e-3)

    def _kill(self, shape: Shape, run: Path, aim: Aim) -> bool:
        """Kill a run; return False if it came to its end before."""
        try:
            killed = small_runs.kill(self._begin(shape, run, aim), aim)
        except AssertionError as error:
            self.bad.append(f"{shape}: {error}")
            return False
        if not killed:
            return False
        self.kills += 1
        self._see(shape, run)
        return True

    def _see(self, shape: Shape, run: Path) -> None:
        """Look at what a kill has left, and damage the newest checkpoint if that is its turn."""
        self.hit["inside a write"] += any(run.rglob("*.tmp"))
        steps = [x for x in small_runs.lines_of(run) if x["kind"] == "step"]
        last, saved = small_runs.last_step(run), small_runs.checkpoints(run)
        self.hit[steps[-1]["phase"] if steps else "before the first step"] += 1
        if last == TOTAL:
            self.hit["behind the last step"] += 1
        newest = small_runs.step_of(saved[-1]) if saved else 0
        if not self._is_damaged:
            self.redone = max(self.redone, last - newest)
        # the newest may be under way, and the loop goes on until the next is due
        if last - newest > SAVE_EVERY * (3 if self._is_damaged else 2):
            self.bad.append(f"{shape}: of {last} steps, a kill left {newest}")
        self._is_damaged = self.damaged < self.damages and len(saved) > 1
        if self._is_damaged:
            self.damaged += 1
            damage(saved[-1], DAMAGES[self.damaged % len(DAMAGES)], self._draw)

    def _finish(self, shape: Shape, twin: "_Twin", run: Path) -> None:
        try:
            small_runs.require_end(self._begin(shape, run))
        except AssertionError as error:
            self.bad.append(f"{shape}: {error}")
            return
        self._compare(shape, twin, run)

    def _compare(self, shape: Shape, twin: "_Twin", run: Path) -> None:
        if len(self.bad) < 20:
            self.bad += [f"{shape}: {text}" for text in small_runs.differences(twin.run, run)]
        self.work.say(f"{self.kills} kills, {shape}: {len(self.bad)} bad; {dict(self.hit)}")
        shutil.rmtree(run)


def stopped_at_every_step(work: Work, shape: Shape) -> list[str]:
    """Stop a run after each of its steps and go on; what differs from one never stopped, in words.

    The twin saves every step, so that each checkpoint of the other has one to equal.
    """
    twin, run = (work.folder / f"{shape}-{name}" for name in ("never", "stopped"))
    words = small_runs.words_of(work.folder, shape, twin)
    small_runs.run_here([*words, "--run.save_every=1", f"--run.keep={TOTAL}"], twin)
    bad = [f"{shape}: steps {none} predict nothing"] if (none := without_mask(twin)) else []
    words = [*small_runs.words_of(work.folder, shape, run), "--run.save_every=1000"]
    for done in range(1, TOTAL + 1):
        if small_runs.run_here(words, run, stop_after=1):
            bad.append(f"{shape}: no stop after step {done}")
        name = f"checkpoints/step-{done:06d}"
        bad += [f"{shape}: {text}" for text in small_runs.different_files(twin / name, run / name)]
        if work.has_enough(bad):
            return bad
    small_runs.run_here(words, run)
    bad += [f"{shape}: {text}" for text in small_runs.different_ends(twin, run)]
    work.say(f"{shape}: {len(bad)} bad")
    for folder in (twin, run):
        shutil.rmtree(folder)
    return bad


@dataclass(frozen=True)
class _Twin:
    """A run that nobody killed."""

    run: Path
    seconds: float
    writes: int  # calls about files that were not committed
    phases: dict[int, str]  # by the number of steps done


def damage(checkpoint: Path, how: str, draw: random.Random) -> None:
    """Damage a checkpoint in one of the ways of `DAMAGES`; one that lacks files stays damaged."""
    state = checkpoint / "state.safetensors"
    if how in ("remove", "manifest"):
        (state if how == "remove" else checkpoint / "manifest.json").unlink(missing_ok=True)
        return
    if not state.is_file():
        return
    file = checkpoint / "record.json" if how == "record" else state
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if how == "cut":
        content = content[:at]
    elif how == "zero":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        content[-1] ^= 1  # what is zeroed may have been zero
    else:
        content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


# of a record: formats, LoRA, objectives and ranks, each of them with others
EVERY_SHAPE = (
    Shape("codes", "whole", "horizon", prepares=True),
    Shape("text", "whole", "mask", prepares=True),
    Shape("codes", "merged", "horizon"),
    Shape("text", "merged", "mask"),
    Shape("codes", "tracked", "mask"),
    Shape("text", "tracked", "horizon"),
    Shape("text", "whole", "codes"),
    Shape("codes", "whole", "sft", prepares=True),
    Shape("text", "merged", "hybrid"),
    Shape("codes", "whole", "hybrid"),
    Shape("codes", "whole", "horizon", world=2),
    Shape("text", "tracked", "mask", world=2),
)
