"""python -m bench.cohorts: what runs learn of simulated cohorts, beside what can be known of them.

For each cohort seed, training seed and arm (a variant of the run, by its words) a run is trained.
Its encoder embeds the decision nodes once, and every read-out of it is probed. Beside them stand
the encoder before training, code counts and other baselines, and the Bayes filter, which is the
bound. The record says AUROC, the share of the gap from code counts to the filter, and differences,
with intervals over training seeds x patients (`smbfast.experiments.scores`).

Whatever is in `work` is used again, so that a command that was stopped goes on.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.base.entry import RunFailed, entry
from smbfast.base.files import committed_file, digest_of, write_text
from smbfast.base.held_out import count_look, times
from smbfast.experiments import models as cohort_models
from smbfast.experiments.models import BASELINES, BOOSTING, READOUTS, Judged
from smbfast.experiments.patients import TASKS, Shared, judged_by, shared_key
from smbfast.experiments.scores import (
    COUNTS,
    FILTER,
    MEAN,
    Areas,
    Estimates,
    Scores,
    areas,
    by_seed,
    cells,
    differences,
    over_cohorts,
    over_seeds,
    shares,
    together,
)
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.run.checkpoint import restore_final
from smbfast.run.folder import status_of
from smbfast.settings import TrainSettings, load, run_arguments
from smbfast.statistics import resample

PROG = "python -m bench.cohorts"
ROOT = Path(__file__).resolve().parents[1]
UNTRAINED = "untrained"
DEATHS = ("death_1y", "death_3y")


class CohortsBench(Settings):
    """Measure what runs on simulated cohorts are worth, on patients who serve for nothing else.

    An arm is a name and words of `python -m smbfast.train`. The first is the one that is judged:
    beside each of its runs stands the encoder before training. The second is the control at equal
    steps, the third the control at equal seconds; further ones are compared likewise.
    """

    epilog: ClassVar[str] = """Examples

  Choose between settings on two cohorts, on tuning patients:
    python -m bench.cohorts --work=FOLDER --cohorts=0,1 --seeds=0 \\
        --arms="default: ; wide: --optim.batch=64"

  The proof on held-out patients, once, and its record:
    python -m bench.cohorts --work=FOLDER --cohorts=31,32,33 --split=held_out --bars --save"""

    work: Path = Field(
        description="Folder outside the repository for patients, runs and scores. What is there is "
        "used again, so that a command that was stopped goes on."
    )
    cohorts: list[int] = Field(min_length=1, description="Seeds of the cohorts.")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Training seeds (run.seed).")
    arms: str | None = Field(
        None,
        description="The variants, as `name: words; name: words`. Words are arguments of "
        "`python -m smbfast.train`: a preset or a TOML file, and settings. `none` is the proof: "
        "the default run, SFT alone for as many steps, SFT alone for 1.8 times the steps, which "
        "take as long as the default run does, and the default run without codes to come.",
    )
    split: Literal["tuning", "held_out"] = Field(
        "tuning",
        description="Who judges: held-out patients of the cohort, or, to choose settings, tuning "
        "patients of another cohort, with seed S + 100,000.",
    )
    patients: int = Field(
        64_000,
        ge=200,
        description="With split=tuning: patients of that other cohort, all splits together. About "
        "15 % judge.",
    )
    readout: Literal[*READOUTS] = Field(  # type: ignore[valid-type]
        "auto", description="The read-out that the bars judge."
    )
    draws: int = Field(1000, ge=2, description="Draws of the bootstrap.")
    threads: int = Field(1, ge=1, description="Threads of every process.")
    bars: bool = Field(False, description="End with status 1 unless every bar is reached.")
    save: bool = Field(False, description="Append the record to bench/results/cohorts.jsonl.")


@dataclass(frozen=True)
class Run:
    """One run of an arm on a cohort, with a training seed."""

    bench: CohortsBench
    arm: str
    words: str
    cohort: int
    seed: int

    @cached_property
    def settings(self) -> TrainSettings:
        """The settings of the run, without those of its place."""
        name, words = run_arguments(shlex.split(self.words))
        own = [f"--cohort.seed={self.cohort}", f"--run.seed={self.seed}", "--probe.labels="]
        return load(name, [*words, *own])

    @cached_property
    def folder(self) -> Path:
        """The run folder; its name holds a digest of the settings, so that others never use it."""
        digest = digest_of(self.settings.model_dump(mode="json"))[:8]
        return self.bench.work / "runs" / f"{self.arm}-{self.cohort}-{self.seed}-{digest}"

    def train(self, shared: Shared) -> dict[str, Any]:
        """Train the run, or go on with it, unless it is finished; return what it cost.

        Wall and CPU seconds are those of the whole command, without patients and shards, which are
        there. They are None if the run was not trained by one command.

        Raises:
            RunFailed: training failed.
        """
        cost_file = self.folder.with_suffix(".cost.json")
        if status_of(self.folder).get("state") != "done":
            begun = (self.folder / "config.toml").is_file()
            own = [f"--cohort.seed={self.cohort}", f"--run.seed={self.seed}", "--probe.labels="]
            own += [f"--run.dir={self.folder}", *shared.lend(self.folder)]
            command = ["smbfast.train", *shlex.split(self.words), *own]
            cost = command_in(self.bench.threads, command, self.folder.with_suffix(".log"))
            none = {"wall_s": None, "cpu_s": None}
            write_text(cost_file, json.dumps({**cost, **none} if begun else cost) + "\n")
        if not cost_file.is_file():
            return {"wall_s": None, "cpu_s": None}
        return dict(json.loads(cost_file.read_text()))

    def trained(self) -> PatientEncoder:
        """Return the encoder of the finished run."""
        encoder, _, _ = restore_final(self.folder / "final", torch.device("cpu"))
        return encoder

    def untrained(self, shared: Shared) -> PatientEncoder:
        """Return the encoder that the run began with."""
        own = shared.prepared
        return make_encoder(self.settings, own.tokenizer, torch.device("cpu"), own.new_tokens)


def command_in(threads: int, command: list[str], log: Path) -> dict[str, Any]:
    """Run `python -m COMMAND`, and return the wall and CPU seconds that it took.

    Raises:
        RunFailed: its status is not 0; `log` has what it printed.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    load_before, start = os.getloadavg()[0], time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env={**os.environ, **own},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RunFailed(f"{command[0]} ended with {done.returncode}; {log} has more")
    return {
        "wall_s": round(time.monotonic() - start, 2),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "load": round(load_before, 2),
        "threads": threads,
    }


def arms_of(text: str | None) -> dict[str, str]:
    """Return the words of each arm by its name.

    Raises:
        ValueError: an arm has no name, or one that is taken.
    """
    if text is None:
        return proof_arms()
    arms: dict[str, str] = {}
    for part in text.split(";"):
        name, colon, words = part.partition(":")
        name = name.strip()
        taken = name in (*arms, UNTRAINED, *BASELINES, FILTER)
        if not colon or not name.isidentifier() or taken:
            raise ValueError(
                "`arms` must be `name: words; name: words`, with a name of its own for each; got "
                f"{part.strip()!r}"
            )
        arms[name] = words.strip()
    return arms


def proof_arms() -> dict[str, str]:
    """Return the default run; its phases with SFT alone; those with a last one so much longer that
    they take as many seconds, 1.8 times the steps (and more FLOPs); and the default run without
    codes to come, which is what JEPA alone adds to SFT."""
    phases = load("default", []).phases
    alone = [
        f"--phases.{number}.{key}"
        for number, phase in enumerate(phases)
        for key in ("w_sft=1", "w_jepa=0", "w_codes=0")
        if phase.w_jepa > 0 or phase.w_codes > 0
    ]
    last = len(phases) - 1
    steps = phases[last].steps + sum(phase.steps for phase in phases) * 4 // 5
    sft = " ".join(alone)
    no_codes = " ".join(word for word in alone if word.endswith("w_codes=0"))
    longer = f"{sft} --phases.{last}.steps={steps}"
    return {"default": "", "sft": sft, "sft_longer": longer, "horizon": no_codes}


class Patients:
    """The patients of one cohort and the tokens of their nodes, made when they are first needed.

    Arms that read the same tokens share them.
    """

    def __init__(self, bench: CohortsBench) -> None:
        self._bench = bench
        self._shared: dict[str, Shared] = {}
        self._judged: dict[Path, Judged] = {}

    def shared(self, run: Run) -> Shared:
        """Return what a run reads."""
        key = shared_key(run.settings)
        if key not in self._shared:
            self._shared[key] = Shared.of(self._bench.work, run.settings)
        return self._shared[key]

    def judged(self, run: Run) -> Judged:
        """Return the labels and nodes that a run is judged by."""
        shared, bench = self.shared(run), self._bench
        folder = shared.prepared.folder
        if folder not in self._judged:
            data = judged_by(bench.work, shared.cohort, run.cohort, bench.patients, bench.split)
            window = run.settings.data.window
            self._judged[folder] = Judged.open(data, shared.prepared, window)
        return self._judged[folder]


def cohort_scores(bench: CohortsBench, cohort: int) -> tuple[Scores, dict[str, Any]]:
    """Return the scores of all arms, training seeds and baselines of a cohort, and what the record
    says of them, by the name of each run; what is missing is made."""
    patients, about, seeds = Patients(bench), dict[str, Any](), []
    arms = arms_of(bench.arms)
    for seed in bench.seeds:
        runs = [Run(bench, arm, words, cohort, seed) for arm, words in arms.items()]
        parts = [
            _stored(bench, run.folder.name, about, partial(_of_trained, patients, run))
            for run in runs
        ]
        name = f"{UNTRAINED}-{runs[0].folder.name}"
        parts.append(_stored(bench, name, about, partial(_of_untrained, patients, runs[0])))
        seeds.append(together(parts))
    run = Run(bench, *next(iter(arms.items())), cohort, bench.seeds[0])
    name = f"baselines-{cohort}-{shared_key(run.settings)}"
    fixed = _stored(bench, name, about, lambda: cohort_models.baselines(patients.judged(run)))
    return by_seed(seeds).beside(fixed), about


def _of_trained(patients: Patients, run: Run) -> tuple[Scores, dict[str, Any]]:
    cost = run.train(patients.shared(run))
    scores, about = cohort_models.read_out(run.arm, patients.judged(run), run.trained())
    header = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    return scores, {**about, "cost": cost, "run_git": header["git"]}


def _of_untrained(patients: Patients, run: Run) -> tuple[Scores, dict[str, Any]]:
    encoder = run.untrained(patients.shared(run))
    return cohort_models.read_out(UNTRAINED, patients.judged(run), encoder)


def _stored(
    bench: CohortsBench,
    name: str,
    about: dict[str, Any],
    make: Callable[[], tuple[Scores, dict[str, Any]]],
) -> Scores:
    """Return the scores in a file of `work`, made and written first if it is not there; what the
    record says of them goes to `about`."""
    size = "" if bench.split == "held_out" else f"-{bench.patients}"
    file = bench.work / "scores" / f"{name}-{bench.split}{size}.npz"
    if not file.is_file():
        start = time.monotonic()
        scores, own = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        with committed_file(file, private=True) as staging, open(staging, "wb") as out:
            scores.write(out, own)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    scores, about[name] = Scores.read(file)
    return scores


def estimates(bench: CohortsBench, own: dict[int, Areas]) -> dict[str, Estimates]:
    """Return AUROC, shares of the gap and differences, means over cohorts, with their draws."""
    each = [over_seeds(areas, cohort, len(own)) for cohort, areas in own.items()]
    pairs = pairs_of(list(arms_of(bench.arms)))
    return {
        "auroc": over_cohorts(each),
        "share": over_cohorts([shares(one) for one in each]),
        "difference": over_cohorts([differences(one, pairs) for one in each]),
    }


def pairs_of(arms: list[str]) -> list[tuple[str, str]]:
    """Return the models that are compared, under each read-out: the first arm with all others,
    and those behind the second with that one, their control at equal steps."""
    first, pairs = arms[0], []
    for name in READOUTS:
        rivals = [f"{other}/{name}" for other in (UNTRAINED, *arms[1:])]
        pairs += [(f"{first}/{name}", rival) for rival in (*rivals, *BASELINES)]
        pairs += [(f"{arm}/{name}", f"{arms[1]}/{name}") for arm in arms[2:]]
    return pairs


def bars(bench: CohortsBench, mean: dict[str, Estimates]) -> list[tuple[bool, str]]:
    """Return each bar of the proof in words with its figure, and whether it is reached.

    They are of the mean over cohorts and training seeds. The first two arms are the run that is
    judged and its control at equal steps.
    """
    first, *others = arms_of(bench.arms)
    run = f"{first}/{bench.readout}"
    lines = []
    for task in (*TASKS, MEAN):
        least = 0.75 if task == MEAN else 0.65
        share = mean["share"][run, task][0]
        lines.append((share >= least, f"{run}, {task}: share {share:.3f}, at least {least}"))
    wanted: list[tuple[str, str, str, float, bool]] = []  # a difference, its least, if it is clear
    for task in TASKS:
        wanted += [(run, f"{UNTRAINED}/{bench.readout}", task, 0.0, True)]
        wanted += [(run, COUNTS, task, 0.0, True), (run, BOOSTING, task, -0.01, False)]
    for task, other in product(DEATHS, others[:1]):
        wanted.append((f"{first}/last", f"{other}/last", task, 0.01, True))
    for one, other, task, least, clear in wanted:
        value, drawn_B = mean["difference"][f"{one} - {other}", task]
        low = resample.interval(value, drawn_B).low
        reached = value >= least and (not clear or (low is not None and low > 0))
        asked = f"at least {least:+g}" + (", its interval above zero" if clear else "")
        shown = _shown(resample.interval(value, drawn_B)._asdict(), "+")
        lines.append((reached, f"{one} - {other}, {task}: {shown}, {asked}"))
    return lines


def table(kinds: dict[str, Any]) -> str:
    """Return AUROC, shares and differences as a table, a line for each model."""
    blocks = []
    for kind, models in kinds.items():
        sign = "+" if kind == "difference" else ""
        rows = [[kind, *TASKS, MEAN]]
        for name, own in models.items():
            rows.append([name, *(_shown(own[task], sign) for task in (*TASKS, MEAN))])
        blocks.append(records.columns(rows))
    return "\n\n".join(blocks)


def _shown(cell: dict[str, Any], sign: str = "") -> str:
    if cell["low"] is None:
        return f"{cell['value']:{sign}.3f} [no interval]"
    return f"{cell['value']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def measure(bench: CohortsBench) -> tuple[dict[str, Any], list[tuple[bool, str]]]:
    """Return the record of all cohorts, and the bars.

    Raises:
        ValueError: `work` is in the repository, or `arms` cannot be read.
    """
    if bench.work.resolve().is_relative_to(ROOT):
        raise ValueError(f"`work` must be outside {ROOT}; {bench.work} is in it")
    arms_of(bench.arms)
    bench.work.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = records.stamp("cohorts", "cpu")
    about: dict[str, Any] = {}
    own = {}
    for cohort in bench.cohorts:
        scores, about[str(cohort)] = cohort_scores(bench, cohort)
        own[cohort] = areas(scores, bench.draws, cohort)
    looks = looked(bench) if bench.split == "held_out" else 0
    mean = estimates(bench, own)
    shown = {kind: cells(one) for kind, one in mean.items()}
    reached = bars(bench, mean)
    by_cohort = {}
    for cohort, one in own.items():
        alone = {kind: cells(e) for kind, e in estimates(bench, {cohort: one}).items()}
        runs = {
            f"{model}, {task}": value_S.tolist() for (model, task), value_S in one.of_seed.items()
        }
        by_cohort[str(cohort)] = {**alone, "of_seed": runs}
    record = {
        **stamp,
        **bench.model_dump(mode="json", exclude={"work", "save", "bars"}),
        "settings": settings_of(bench),
        "held_out_looks": looks,
        **shown,
        "bars": [{"reached": good, "bar": text} for good, text in reached],
        "by_cohort": by_cohort,
        "about": about,
    }
    if looks:
        print(f"Held-out figures of these runs were asked for {times(looks)}.\n")
    print(table(shown) + "\n")
    for good, text in reached:
        print(f"{'reached' if good else 'MISSED '}  {text}")
    print("\n" + seconds(about))
    return record, reached


def looked(bench: CohortsBench) -> int:
    """Record in every run's folder that its held-out figures are shown, as `--final` does, and
    return the largest number of times that this was done."""
    folders = {
        Run(bench, arm, words, cohort, seed).folder
        for arm, words in arms_of(bench.arms).items()
        for cohort, seed in product(bench.cohorts, bench.seeds)
    }
    return max(count_look(folder, f"{PROG} --split=held_out") for folder in folders)


def settings_of(bench: CohortsBench) -> dict[str, dict[str, Any]]:
    """Return the settings of each arm, as JSON values."""
    names = {"preset", "data", "cohort", "model", "optim", "objective", "phases"}
    return {
        arm: Run(bench, arm, words, bench.cohorts[0], bench.seeds[0]).settings.model_dump(
            mode="json", include=names, exclude_none=True
        )
        for arm, words in arms_of(bench.arms).items()
    }


def seconds(about: dict[str, dict[str, Any]]) -> str:
    """Return the mean seconds that training one run of each arm took, wall and CPU."""
    costs: dict[str, list[dict[str, Any]]] = {}
    for runs in about.values():
        for name, own in runs.items():
            if "cost" in own and own["cost"]["cpu_s"] is not None:
                costs.setdefault(name.split("-")[0], []).append(own["cost"])
    rows = [["seconds of a run", "wall", "CPU", "runs"]]
    for arm, own in costs.items():
        means = (f"{np.mean([cost[k] for cost in own]):.0f}" for k in ("wall_s", "cpu_s"))
        rows.append([arm, *means, str(len(own))])
    return records.columns(rows)


def main(argv: list[str] | None = None) -> None:
    bench = command_line(CohortsBench, argv, prog=PROG)
    bench = bench.model_copy(update={"work": bench.work.resolve()})
    torch.set_num_threads(bench.threads)
    with entry("bench.cohorts", stopped="what is in `work` is used again"):
        record, reached = measure(bench)
    if bench.save:
        print(f"1 record appended to {records.append('cohorts', [record])}")
    if bench.bars and not all(good for good, _ in reached):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
