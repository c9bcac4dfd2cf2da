"""Signals at every stage: where a command is when they come, and what it must leave."""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smbfast import embed, prepare, probe, train
from tests.ports import free_port
from tests.reliability.proof import Proof, Work
from tests.reliability.trials import (
    NO_PROBES,
    PROBES,
    SETTINGS,
    STEPS,
    Ended,
    Place,
    Twin,
    begun,
    cheap,
    each_counts,
    state_of,
)
from tests.test_commands import AT_THE_END

WITHIN = 30.0  # seconds from the last signal to the end
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
COUNTS = (1, 2, 5)


@dataclass(frozen=True)
class Stage:
    """A place in a run: where it begins, and which step is saved when it is stopped there.

    begins: "nothing", with "data", or "trained": all steps done.
    steps: that may be saved; none where no status may be there.
    """

    name: str
    place: Place
    begins: str = "data"
    steps: tuple[int, ...] = ()
    probes: bool = False
    state: str = "preempted"


LAST = (2 * STEPS,)
STAGES = [
    Stage("the start", Place("smbfast.run.open_run:choose_device")),
    Stage("preparing", Place("smbfast.data.preparing:_make_shards"), "nothing"),
    Stage("reading labels", Place("smbfast.run.open_run:read_tasks"), probes=True),
    Stage("an exception is dropped", Place("smbfast.run.open_run:read_tasks", drops=True)),
    Stage("the model", Place("smbfast.run.open_run:make_encoder")),
    Stage("the entry", Place("smbfast.run.loop:evaluate_entry"), steps=(1,)),
    Stage("the self-check", Place("smbfast.run.loop:self_check"), steps=(1,)),
    Stage("the first step", Place("smbfast.run.loop:forward_backward"), steps=(1,)),
    Stage("sft", Place("smbfast.run.loop:forward_backward", 2), steps=(2,)),
    Stage("jepa", Place("smbfast.run.loop:forward_backward", STEPS + 2), steps=(STEPS + 2,)),
    Stage("an evaluation", Place("smbfast.run.loop:evaluate_step"), steps=(3, 4)),
    Stage("a checkpoint", Place("smbfast.run.open_run:OpenRun.save"), steps=(3, 4)),
    Stage("the last step", Place("smbfast.run.loop:forward_backward", 2 * STEPS), steps=LAST),
    Stage("final", Place("smbfast.run.open_run:OpenRun.save_model"), "trained", LAST),
    Stage("embedding", Place("smbfast.run.probes:_embedded"), "trained", LAST, True),
    Stage("embeddings", Place("smbfast.probing.embedding:_ahead"), "trained", LAST, True),
    Stage("probes", Place("smbfast.run.probes:run_probe"), "trained", LAST, True),
    Stage("the report", Place("smbfast.run.loop:write_report"), "trained", LAST),
    Stage("the end", Place("smbfast.run.console:end_card"), "trained", LAST, state="done"),
]
BY_NAME = {stage.name: stage for stage in STAGES}
# of a push: every stage, every signal and every count once
FEW = [
    ("preparing", signal.SIGUSR1, 1),
    ("reading labels", signal.SIGINT, 5),
    ("an exception is dropped", signal.SIGTERM, 1),
    ("the entry", signal.SIGUSR1, 2),
    ("the first step", signal.SIGTERM, 5),
    ("sft", signal.SIGTERM, 1),
    ("jepa", signal.SIGUSR1, 5),
    ("an evaluation", signal.SIGINT, 2),
    ("a checkpoint", signal.SIGTERM, 2),
    ("final", signal.SIGTERM, 1),
    ("embedding", signal.SIGUSR1, 2),
    ("the report", signal.SIGINT, 1),
]
OF_PROBES = ("embeddings/", "predictions/", "risk_functions")
BROKEN = ("preparing", "an exception is dropped", "sft")  # where mistakes are seen
RESUMED = ("sft", "a checkpoint")  # at push, followed to their end
APART = ("preparing", "sft", "a checkpoint", "an evaluation", "final", "embeddings")


class Trials:
    """Makes trials in a folder, and keeps what went wrong."""

    def __init__(self, work: Work, twin: Twin) -> None:
        self.work, self.twin, self.draw = work, twin, random.Random(work.seed)
        self.bad: list[str] = []
        self.count = self.resumed = 0
        self.slowest = 0.0

    def gaps(self, least: float, most: float) -> Iterator[float]:
        """Seconds between signals."""
        return iter(lambda: self.draw.uniform(least, most), None)

    def stop(
        self, stage: Stage, number: int, count: int, *, apart: bool = False, on: bool = True
    ) -> None:
        """Stop a run at a stage.

        Args:
            apart: whether each signal counts for itself.
            on: whether the run then goes on to its end.
        """
        self.count += 1
        name = f"{stage.name}, {count} {signal.Signals(number).name}{' apart' if apart else ''}"
        run, log = self.work.folder / f"run-{self.count}", self.work.folder / "log"
        if stage.begins == "trained":
            self.twin.trained(run)
        else:
            self.twin.beginning(run, data=stage.begins == "data")
        words = [w for w in self.twin.words(run) if not w.startswith("--probe.labels")]
        words.append(PROBES if stage.probes else NO_PROBES)
        faults = (cheap, each_counts) if apart else (cheap,)
        trial = begun(train.main, words, log, place=stage.place, faults=faults)
        if not trial.is_there():
            self.bad.append(f"{name}: it never came there: {trial.end(1.0).said[-300:]}")
            return
        trial.signals(number, count, self.gaps(0.03, 0.06) if apart else self.gaps(0.0, 0.01))
        if not (apart and count > 1):
            trial.goes_on()  # in the loop the step is finished
        end = trial.end(WITHIN)
        self.slowest = max(self.slowest, end.seconds)
        found = [*_words(end), *self._status(stage, run, count if apart else 1)]
        if not found and on:
            self.resumed += 1
            found += self._go_on(words, run, log, probed=stage.probes)
        self.bad += [f"{name}: {text}" for text in found]
        shutil.rmtree(run)

    def _status(self, stage: Stage, run: Path, requests: int) -> Iterator[str]:
        """What is wrong about the status of a run that was stopped."""
        state = state_of(run)
        if not stage.steps:
            if state is not None:
                yield f"nothing had begun, and the status is {state}"
            return
        if state is None:
            yield "there is no status"
            return
        states = {stage.state} | ({"running"} if requests > 2 else set())
        # a second signal interrupts the step, so that the newest checkpoint is an earlier one
        steps = set(stage.steps) if requests < 2 else set(range(stage.steps[-1] + 1))
        if state[0] not in states or state[1] not in steps:
            yield f"the status is {state}, not {stage.state} after step {sorted(steps)}"
        saved = run / "checkpoints" / f"step-{state[1]:06d}"
        if state[1] and not saved.is_dir():
            yield f"the status says step {state[1]}, which has no checkpoint"

    def _go_on(self, words: list[str], run: Path, log: Path, *, probed: bool) -> Iterator[str]:
        """What is wrong about the run that goes on."""
        end = begun(train.main, words, log, faults=(cheap,)).end()
        if end.status != 0:
            yield f"the same command ends with {end.status}: {end.said[-300:]}"
            return
        left = [str(p.relative_to(run)) for p in run.rglob("*") if p.suffix in (".tmp", ".trash")]
        own = {n for n in self.twin.unlike(run) if probed or not n.startswith(OF_PROBES)}
        for what, names in (("leaves", left), ("has otherwise", sorted(own))):
            if names:
                yield f"the run that went on {what} {', '.join(names[:3])}"

    def command(self, name: str, number: int, count: int) -> None:
        """Stop another command, and let it go on."""
        self.count += 1
        at = f"{name}, {count} {signal.Signals(number).name}"
        folder, log = self.work.folder / f"command-{self.count}", self.work.folder / "log"
        folder.mkdir()
        main, words, place, made = self._commands(folder)[name]
        trial = begun(main, words, log, place=place)
        if not trial.is_there():
            self.bad.append(f"{at}: it never came there: {trial.end(1.0).said[-300:]}")
            return
        trial.signals(number, count, self.gaps(0.0, 0.01))
        trial.goes_on()
        end = trial.end(WITHIN)
        self.slowest = max(self.slowest, end.seconds)
        found = [*_words(end)]
        end = begun(main, words, log).end()
        if end.status != 0 or not made.is_file():
            found.append(f"the same command ends with {end.status}: {end.said[-300:]}")
        self.bad += [f"{at}: {text}" for text in found]
        shutil.rmtree(folder)

    def _commands(self, folder: Path) -> dict:
        twin, out = self.twin.folder, folder / "out"
        cohort, table = self.twin.cohort, twin / "embeddings" / "online.parquet"
        task = "--labels=death_3y"
        return {
            "prepare": (
                prepare.main,
                [f"--path={cohort}", f"--out={out}", "--window=128", "--workers=1"],
                Place("smbfast.data.preparing:_make_shards"),
                out / "prepare.json",
            ),
            "embed": (
                embed.main,
                [
                    f"--model={twin / 'final'}",
                    f"--data={cohort}",
                    "--at=last",
                    f"--out={out}.parquet",
                ],
                Place("smbfast.probing.embedding:_ahead"),
                folder / "out.parquet",
            ),
            "probe": (
                probe.main,
                [f"--embeddings={table}", f"--data={cohort}", task, f"--out={out}"],
                Place("smbfast.probing.run_probe:measure"),
                out / "probe.json",
            ),
        }

    def process(self, number: int, after: float) -> None:
        """Stop a process that is started anew, imports and all, at a random moment."""
        self.count += 1
        run, log = self.work.folder / f"process-{self.count}", self.work.folder / "log"
        words = [*SETTINGS, NO_PROBES, f"--run.dir={run}"]
        with log.open("w") as out:
            command = [sys.executable, "-m", "smbfast.train", *words]
            started = subprocess.Popen(command, stdout=out, stderr=out)
        time.sleep(after)
        started.send_signal(number)
        since = time.monotonic()
        try:
            status = started.wait(WITHIN)
        except subprocess.TimeoutExpired:
            started.kill()
            status = None
        end = Ended(status, time.monotonic() - since, log.read_text(errors="replace"))
        said = log.read_text(errors="replace")
        if status != 0 and "smbfast" not in said:  # Python was still at its own start
            self.count -= 1
            return
        done = status == 0 and (state_of(run) or ("", 0))[0] == "done"
        found = [] if done else [*_words(end)]
        state = state_of(run)
        if not done and state is not None and state[0] != "preempted":
            found.append(f"the status is {state}")
        self.bad += [f"{signal.Signals(number).name} after {after:.1f} s: {t}" for t in found]
        shutil.rmtree(run, ignore_errors=True)

    def ending(self, number: int) -> None:
        """Send signals to a process from its last line on, until it has gone."""
        self.count += 1
        words = [*SETTINGS, NO_PROBES, f"--run.dir={self.twin.folder}"]
        command = [sys.executable, "-u", "-m", "smbfast.train", *words]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **out) as started:
            first, sent = started.stdout.readline(), 0
            while "finished" not in first and first:
                first = started.stdout.readline()
            until = time.monotonic() + WITHIN
            while started.poll() is None and time.monotonic() < until:
                started.send_signal(number)
                sent += 1
                time.sleep(0.002)
            started.kill()  # if it hangs
            said = first + started.stdout.read()
        name = f"{sent} {signal.Signals(number).name} while Python ends"
        told = bool(first and sent)  # else nothing was tried
        if not told or started.returncode not in (0, 75) or "Traceback" in said:
            self.bad.append(f"{name}: it ended with {started.returncode}: {said[-300:]}")

    def at_the_end(self) -> None:
        """Let a process send signals to itself when its modules are collected."""
        self.count += 1
        run = AT_THE_END.replace("NUMBERS", repr((*map(int, NUMBERS), int(signal.SIGALRM))))
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
        if (done.returncode, done.stderr) != (0, "late"):
            self.bad.append(f"while modules are collected: it ended with {done.returncode}")

    def ranks(self, asked: tuple[int, ...], number: int, step: int) -> None:
        """Stop two ranks by a signal to one of them or to both."""
        self.count += 1
        name = f"{signal.Signals(number).name} to ranks {asked} of 2 at step {step}"
        run = self.work.folder / f"ranks-{self.count}"
        self.twin.beginning(run)
        place = Place("smbfast.run.loop:forward_backward", step)
        trials = self._pair(run, place)
        there = [trial.is_there() for trial in trials]
        for rank in asked:
            trials[rank].signals(number, 1, self.gaps(0.0, 0.01))
        for trial in trials:
            trial.goes_on()
        ends = [trial.end(WITHIN) for trial in trials]
        found = [] if all(there) else ["a rank never came there"]
        found += [f"rank {r} ended with {e.status}" for r, e in enumerate(ends) if e.status != 75]
        if state_of(run) != ("preempted", step):
            found.append(f"the status is {state_of(run)}, not preempted after step {step}")
        if found:
            found.append(ends[0].said[-500:] + ends[1].said[-500:])
        ends = [trial.end() for trial in self._pair(run, None)]
        state = state_of(run)
        if [e.status for e in ends] != [0, 0] or state != ("done", 2 * STEPS):
            found.append(f"the same command ends with {[e.status for e in ends]}, {state}")
        self.bad += [f"{name}: {text}" for text in found]
        shutil.rmtree(run)

    def _pair(self, run: Path, place: Place | None) -> list:
        port, trials = str(free_port()), []
        for rank in ("0", "1"):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = self.work.folder / f"log-{rank}"
            words = self.twin.words(run)
            trials.append(
                begun(train.main, words, log, place=place, faults=(cheap,), environment=own)
            )
        return trials


def _words(end: Ended) -> Iterator[str]:
    """What is wrong about the end of a command that was asked to stop."""
    if end.status is None:
        yield f"it has not ended {WITHIN:.0f} s after the signals"
    elif end.status != 75:
        yield f"it ended with {end.status}: {end.said[-200:]}"
    for word in ("Traceback", "Exception ignored"):
        if word in end.said:
            yield f"it said {word}: {end.said[-300:]}"


def prove(work: Work) -> Proof:
    """Trials of the size that is asked for."""
    few = work.size in ("push", "mutant")
    trials = Trials(work, Twin(work.folder, NO_PROBES if few else PROBES))
    if few:
        for name, number, count in FEW:
            if work.size == "mutant" and name not in BROKEN:
                continue
            on = work.size == "push" and name in RESUMED
            trials.stop(BY_NAME[name], number, count, on=on)
        trials.stop(BY_NAME["sft"], signal.SIGTERM, 2, apart=True, on=False)
        trials.at_the_end()
    elif work.size == "nightly":
        _nightly(trials)
    else:
        _many(trials)
    figure = f"the slowest {trials.slowest:.1f} s after the signal, {trials.resumed} followed to "
    return Proof(trials.count, "trials", trials.bad, figure + "the bits of their twin")


def _nightly(trials: Trials) -> None:
    """Every stage with each signal, in counts that take turns."""
    counts = itertools.cycle((1, 2, 5, 2, 5, 1, 5, 1, 2))
    for stage, number in itertools.product(STAGES, NUMBERS):
        trials.stop(stage, number, next(counts), on=number == signal.SIGTERM)
        trials.work.say(f"{trials.count} {stage.name} {len(trials.bad)} bad")
    for (name, count), number in zip(
        itertools.product(APART, (2, 5)), itertools.cycle(NUMBERS), strict=False
    ):
        trials.stop(BY_NAME[name], number, count, apart=True, on=count == 2)
    for name, number in itertools.product(("prepare", "embed", "probe"), NUMBERS):
        trials.command(name, number, next(counts))
    for number, asked in zip(NUMBERS, ((0,), (1,), (0, 1)), strict=True):
        trials.ranks(asked, number, 2)
    for number, after in zip(2 * NUMBERS, (0.3, 0.6, 1.0, 2.0, 4.0, 8.0), strict=True):
        trials.process(number, after * trials.draw.uniform(0.9, 1.1))
    trials.at_the_end()
    for number in NUMBERS:
        trials.ending(number)
    trials.work.say(f"{trials.count} {len(trials.bad)} bad")


def _many(trials: Trials) -> None:
    """Every stage with each signal and each count."""
    for stage, number, count in itertools.product(STAGES, NUMBERS, COUNTS):
        trials.stop(stage, number, count, on=count != 2)
        trials.work.say(f"{trials.count} {stage.name} {len(trials.bad)} bad")
    for name, number, count in itertools.product(APART, NUMBERS, (2, 5)):
        trials.stop(BY_NAME[name], number, count, apart=True, on=number == signal.SIGTERM)
    for name, number, count in itertools.product(("prepare", "embed", "probe"), NUMBERS, COUNTS):
        trials.command(name, number, count)
    trials.work.say(f"{trials.count} commands {len(trials.bad)} bad")
    for number, asked in itertools.product(NUMBERS, ((0,), (1,), (0, 1))):
        trials.ranks(asked, number, 2)
    trials.work.say(f"{trials.count} ranks {len(trials.bad)} bad")
    for number, moment in itertools.product(NUMBERS, range(6)):
        after = 0.3 * 1.9**moment  # from the first imports to the end of the run
        trials.process(number, after * trials.draw.uniform(0.9, 1.1))
    trials.at_the_end()
    for number in (*NUMBERS, *NUMBERS):
        trials.ending(number)
    trials.work.say(f"{trials.count} processes {len(trials.bad)} bad")
