"""python -m bench.cohorts: what a run's embeddings say of patients simulated for that alone.

For each cohort seed S a run is trained, or taken if it is finished. Its `final` model embeds its
own patients of train and tuning, and patients of another cohort, with seed S + 100,000. The probe
of `smbfast.probe` is fitted on train, its penalty chosen on tuning, and scored on the others.
Beside it stand the bag of the run's own tokens and code counts, under the same probe, and the Bayes
filter.

Another version is run from its own checkout (`--tree`), and nothing of it is imported: it is known
by its commands and the files that they write. Two variants that were measured on the same patients
are compared pair by pair.

Legend: N label rows of all tasks, P patients, B draws, R rows of one task.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_matrix

from bench import records
from bench.cohort_data import (
    APART,
    TASKS,
    bag_features,
    bag_of_tokens,
    digest,
    joined,
    rows_of,
)
from smbfast.base.config import Settings, command_line, read_toml
from smbfast.base.entry import RunFailed, entry
from smbfast.base.files import write_text
from smbfast.data.labels import Labels, read_labels
from smbfast.data.meds import MedsDataset
from smbfast.probing import resample
from smbfast.probing.counts import count_codes
from smbfast.probing.features import matched, read_embeddings, read_oracle
from smbfast.probing.logistic import fit_logistic

PROG = "python -m bench.cohorts"
ROOT = Path(__file__).resolve().parents[1]
MEAN = "mean"  # of the tasks, or of the seeds
MODELS = {"run": "embeddings", "bag": "bag of tokens", "counts": "code counts", "filter": "filter"}
_DRAWS_AT_ONCE = 50  # draws whose weights are held together: 6 MB for 16,000 patients
_SECONDS = ("wall_s", "cpu_s")
Key = tuple[str, str]  # model and task
Areas = dict[Key, tuple[float, np.ndarray]]  # AUROC on all patients, and in each draw [B]


class CohortsBench(Settings):
    """Measure what runs on simulated cohorts are worth, on patients simulated for that alone.

    A run with cohort seed S is probed on the held_out patients of the cohort with seed S + 100,000:
    of 64,000 patients these are about 16,000. AUROC of three binary tasks, with 95 % intervals by
    resampling patients; differences between variants are on the same patients and draws.

    With a bar, the command ends with status 1 unless the variant beats the other one by as much on
    every seed, in no more CPU seconds.
    """

    epilog: ClassVar[str] = """Examples

  Train and measure the default run on three cohorts, and record it:
    python -m bench.cohorts --name=new --seeds=21,22,23 --work=FOLDER --save

  An older version, from its own checkout:
    git worktree add OLD COMMIT
    python -m bench.cohorts --name=old --tree=OLD --seeds=21,22,23 --work=FOLDER --save

  Compare the two:
    python -m bench.cohorts --name=new --seeds=21,22,23 --work=FOLDER --against=old --bar=0.04

  Try a setting on another cohort, without looking at any held_out patient:
    python -m bench.cohorts --name=wide --train="--optim.batch=32" --seeds=31 --split=tuning \\
        --work=FOLDER"""

    name: str = Field(
        pattern=r"^[\w.]+$",
        description="Name of the variant. Its run with cohort seed S is the folder <name>-S in "
        "`work`; if that is a finished run, it is measured as it is.",
    )
    seeds: list[int] = Field(min_length=1, description="Seeds of the cohorts that runs train on.")
    work: Path = Field(
        description="Folder outside the repository for runs, simulated patients, embeddings and "
        "scores. What is there is used again."
    )
    tree: Path = Field(
        ROOT, description="Checkout whose smbfast trains and embeds; by default this one."
    )
    train: str = Field(
        "",
        description="Further arguments of `python -m smbfast.train`, as one string: a preset or "
        "settings. They are given to runs that are not there yet.",
    )
    against: str | None = Field(
        None, description="Name of a variant, measured before, to which differences are taken."
    )
    patients: int = Field(
        64_000,
        ge=200,
        description="Number of patients of the separate cohort, all splits together: about 25 % "
        "are held_out and 15 % tuning. Only those of `split` are kept.",
    )
    split: Literal["held_out", "tuning"] = Field(
        "held_out",
        description="The split of the separate cohort whose patients are scored. Choose settings "
        "on `tuning`, so that nobody has looked at held_out when it judges.",
    )
    pool: Literal["last", "mean"] = Field("mean", description="How embeddings are pooled.")
    bag: bool = Field(True, description="Whether the bag of the run's own tokens is measured.")
    draws: int = Field(1000, ge=2, description="Number of resamples of the patients.")
    threads: int = Field(1, ge=1, description="Threads of every process.")
    bar: float | None = Field(
        None, description="The gain in mean AUROC over `against` that every seed must show."
    )
    save: bool = Field(False, description="Append the results to bench/results/cohorts.jsonl.")


@dataclass(frozen=True)
class Scores:
    """What every model says of the patients that judge, all tasks below each other."""

    task_N: np.ndarray  # str
    subject_N: np.ndarray  # int64
    time_N: np.ndarray  # int64 microseconds since 1970
    true_N: np.ndarray  # bool
    models: dict[str, np.ndarray]  # float64 [N] each, a probability

    @classmethod
    def of(cls, parts: list["Scores"]) -> "Scores":
        """Put the scores of several tasks, by the same models, below each other."""
        return cls(
            np.concatenate([part.task_N for part in parts]),
            np.concatenate([part.subject_N for part in parts]),
            np.concatenate([part.time_N for part in parts]),
            np.concatenate([part.true_N for part in parts]),
            {name: np.concatenate([p.models[name] for p in parts]) for name in parts[0].models},
        )

    def beside(self, other: "Scores") -> "Scores":
        """Return the scores with the models of `other` as well.

        Raises:
            ValueError: the two are of other nodes or outcomes, or in another order.
        """
        for name in ("task_N", "subject_N", "time_N", "true_N"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(
                    f"two variants must be scored on the same patients; they differ in {name}"
                )
        return replace(self, models={**self.models, **other.models})


def trained(settings: CohortsBench, seed: int) -> tuple[Path, dict[str, Any]]:
    """Return the run folder of a seed and what it cost; train it if it is not there.

    Wall and CPU seconds are those of the whole command, simulating and probing included. They are
    None for a finished run that something else started, and that has no file of them.

    Raises:
        ValueError: the folder holds an unfinished run, or one with another cohort.
        RunFailed: training failed.
    """
    run = settings.work / f"{settings.name}-{seed}"
    if not run.exists():
        words = shlex.split(settings.train)
        own = [f"--cohort.seed={seed}", f"--run.dir={run}"]
        command = ["smbfast.train", *words, *own]
        cost = command_in(settings, command, settings.work / f"{run.name}.log")
        write_text(_cost_file(run), json.dumps(cost, indent=1) + "\n")
    try:
        state = json.loads((run / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        state = "unknown"
    if state != "done":
        raise ValueError(f"{run} must hold a finished run, its state is {state}; remove it")
    config = read_toml(run / "config.toml")
    if config.get("cohort", {}).get("seed") != seed or "path" in config["data"]:
        raise ValueError(f"{run} must hold a run on the simulated cohort with seed {seed}")
    file = _cost_file(run)
    cost = json.loads(file.read_text()) if file.is_file() else {"wall_s": None, "cpu_s": None}
    return run, cost


def command_in(settings: CohortsBench, command: list[str], log: Path) -> dict[str, Any]:
    """Run `python -m COMMAND` of the tree, and return the wall and CPU seconds that it took.

    Raises:
        RunFailed: its status is not 0; `log` has what it printed.
    """
    tree, threads = settings.tree.resolve(), str(settings.threads)
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    load, start = os.getloadavg()[0], time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env={**os.environ, **own},
            cwd=tree,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RunFailed(f"{command[0]} of {tree} ended with {done.returncode}; {log} has more")
    return {
        "wall_s": time.monotonic() - start,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "load": round(load, 2),
        "threads": settings.threads,
        "measured_by": "this harness",
    }


def _cost_file(run: Path) -> Path:
    return run.parent / f"{run.name}.cost.json"


def scored(settings: CohortsBench, seed: int, run: Path) -> tuple[Scores, dict[str, Any]]:
    """Embed what is not embedded yet, fit the probes and score the patients that judge.

    Returns the scores with what is said of them in the record: penalties, sizes, a reason why there
    is no bag.
    """
    data, embeddings = _inputs(settings, seed, run)
    if not embeddings.is_file():
        words = [f"--model={run / 'final'}", f"--data={data}", f"--labels={','.join(TASKS)}"]
        words += [f"--out={embeddings}", f"--pool={settings.pool}"]
        command_in(settings, ["smbfast.embed", *words], embeddings.with_suffix(".log"))
    tasks = [read_labels(data / "labels" / task) for task in TASKS]
    subject_K, time_K = (
        np.concatenate([getattr(task, name) for task in tasks]) for name in ("subject_N", "time_N")
    )
    subject_K, time_K = np.unique(np.stack([subject_K, time_K]), axis=1)
    counts = count_codes(MedsDataset.open(data), subject_K, time_K)
    own = run / f"cohort-{_patients(run)}-{seed}"
    about: dict[str, Any] = {"own_patients": digest(own), "chosen": {}, "rows": {}, "positive": {}}
    bag_KV = None
    if settings.bag:
        try:
            bag_KV = bag_of_tokens(run / "final", data, subject_K, time_K)
        except ValueError as error:
            about["no_bag"] = str(error)
    parts = []
    for labels in tasks:
        train_N = labels.split_N == "train"
        count_NC = counts.features(labels.subject_N, labels.time_N, train_N)
        features = {"run": embedded(labels, embeddings), "counts": count_NC}
        if bag_KV is not None:
            row_N = rows_of(labels.subject_N, labels.time_N, subject_K, time_K)
            features["bag"] = bag_features(bag_KV, row_N, count_NC[:, :2], train_N)
        parts.append(_probed(labels, features, about))
        file = data / "oracles" / labels.task / "held_out.parquet"
        held = labels.take(labels.split_N == "held_out")
        parts[-1].models["filter"] = read_oracle(file, held)["bayes_filter"]
    return Scores.of(parts), about


def _patients(run: Path) -> int:
    return read_toml(run / "config.toml")["cohort"]["patients"]


def _inputs(settings: CohortsBench, seed: int, run: Path) -> tuple[Path, Path]:
    """Return the joined data of a run, and the file of its embeddings."""
    own = run / f"cohort-{_patients(run)}-{seed}"
    data = joined(settings.work, own, seed, settings.patients, settings.split)
    parts = [run.name, str(settings.patients), settings.split, settings.pool, "embeddings.parquet"]
    return data, settings.work / ".".join(parts)


def embedded(labels: Labels, embeddings: Path) -> np.ndarray:
    """Return the embedding of each label row, float64 [N, D].

    Raises:
        ValueError: a row has none.
    """
    own = read_embeddings(embeddings)
    row_N = matched(labels, own)
    if missing := int(np.sum(row_N < 0)):
        raise ValueError(
            f"{embeddings} must have every label row of {labels.task}; {missing} of {len(labels)} "
            "are missing"
        )
    return own.embedding_MD[row_N].astype(np.float64)


def _probed(
    labels: Labels, features: dict[str, np.ndarray | csr_matrix], about: dict[str, Any]
) -> Scores:
    """Fit the probes of one task and score its held-out rows; what was chosen goes to `about`."""
    held_N = labels.split_N == "held_out"
    held, models = labels.take(held_N), {}
    for name, feature_NF in features.items():
        fit = fit_logistic(feature_NF, labels.binary_N, labels.split_N)
        models[name] = fit.probability_N[held_N]
        about["chosen"].setdefault(name, {})[labels.task] = fit.penalty
    about["rows"][labels.task] = labels.counts()
    about["positive"][labels.task] = labels.positives()
    task_R = np.full(len(held), labels.task)
    return Scores(task_R, held.subject_N, held.time_N, held.binary_N, models)


def areas(scores: Scores, draws: int, seed: int) -> Areas:
    """Return the AUROC of every model and task, and its mean over the tasks, with its draws.

    A draw takes patients with replacement, all tasks and models alike. So any difference, and the
    mean over the tasks, can be taken draw by draw.
    """
    subject_P, at_N = np.unique(scores.subject_N, return_inverse=True)
    tasks = [task for task in TASKS if task in scores.task_N]
    rows = {task: np.flatnonzero(scores.task_N == task) for task in tasks}
    metrics = {
        (model, task): resample.auroc(score_N[rows[task]], scores.true_N[rows[task]])
        for model, score_N in scores.models.items()
        for task in tasks
    }
    whole_1N = np.ones((1, len(at_N)), np.int32)
    values = {key: float(metric(whole_1N[:, rows[key[1]]])[0]) for key, metric in metrics.items()}
    drawn = {key: np.empty(draws) for key in metrics}
    for start in range(0, draws, _DRAWS_AT_ONCE):
        chosen = range(start, min(start + _DRAWS_AT_ONCE, draws))
        weight_BN = resample.patient_weights(subject_P, chosen, seed)[:, at_N]
        for key, metric in metrics.items():
            drawn[key][chosen.start : chosen.stop] = metric(weight_BN[:, rows[key[1]]])
    for model in scores.models:
        own = [(model, task) for task in tasks]
        values[model, MEAN] = float(np.mean([values[key] for key in own]))
        drawn[model, MEAN] = np.mean([drawn[key] for key in own], axis=0)
    return {key: (value, drawn[key]) for key, value in values.items()}


def mean_areas(seeds: list[Areas]) -> Areas:
    """Return the mean over cohorts, whose patients and draws are independent of each other."""
    keys = [key for key in seeds[0] if all(key in own for own in seeds)]
    return {
        key: (
            float(np.mean([own[key][0] for own in seeds])),
            np.mean([own[key][1] for own in seeds], axis=0),
        )
        for key in keys
    }


def difference(own: Areas, one: str, other: str) -> dict[str, dict[str, float | None]]:
    """Return one model's AUROC less another's, by task, with intervals."""
    return {
        task: _cell(
            own[one, task][0] - own[other, task][0], own[one, task][1] - own[other, task][1]
        )
        for task in (*TASKS, MEAN)
        if (one, task) in own and (other, task) in own
    }


def _cell(value: float, drawn_B: np.ndarray) -> dict[str, float | None]:
    return resample.interval(value, drawn_B)._asdict()


def with_other(settings: CohortsBench, seed: int, scores: Scores) -> Scores:
    """Return the scores with those of the run of variant `against`, as a model of that name.

    Its embeddings are probed anew, so that both have the same probe, whatever the version was that
    measured the other one before.

    Raises:
        ValueError: the other variant has no embeddings of these patients, or not of the same.
    """
    name = str(settings.against)
    run = settings.work / f"{name}-{seed}"
    if not (run / "config.toml").is_file():
        raise ValueError(f"`against` must be measured before: there is no run {run}")
    data, embeddings = _inputs(settings, seed, run)
    if not embeddings.is_file():
        raise ValueError(f"`against` must be measured before: {embeddings} does not exist")
    about: dict[str, Any] = {"chosen": {}, "rows": {}, "positive": {}}
    tasks = [read_labels(data / "labels" / task) for task in TASKS]
    parts = [_probed(labels, {name: embedded(labels, embeddings)}, about) for labels in tasks]
    return scores.beside(Scores.of(parts))


def judged(
    gains: dict[int, float], costs: dict[int, tuple[float | None, float | None]], bar: float
) -> list[str]:
    """Return what misses the bar, in words; nothing if all is well.

    Args:
        gains: by seed, the gain in mean AUROC.
        costs: by seed, CPU seconds of the run and of the one it is compared with.
    """
    bad = [
        f"seed {seed}: {gain:+.4f} mean AUROC, and the bar is {bar:+.4f}"
        for seed, gain in gains.items()
        if not gain >= bar
    ]
    for seed, (own, other) in costs.items():
        if own is None or other is None:
            bad.append(f"seed {seed}: the cost of a run is unknown")
        elif own > other:
            bad.append(f"seed {seed}: {own:.0f} CPU seconds, and the other run took {other:.0f}")
    return bad


def _record(
    settings: CohortsBench, seed: int | str, own: Areas, more: dict[str, Any]
) -> dict[str, Any]:
    """Return what a record says of one seed, or of the mean over the seeds."""
    models = list(dict.fromkeys(model for model, _ in own))
    tasks = [task for task in (*TASKS, MEAN) if ("run", task) in own]
    pairs = [("run", other) for other in models if other not in ("run", "filter")]
    return {
        "variant": settings.name,
        "seed": seed,
        "split": settings.split,
        "patients": settings.patients,
        "pool": settings.pool,
        "draws": settings.draws,
        "auroc": {m: {task: _cell(*own[m, task]) for task in tasks} for m in models},
        "differences": {f"{a} - {b}": difference(own, a, b) for a, b in pairs},
        **more,
    }


def _run_record(settings: CohortsBench, run: Path, cost: dict[str, Any]) -> dict[str, Any]:
    """Return what a record says of a run: its version, its settings, what it cost."""
    config = read_toml(run / "config.toml")
    header = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    names = ("preset", "data", "cohort", "model", "optim", "objective", "phases")
    return {
        "run_git": header["git"],
        "run_seed": config["run"]["seed"],
        "settings": {name: config[name] for name in names if name in config},
        "tokens": header["data"]["tokens"],
        "cost": cost,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Return the records as a table: a block for each seed and the mean, a line for each model."""
    blocks = []
    for line in lines:
        rows = [[f"seed {line['seed']}", *TASKS, MEAN]]
        for name, cells in line["auroc"].items():
            rows.append([MODELS.get(name, name), *(_shown(cells.get(t)) for t in (*TASKS, MEAN))])
        for name, cells in line["differences"].items():
            rows.append([name, *(_shown(cells.get(t), "+") for t in (*TASKS, MEAN))])
        blocks.append(records.columns(rows))
        if "cost" in line:
            seconds = [f"{line['cost'][k]:.0f}" if line["cost"][k] else "?" for k in _SECONDS]
            blocks[-1] += f"\n{seconds[0]} s of wall time, {seconds[1]} CPU seconds"
    return "\n\n".join(blocks)


def _shown(cell: dict[str, float | None] | None, sign: str = "") -> str:
    if cell is None:
        return "-"
    if cell["low"] is None:
        return f"{cell['value']:{sign}.3f} [no interval]"
    return f"{cell['value']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def measure(settings: CohortsBench) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a record for each seed and one for their mean, and what misses the bar."""
    if settings.work.resolve().is_relative_to(ROOT):
        raise ValueError(f"`work` must be outside {ROOT}; {settings.work} is in it")
    if settings.bar is not None and settings.against is None:
        raise ValueError("`bar` needs the variant that must be beaten, `against`")
    if settings.against in MODELS:
        raise ValueError(f"`against` must be none of {', '.join(MODELS)}, got {settings.against}")
    settings.work.mkdir(parents=True, exist_ok=True)
    stamp = records.stamp("cohorts", "cpu")
    lines, all_areas, gains, costs = [], [], {}, {}
    for seed in settings.seeds:
        run, cost = trained(settings, seed)
        scores, about = scored(settings, seed, run)
        more = {**_run_record(settings, run, cost), **about, "separate_seed": seed + APART}
        if settings.against is not None:
            scores = with_other(settings, seed, scores)
        own = areas(scores, settings.draws, seed)
        all_areas.append(own)
        if settings.against is not None:
            name = settings.against
            gains[seed] = own["run", MEAN][0] - own[name, MEAN][0]
            file = _cost_file(settings.work / f"{settings.against}-{seed}")
            other = json.loads(file.read_text()) if file.is_file() else {"cpu_s": None}
            costs[seed] = (cost["cpu_s"], other["cpu_s"])
            more["cost_against"] = other
        lines.append({**stamp, **_record(settings, seed, own, more)})
        print(table(lines[-1:]) + "\n", flush=True)
    if len(lines) > 1:
        mean = _record(settings, MEAN, mean_areas(all_areas), {"seeds": settings.seeds})
        lines.append({**stamp, **mean})
        print(table(lines[-1:]) + "\n")
    bar = settings.bar
    return lines, [] if bar is None else judged(gains, costs, bar)


def main(argv: list[str] | None = None) -> None:
    settings = command_line(CohortsBench, argv, prog=PROG)
    settings = settings.model_copy(
        update={"work": settings.work.resolve(), "tree": settings.tree.resolve()}
    )
    torch.set_num_threads(settings.threads)
    with entry("bench.cohorts", stopped="what is in `work` is used again"):
        lines, bad = measure(settings)
    if settings.save:
        print(f"{len(lines)} records appended to {records.append('cohorts', lines)}")
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
