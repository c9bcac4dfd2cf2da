"""Does the work of an experiment: cohorts, runs, read-outs and baselines, each once.

A job writes files of its own into `work`, whole or not at all, and is left out where they are
there. So a command that was stopped goes on, and experiments share what they have in common. Jobs
of a wave need those of the wave before it: patients, then runs and baselines, then the runs whose
steps follow from the FLOPs of others, then what is measured at checkpoints.
"""

import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smbfast.base.files import committed_file
from smbfast.base.progress import duration
from smbfast.base.workers import worker_pool
from smbfast.experiments import interference, models
from smbfast.experiments.patients import TASKS, Shared, shared_key
from smbfast.experiments.plans import Arm, Plan
from smbfast.experiments.runs import Run, quiet
from smbfast.experiments.scores import Scores
from smbfast.run.open_run import OpenRun
from smbfast.settings import ExperimentSettings

JUDGED = (*TASKS, "tte_death")
Kind = Literal["patients", "run", "untrained", "baselines", "gradients"]
_judged: dict[Path, models.Judged] = {}  # of the cohort that this process worked on last


@dataclass(frozen=True)
class Job:
    """One piece of work on a run or on its patients; `label` names it for people."""

    kind: Kind
    run: Run
    label: str
    command: str

    @property
    def file(self) -> Path:
        """The file that is there once it is done."""
        own = self.run
        if self.kind == "patients":
            return own.work / f"data-{own.cohort}-{shared_key(own.settings)}" / "ready"
        if self.kind == "gradients":
            return own.work / "gradients" / f"{own.name}.npz"
        name = own.name if self.kind == "run" else f"{own.cohort}-{shared_key(own.settings)}"
        if self.kind == "untrained":
            name += f"-{own.settings.run.seed}"
        return own.work / "scores" / f"{self.kind}-{name}.npz"

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.file.is_file()

    @property
    def embeddings(self) -> Path:
        """The embeddings of all nodes, in the order of the nodes, float32 [K, D]."""
        return self.run.work / "embeddings" / f"{self.file.stem}.npy"

    def work(self) -> None:
        """Do it."""
        shared = Shared.of(self.run.work, self.run.settings)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.kind == "patients":
            with committed_file(self.file, private=True) as staging:
                staging.touch()
        elif self.kind == "gradients":
            self._gradients(shared)
        elif self.kind == "baselines":
            scores, about = models.baselines(judged_of(self.run, shared))
            self._write(scores, about)
        else:
            if self.kind == "run":
                self.run.train(shared, self.command)
                encoder, about = self.run.trained(), {"cost": self.run.cost()}
            else:
                encoder, about = self.run.untrained(shared), {}
            judged = judged_of(self.run, shared)
            scores, own, embedding_KD = models.read_last(self.kind, judged, encoder)
            self.embeddings.parent.mkdir(parents=True, exist_ok=True)
            with committed_file(self.embeddings, private=True) as staging:
                with open(staging, "wb") as out:
                    np.save(out, embedding_KD, allow_pickle=False)
            self._write(scores, about | own)

    def _gradients(self, shared: Shared) -> None:
        opened = OpenRun.open(self.run.placed(shared), set_aside=False)
        gram, steps = interference.products(self.run, opened)
        with committed_file(self.file, private=True) as staging:
            interference.write(staging, gram, steps)

    def _write(self, scores: Scores, about: dict[str, Any]) -> None:
        with committed_file(self.file, private=True) as staging, open(staging, "wb") as out:
            scores.write(out, about)


def judged_of(run: Run, shared: Shared) -> models.Judged:
    """Return labels and nodes of a run's cohort; those of the last one stay in memory."""
    folder = shared.prepared.folder
    if folder not in _judged:
        _judged.clear()
        window = run.settings.data.window
        _judged[folder] = models.Judged.open(shared.cohort, shared.prepared, window, JUDGED)
    return _judged[folder]


def done_job(job: Job) -> tuple[Job, float]:
    """Do a job in this process, with one thread; return it and the seconds that it took."""
    quiet()
    start = time.monotonic()
    job.work()
    return job, time.monotonic() - start


class Sweep:
    """The jobs of an experiment, and how far they are."""

    def __init__(self, size: ExperimentSettings, plan: Plan, command: str) -> None:
        """Plan the jobs; `command` is recorded beside each run."""
        self.size, self.plan, self.command = size, plan, command
        self.replicates = range(1, (size.replicates or plan.replicates) + 1)
        self._start, self._seconds = time.monotonic(), [0.0]
        self._finished = 0
        self._left = 0

    def run_of(self, name: str, replicate: int) -> Run:
        """Return the run of an arm; that of an arm at equal FLOPs once the others are finished.

        Raises:
            ValueError: an arm at equal FLOPs, before the others are finished.
        """
        arm, work = self.plan.arms[name], self.size.work
        if not arm.flops:
            return Run(work, arm.of(self.size, replicate))
        others = [self.run_of(n, replicate) for n, a in self.plan.arms.items() if not a.flops]
        if not all(run.cost_file.is_file() for run in others):
            raise ValueError(f"{name} needs the FLOPs of the other arms; they are not finished")
        alone = self._alone(arm, replicate).cost()
        dearest = max(run.cost()["flops"] for run in others)
        steps = round(alone["steps"] * dearest / alone["flops"])
        return Run(work, arm.of(self.size, replicate, steps))

    def _alone(self, arm: Arm, replicate: int) -> Run:
        """Return the run with the same losses as an arm at equal FLOPs, at equal steps."""
        return Run(self.size.work, replace(arm, flops=False).of(self.size, replicate))

    def job(self, kind: Kind, name: str, replicate: int) -> Job:
        """Return a job of an arm in a replicate."""
        label = f"{name if kind in ('run', 'gradients') else kind}, replicate {replicate}"
        label += ", gradients" if kind == "gradients" else ""
        return Job(kind, self.run_of(name, replicate), label, self.command)

    @property
    def first_arm(self) -> str:
        """The arm whose tokens the baselines read, and whose weights before training are scored."""
        return next(iter(self.plan.arms))

    def waves(self) -> list[list[tuple[Kind, str, int]]]:
        """Return kinds, arms and replicates of all jobs, in waves."""
        arms, each = self.plan.arms, self.replicates
        plain = [name for name, arm in arms.items() if not arm.flops]
        keys = {shared_key(arms[name].of(self.size, 1)): name for name in reversed(plain)}
        first: list[tuple[Kind, str, int]] = [
            ("patients", n, r) for r in each for n in keys.values()
        ]
        second: list[tuple[Kind, str, int]] = []
        for r in each:
            second += [("run", name, r) for name in plain]
            second += [("untrained", self.first_arm, r), ("baselines", self.first_arm, r)]
        third: list[tuple[Kind, str, int]] = [
            ("run", name, r) for r in each for name, arm in arms.items() if arm.flops
        ]
        if self.plan.name == "interference":
            third += [("gradients", name, r) for r in each for name in plain]
        return [first, second, third]

    def work(self) -> None:
        """Do all that is left, in `jobs` processes, and say how far it is after each job.

        Raises:
            RunFailed, ValueError: of the first job that fails; what others wrote stays.
        """
        waves = self.waves()
        self._left = sum(map(len, waves))
        for wave in waves:
            jobs = [self.job(*one) for one in wave]
            left = list({job.file: job for job in jobs if not job.done}.values())
            self._left -= len(jobs) - len(left)
            self._each(left)

    def _each(self, jobs: Sequence[Job]) -> None:
        if self.size.jobs == 1 or len(jobs) < 2:
            for job in jobs:
                self._say(*done_job(job))
            return
        with worker_pool(min(self.size.jobs, len(jobs))) as pool:
            for future in as_completed([pool.submit(done_job, job) for job in jobs]):
                self._say(*future.result())

    def _say(self, job: Job, seconds: float) -> None:
        """Print that a job is done, and how long the others will take at the pace so far."""
        self._finished += 1
        self._left -= 1
        pace = (time.monotonic() - self._start) / self._finished
        print(
            f"{self.plan.name}: {job.label}: {duration(seconds)}; {self._left} left, about "
            f"{duration(pace * self._left)}",
            flush=True,
        )
