"""python -m bench.peers: meds-tab as its users run it, on the rows of ours, and what it costs.

Of each task a copy is made as meds-tab wants it: files of at most 2,500 labelled subjects, with
their events up to the last prediction time. Then its commands run one after the other: `describe`,
`tabularize-static` and `tabularize-time-series` at the times of the labels (where `cache-task`
takes the same rows from features at all events, which take hours), and `xgboost` with its own
sweep, whose best trial by tuning AUROC predicts tuning and held_out. The predictions are written
for `python -m smbfast.probe --beside=meds_tab=FOLDER` and for `python -m smbfast.compare`. Beside
it, boosting on counts with values is fitted to the same rows by ours, as a process of its own. What
is printed and recorded is of tuning.

Shape suffixes: V views, N label rows, S labelled subjects, R label rows of a file, E events or
entries of a sparse matrix, K rows of a prediction file.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.data.labels import Labels, find_tasks, read_labels, with_splits
from smbfast.data.meds import STATIC, MedsDataset
from smbfast.data.splits import SPLITS
from smbfast.judging.predictions import write_predictions
from smbfast.judging.scored import Scored
from smbfast.probing.boosting import MOST_FEATURES, fit_boosting
from smbfast.probing.features import join
from smbfast.probing.values import code_values
from smbfast.statistics.resample import auroc

PROG = "python -m bench.peers"
PEER, LABEL, OURS = "meds_tab", "meds-tab (XGBoost)", "values_boosting"
AGGREGATIONS = (  # its own
    *("static/present", "static/first", "code/count"),
    *("value/count", "value/sum", "value/sum_sqd", "value/min", "value/max"),
)
PER_FILE = 2500  # subjects, as its guide says
JUDGES = ("tuning", "held_out")
ROOT = Path(__file__).parent.parent


class PeersBench(Settings):
    """Run meds-tab on binary tasks of a MEDS dataset, and write its predictions.

    It needs an environment of its own. It has its own defaults, all aggregations and windows, and
    a sweep of `trials` settings. A label row sees the events up to its prediction time, as in ours.
    Its model is chosen by tuning AUROC and is not calibrated. Nothing of held-out is printed: its
    predictions are in OUT/VIEW/held_out, those of tuning in OUT/VIEW/tuning. Features that are
    there are used again, so that a command that was ended goes on. meds-tab itself writes held-out
    figures of every trial into OUT/work, which are to be left alone until the end.
    """

    epilog: ClassVar[str] = """Examples

  Two tasks:
    python -m venv peer && peer/bin/pip install meds-tab==0.2.0
    python -m bench.peers --python=peer/bin/python --data=MEDS_FOLDER --out=meds-tab \\
      --labels=in_hospital_mortality,icu_los_72h

  What it adds to the table of a run, on tuning patients:
    python -m smbfast.probe --beside=meds_tab=meds-tab/MEDS_FOLDER/tuning ..."""

    python: Path = Field(
        description="Python interpreter of an environment in which meds-tab is installed."
    )
    data: list[Path] = Field(
        description="Folder of a MEDS dataset, or of several views of one that differ in their "
        "splits alone (folds): its features are made once for all of them."
    )
    out: Path = Field(description="Folder for the predictions, and for what meds-tab writes.")
    labels: list[str] = Field(description="Binary tasks, by name.")
    trials: int = Field(
        10,
        ge=1,
        description="Number of settings that the sweep tries. Its own default is 20.",
    )
    windows: list[str] = Field(
        ["1d", "7d", "30d", "365d", "full"],
        description="Windows before the prediction time that its features are of.",
    )
    threads: int = Field(1, ge=1, description="Threads of a process, of theirs and of ours.")
    ours: bool = Field(True, description="Fit our boosting on counts with values to the same rows.")
    save: bool = Field(False, description="Append the results to bench/results/peers.jsonl.")


@dataclass(frozen=True)
class Cost:
    """What a process and its children took."""

    wall_s: float
    cpu_s: float


def read_views(views: list[Path], task: str) -> tuple[Labels, np.ndarray]:
    """Return the labels of a task, in order of subject and time, and the splits in every view.

    Returns:
        Labels with the splits of the first view, and split_VN, str [V, N].

    Raises:
        ValueError: the views have other rows, or the task is not binary.
    """
    read: list[Labels] = []
    for view in views:
        labels = with_splits(read_labels(find_tasks([task], view)[0]), MedsDataset.open(view))
        labels = labels.take(np.lexsort((labels.time_N, labels.subject_N)))
        first = read[0] if read else labels
        same = np.array_equal(labels.subject_N, first.subject_N)
        if labels.kind != "binary" or not (same and np.array_equal(labels.time_N, first.time_N)):
            raise ValueError(f"{task} must be binary, with the same rows in every view")
        read.append(labels)
    return read[0], np.stack([labels.split_N for labels in read])


def write_parts(dataset: MedsDataset, labels: Labels, out: Path) -> list[slice]:
    """Write `out/data/all/NUMBER.parquet`, and the labels of the same subjects beside them.

    Returns the label rows of each file. Files hold subjects of every split: the static features of
    meds-tab take columns by place, and shift them where a file lacks a static code.
    """
    subject_S, first_S = np.unique(labels.subject_N, return_index=True)
    first_S = np.append(first_S, len(labels))
    parts = []
    for number, start in enumerate(range(0, len(subject_S), PER_FILE)):
        part = slice(first_S[start], first_S[min(start + PER_FILE, len(subject_S))])
        rows = labels.take(np.arange(part.start, part.stop))
        for kind, table in (("data", _events(dataset, rows)), ("labels", _label_table(rows))):
            (out / kind / "all").mkdir(parents=True, exist_ok=True)
            pq.write_table(table, out / kind / "all" / f"{number}.parquet")
        parts.append(part)
    return parts


def _events(dataset: MedsDataset, rows: Labels) -> pa.Table:
    """Return the events of the labelled subjects, each up to its last prediction time, in order of
    subject and time (none first), and as the dataset has them where that is equal."""
    subject_S, place_N = np.unique(rows.subject_N, return_inverse=True)
    last_S = np.full(len(subject_S), STATIC)
    np.maximum.at(last_S, place_N, rows.time_N)
    parts = []
    for split in SPLITS:
        for batch in dataset.batches(split, subject_S, text_chars=0):
            seen_E = batch.time_N <= last_S[np.searchsorted(subject_S, batch.subject_N)]
            time_E = batch.time_N[seen_E]
            columns = {
                "subject_id": pa.array(batch.subject_N[seen_E]),
                "time": pa.array(time_E, mask=time_E == STATIC).cast(pa.timestamp("us")),
                "code": pa.array(batch.codes).take(pa.array(batch.code_N[seen_E])),
                "numeric_value": pa.array(batch.value_N[seen_E], pa.float32(), from_pandas=True),
            }
            parts.append((np.stack([batch.subject_N[seen_E], time_E]), pa.table(columns)))
    key_2E = np.concatenate([key for key, _ in parts], 1)
    order_E = np.lexsort((key_2E[1], key_2E[0]))  # stable; STATIC is the least time
    return pa.concat_tables([table for _, table in parts]).take(pa.array(order_E))


def _label_table(rows: Labels) -> pa.Table:
    return pa.table(
        {
            "subject_id": pa.array(rows.subject_N),
            "prediction_time": pa.array(rows.time_N).cast(pa.timestamp("us")),
            "boolean_value": pa.array(rows.binary_N),
        }
    )


def run(words: list[str], log: Path, environment: dict[str, str]) -> Cost:
    """Run a command, whose output goes to the end of `log`.

    Raises:
        ValueError: it failed.
    """
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            words, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{Path(words[0]).name} ended with {done.returncode}; {log} has more")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.monotonic() - start, cpu_s)


def tabularize(bench: PeersBench, work: Path) -> dict[str, Cost]:
    """Make the features of all rows: what is there already stays. Returns what every command took,
    with earlier ones that began the same features."""
    aggs = usable(sorted((work / "data" / "all").glob("*.parquet")))
    (work / "aggs.json").write_text(json.dumps(aggs))
    words = [f"input_dir={work / 'data'}", f"output_dir={work / 'tab'}", "do_overwrite=False"]
    own = [f"input_label_dir={work / 'labels'}", *_tabularization(bench, aggs)]
    costs = {}
    for name in ("describe", "tabularize-static", "tabularize-time-series"):
        if name == "tabularize-static" and not any(agg.startswith("static") for agg in aggs):
            continue
        more = own if name != "describe" else []
        costs[name] = run([_program(bench, name), *words, *more], work / "log", _own(bench))
        print(f"{name}: {costs[name].cpu_s:.0f} CPU s", file=sys.stderr)
    before = work / "costs.json"
    for name, cost in (json.loads(before.read_text()) if before.is_file() else {}).items():
        costs[name] = Cost(costs[name].wall_s + cost["wall_s"], costs[name].cpu_s + cost["cpu_s"])
    before.write_text(json.dumps({name: asdict(cost) for name, cost in costs.items()}))
    return costs


def usable(files: list[Path]) -> list[str]:
    """Return the aggregations that it can make of the events in `files`.

    Where no code without a time has a value, `static/first` ends with an error; where a subject has
    no event without a time, both static ones give its features to another.
    """
    values, num_static, num_subjects = 0, 0, 0
    for file in files:
        table = pq.read_table(file, columns=["subject_id", "time", "numeric_value"])
        static = table.filter(table["time"].is_null())
        values += static["numeric_value"].length() - static["numeric_value"].null_count
        num_static += len(static["subject_id"].unique())
        num_subjects += len(table["subject_id"].unique())
    with_value, everyone = values > 0, num_static == num_subjects
    left_out = {"static/first"} if everyone and not with_value else set()
    left_out |= set() if everyone else {"static/first", "static/present"}
    return [agg for agg in AGGREGATIONS if agg not in left_out]


def divide(work: Path, folder: Path, parts: list[slice], split_N: np.ndarray) -> None:
    """Write the rows of each split of a view, of the features and labels of all: a file of theirs
    holds value, row and column of each entry, [3, E]."""
    shutil.rmtree(folder, ignore_errors=True)
    made = work / "tab" / "tabularize" / "all"
    for number, part in enumerate(parts):
        labels = pq.read_table(work / "labels" / "all" / f"{number}.parquet")
        for split in SPLITS:
            mine_R = split_N[part] == split
            if not mine_R.any():
                continue
            (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
            file = folder / "labels" / split / f"{number}.parquet"
            pq.write_table(labels.filter(pa.array(mine_R)), file)
            new_R = np.cumsum(mine_R) - 1
            for source in sorted((made / str(number)).rglob("*.npz")):
                with np.load(source) as held:
                    entry_3E, shape = held["array"], held["shape"]
                row_E = entry_3E[1].astype(np.int64)
                entry_3E = entry_3E.astype(np.float64)[:, mine_R[row_E]]
                entry_3E[1] = new_R[row_E[mine_R[row_E]]]
                target = folder / "tab" / split / source.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                np.savez(target, array=entry_3E, shape=np.array([mine_R.sum(), shape[1]]))


def boost(bench: PeersBench, work: Path, folder: Path) -> Cost:
    """Run the sweep on the rows that lie divided in `folder`."""
    words = [
        "--multirun",
        f"input_dir={work / 'data'}",
        f"output_dir={work / 'tab'}",
        f"output_model_dir={folder / 'models'}",
        "task_name=null",
        f"input_tabularized_cache_dir={folder / 'tab'}",
        f"input_label_cache_dir={folder / 'labels'}",
        f"hydra.sweeper.n_trials={bench.trials}",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweeper.max_failure_rate=0.2",
        f"model_launcher.model.nthread={bench.threads}",
        # its sweep draws it from 10 to a million, which left none of ten trials on eICU with a code
        "tabularization.min_code_inclusion_count=10",
    ]
    aggs = json.loads((work / "aggs.json").read_text())
    words += _tabularization(bench, aggs)
    return run([_program(bench, "xgboost"), *words], work / "log", _own(bench))


def _tabularization(bench: PeersBench, aggs: list[str]) -> list[str]:
    return [
        f"tabularization.aggs=[{','.join(aggs)}]",
        f"tabularization.window_sizes=[{','.join(bench.windows)}]",
    ]


def _program(bench: PeersBench, name: str) -> str:
    return str(bench.python.parent / f"meds-tab-{name}")


def _own(bench: PeersBench) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "OPENBLAS_NUM_THREADS")
    path = f"{bench.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**dict.fromkeys(names, str(bench.threads)), "PATH": path, "PYTHONPATH": ""}


def predictions(folder: Path, split: str, rows: Labels) -> np.ndarray:
    """Return the probability of each row by the best trial of the newest sweep, float64 [N].

    Raises:
        ValueError: it predicted other rows.
    """
    sweep = max(path for path in (folder / "models").iterdir() if path.is_dir())
    table = pq.read_table(sweep / "best_trial" / f"{split}_predictions.parquet")
    subject_K = table["subject_id"].to_numpy()
    time_K = table["prediction_time"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    row_N = join(rows.subject_N, rows.time_N, subject_K, time_K)
    value_K = table["boolean_value"].to_numpy(zero_copy_only=False).astype(bool)
    if len(table) != len(rows) or (row_N < 0).any() or (value_K[row_N] != rows.binary_N).any():
        raise ValueError(f"{PEER} must predict the {len(rows)} rows of {split}, each once")
    return table["predicted_boolean_probability"].to_numpy().astype(np.float64)[row_N]


def ours(view: str, task: str, file: str) -> None:
    """Fit boosting on counts with values to the rows of a task; write its tuning AUROC."""
    dataset = MedsDataset.open(Path(view))
    labels = with_splits(read_labels(find_tasks([task], Path(view))[0]), dataset)
    train_N, tuning_N = labels.split_N == "train", labels.split_N == "tuning"
    labels = labels.take(train_N | tuning_N)
    train_N, tuning_N = labels.split_N == "train", labels.split_N == "tuning"
    values = code_values(dataset, labels.subject_N, labels.time_N)
    key = labels.subject_N, labels.time_N, train_N
    feature_NF = values.features(*key, most=MOST_FEATURES)
    fit = fit_boosting(feature_NF, labels.binary_N, labels.split_N)
    own = area(fit.probability_N[tuning_N], labels.binary_N[tuning_N])
    Path(file).write_text(json.dumps({"tuning_auroc": own}))


def area(score_N: np.ndarray, true_N: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    return float(auroc(score_N, true_N)(np.ones((1, len(true_N)), np.int32))[0])


def measure(bench: PeersBench, task: str) -> list[dict[str, Any]]:
    """Return a record for each view, after its predictions were written."""
    work = (bench.out / "work" / task).resolve()
    labels, split_VN = read_views(bench.data, task)
    parts = write_parts(MedsDataset.open(bench.data[0]), labels, work)
    features = tabularize(bench, work)
    rows = []
    for view, split_N in zip(bench.data, split_VN, strict=True):
        folder = work / "views" / view.name
        divide(work, folder, parts, split_N)
        sweep = boost(bench, work, folder)
        record: dict[str, Any] = {"task": task, "view": view.name, "trials": bench.trials}
        record |= {"windows": bench.windows, "threads": bench.threads}
        record["rows"] = {split: int((split_N == split).sum()) for split in SPLITS}
        for split in JUDGES:
            mine = labels.take(split_N == split)
            score_N = predictions(folder, split, mine)
            peer = Scored(PEER, LABEL, "beside", score_N[None])
            write_predictions(bench.out / view.name / split, mine, [peer], split)
            if split == "tuning":
                record["tuning_auroc"] = {PEER: area(score_N, mine.binary_N)}
        if bench.ours:
            record["tuning_auroc"][OURS], cost = beside(bench, work, view, task)
            record["cost"] = {OURS: asdict(cost)}
        costs = {name: asdict(cost) for name, cost in (features | {"xgboost": sweep}).items()}
        record["cost"] = costs | record.get("cost", {})
        print(json.dumps(record), file=sys.stderr)
        rows.append(record)
    return rows


def beside(bench: PeersBench, work: Path, view: Path, task: str) -> tuple[float, Cost]:
    """Return the tuning AUROC of our boosting, and what its process took."""
    said = work / "ours.json"
    call = f"import bench.peers as p; p.ours({str(view)!r}, {task!r}, {str(said)!r})"
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    cost = run([sys.executable, "-c", call], work / "log", _own(bench) | paths)
    return float(json.loads(said.read_text())["tuning_auroc"]), cost


def table(rows: list[dict[str, Any]]) -> str:
    """For people: tuning AUROC and CPU seconds of both; those of features are of all views."""
    cells = [["view", "task", "rows", PEER, "ours", "CPU s: features", "sweep", "ours"]]
    for row in rows:
        spent = {name: cost["cpu_s"] for name, cost in row["cost"].items()}
        both = [row["tuning_auroc"].get(name) for name in (PEER, OURS)]
        features = sum(spent[name] for name in spent if name not in ("xgboost", OURS))
        times = [features, spent["xgboost"], spent.get(OURS)]
        cells.append([row["view"], row["task"], str(row["rows"]["tuning"])])
        cells[-1] += ["-" if area is None else f"{area:.3f}" for area in both]
        cells[-1] += ["-" if s is None else f"{s:.0f}" for s in times]
    return records.columns(cells, "  ")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and, if asked, record."""
    bench = command_line(PeersBench, argv, prog=PROG)
    stamp = records.stamp("peers", "cpu")
    try:
        if not Path(_program(bench, "xgboost")).is_file():
            raise ValueError(f"`python` must have meds-tab beside it; {bench.python} has not")
        rows = [record for task in bench.labels for record in measure(bench, task)]
    except ValueError as error:
        raise SystemExit(f"{PROG}: {error}") from None
    print("AUROC on tuning, by which the trial was chosen:\n" + table(rows))
    if bench.save:
        print(f"written to {records.append('peers', [stamp | row for row in rows])}")


if __name__ == "__main__":
    main()
