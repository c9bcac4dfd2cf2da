"""Mistakes in files that training reads: MEDS data, labels, run folders and shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.factory import SPLITS, at, write_labels
from tests.mistakes.case import mistakes
from tests.mistakes.typed import PREPARE, RUN

CHECK = "check tiny --run.dir=new --data.path=meds"
TASK = f"{CHECK} --probe.labels=task"
EVENTS = "meds/data/train/0.parquet"
SAME = "train tiny --data.path=meds --run.dir=run --probe.labels=task --data.window=256"


def changed(file: str, change: Callable[[pa.Table], pa.Table], name: str) -> Callable[[Path], None]:
    """What changes one table."""

    def make(here: Path) -> None:
        pq.write_table(change(pq.read_table(here / file)), here / file)

    make.__name__ = name
    return make


def column(name: str, values: Callable[[pa.ChunkedArray], pa.Array]) -> Callable:
    """A table with other values in one column."""

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, values(table[name]))

    return change


def patient_column(here: Path) -> None:
    changed(EVENTS, lambda t: t.rename_columns(["PatientID", *t.column_names[1:]]), "")(here)


def values_not_a_number(here: Path) -> None:
    nan = column("numeric_value", lambda v: pa.array([float("nan")] * len(v), pa.float32()))
    changed(EVENTS, nan, "")(here)


def everything_twice(here: Path) -> None:
    keys = [("subject_id", "ascending"), ("time", "ascending")]
    changed(EVENTS, lambda t: pa.concat_tables([t, t]).sort_by(keys), "")(here)


def csv_in_place_of_parquet(here: Path) -> None:
    for file in (here / "meds" / "data").rglob("*.parquet"):
        file.rename(file.with_suffix(".csv"))


def pointer_of_git_lfs(here: Path) -> None:
    (here / EVENTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 1234\n")


def two_descriptions(here: Path) -> None:
    table = pa.table({"code": ["LAB//glucose"] * 2, "description": ["one", "two"]})
    pq.write_table(table, here / "meds/metadata/codes.parquet")


def other_splits(here: Path) -> None:
    table = pa.table({"subject_id": list(range(1, 21)), "split": ["train"] * 20})
    pq.write_table(table, here / "meds/metadata/subject_splits.parquet")


def development_for_tuning(here: Path) -> None:
    (here / "meds/data/tuning").rename(here / "meds/data/development")


def no_tuning(here: Path) -> None:
    shutil.rmtree(here / "meds/data/tuning")


def held_out_alone(here: Path) -> None:
    no_tuning(here)
    shutil.rmtree(here / "meds/data/train")


DATA = mistakes(
    (f"{RUN} --data.path=s3://b/meds", "s3://b/meds", "must be a folder of this machine", "s3"),
    (f"{RUN} --data.path=~/meds", "home/meds", "must be the folder", "no such folder"),
    (f"{RUN} --data.path=nosuch", "nosuch", "must be the folder", "no such folder"),
    (f"{RUN} --data.path=", "`data.path`", "must have a value", "got nothing"),
    (f"{RUN} --data.path=meds/data", "meds/data", "data/train/*.parquet", "no folder data/"),
    (f"{RUN} --data.path=.", ".", "data/train/*.parquet", "no folder data/"),
    (f"{RUN} --data.path={EVENTS}", EVENTS, "must be the folder", "it is a file"),
    (f"{RUN} --data.split=0.8,0.1,0.1", "data.split", "must be left out", "splits of its own"),
    (f"{RUN} --data.sections=no.toml", "no.toml", "must be a TOML file", "No such file"),
    (f"{RUN} --data.max_codes=1", "78.6% of the events", "raise data.max_codes", "family"),
    (PREPARE, EVENTS, "`subject_id`", "`PatientID`", patient_column),
    (PREPARE, EVENTS, "must be a parquet file", "git-lfs", pointer_of_git_lfs),
    (PREPARE, "codes.parquet", "one description", "rows 0 and 1", two_descriptions),
    (CHECK, "meds/data", "must hold", ".csv", csv_in_place_of_parquet),
    (CHECK, "subject_splits.parquet", "must say the splits", "10 subjects differ", other_splits),
    (CHECK, "`tuning`", "must have subjects", "development", development_for_tuning),
    (CHECK, "`tuning`", "must have subjects", "it has none", no_tuning),
    (CHECK, "`train`", "must have subjects", "it has none", held_out_alone),
    (CHECK, "values", "mend numeric_value", "NaN or infinite", values_not_a_number),
    (CHECK, "events repeat", "remove the duplicates", "42.9%", everything_twice, 0),
    ("prepare --path=meds --out=meds", "meds", "must be empty or hold", "data/held_out/0.parquet"),
    (f"prepare --path=meds --out={EVENTS}", EVENTS, "must be a folder", "it is a file"),
    (
        f"{PREPARE} --tokenizer=./nosuch",
        "./nosuch",
        "must be a folder with a model",
        "there is none",
    ),
    ("simulate --out=meds", "meds", "must not exist yet", "name another folder"),
)


def labels_of(row: Callable[[int], tuple], name: str) -> Callable[[Path], None]:
    """Labels whose rows are made from subjects."""

    def make(here: Path) -> None:
        shutil.rmtree(here / "meds/labels/task")
        rows = {split: [row(s) for s in subjects] for split, subjects in SPLITS.items()}
        write_labels(here / "meds", rows=rows)

    make.__name__ = name
    return make


foreign = labels_of(lambda s: (1000 + s, at(3, 15), s % 2 == 0), "of_other_patients")
half_foreign = labels_of(
    lambda s: (s if s % 2 else 1000 + s, at(3, 15), s % 4 < 2), "half_of_other_patients"
)
before_all = labels_of(lambda s: (s, at(-5000), s % 2 == 0), "before_every_record")
one_class = labels_of(lambda s: (s, at(3, 15), True), "all_true")
LABEL_FILE = "meds/labels/task/train.parquet"


def number_labels(here: Path) -> None:
    halves = column("boolean_value", lambda values: pa.array([0.5] * len(values)))
    changed(LABEL_FILE, halves, "")(here)


def no_outcome(here: Path) -> None:
    changed(LABEL_FILE, lambda t: t.drop_columns(["boolean_value"]), "")(here)


def text_label_times(here: Path) -> None:
    text = column("prediction_time", lambda times: times.cast(pa.string()))
    changed(LABEL_FILE, text, "")(here)


def labelled_twice(here: Path) -> None:
    changed(LABEL_FILE, lambda t: pa.concat_tables([t, t]), "")(here)


def splits_exchanged(here: Path) -> None:
    folder = here / "meds/labels/task"
    (folder / "train.parquet").rename(folder / "x")
    (folder / "held_out.parquet").rename(folder / "train.parquet")
    (folder / "x").rename(folder / "held_out.parquet")


def no_label_of_tuning(here: Path) -> None:
    (here / "meds/labels/task/tuning.parquet").unlink()


def csv_labels(here: Path) -> None:
    for file in (here / "meds/labels/task").iterdir():
        file.rename(file.with_suffix(".csv"))


LABELS = mistakes(
    (f"{CHECK} --probe.labels=tsk", "labels `tsk`", "must be a folder or a task", "(task)"),
    (f"{CHECK} --probe.labels=meds/labels", "meds/labels", "must be one task", "(task)"),
    (f"{CHECK} --probe.labels=task,task", "labels", "each task once", "`task`"),
    (f"{TASK} --probe.competing=task", "`competing`", "must be TASK=OTHER_TASK", "got 'task'"),
    (TASK, "labels of task", "name the labels of this dataset", "match no subject", foreign),
    (TASK, "labels of task", "same export", "match a subject", half_foreign, 0),
    (TASK, "labels of task", "check the prediction times", "before the first event", before_all),
    (TASK, "labels of task", "rows of both classes", "all true in train", one_class),
    (TASK, "`boolean_value`", "must be bool", "is double", number_labels),
    (TASK, LABEL_FILE, "must have a column `boolean_value`", "it has `subject_id`", no_outcome),
    (TASK, "`prediction_time`", "must be timestamp[us]", "is string", text_label_times),
    (TASK, LABEL_FILE, "must be labelled once", "row 24", labelled_twice),
    (TASK, "labels of task", "must follow the splits", "all but <=10 rows", splits_exchanged),
    (TASK, "labels of task", "train and tuning", "no row in tuning", no_label_of_tuning),
    (TASK, "meds/labels/task", "must hold parquet files", "none", csv_labels),
)


def status(state: str) -> Callable[[Path], None]:
    """What lets the run look as if it had not ended."""

    def make(here: Path) -> None:
        file = here / "run/status.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "state": state}))

    return make


def unfinished(here: Path) -> None:
    status("running")(here)


def a_file_in_its_place(here: Path) -> None:
    (here / "new").write_text("mine")


def thesis_in_it(here: Path) -> None:
    (here / "new/final").mkdir(parents=True)
    (here / "new/final/thesis.txt").write_text("mine")


def settings_torn(here: Path) -> None:
    (here / "run/config.toml").write_text("[run")


def settings_lost(here: Path) -> None:
    (here / "run/config.toml").unlink()


def checkpoints_torn(here: Path) -> None:
    unfinished(here)
    for file in (here / "run/checkpoints").rglob("state.safetensors"):
        file.write_bytes(b"x")


def checkpoints_lost(here: Path) -> None:
    unfinished(here)
    shutil.rmtree(here / "run/checkpoints")


def data_moved(here: Path) -> None:
    unfinished(here)
    (here / "meds").rename(here / "elsewhere")


SAME_STEPS = f"{SAME} --phases.0.steps=2 --phases.1.steps=2 --run.save_every=1 --run.keep=3"
SHARDS = f"{RUN} --data.prepared="
RUNS = mistakes(
    (f"{SAME_STEPS} --optim.batch=8", "run holds a run", "--run.dir", "optim.batch: 4 -> 8"),
    (f"{SAME_STEPS} --resume=never", "run.resume is never", "--run.dir", "run", unfinished),
    (SAME_STEPS, "run/config.toml", "must be TOML", "at end of document", settings_torn),
    (SAME_STEPS, "checkpoints", "put the file back", "no config.toml", settings_lost),
    (SAME_STEPS, "run/checkpoints", "intact checkpoint", "all are damaged", checkpoints_torn),
    (SAME_STEPS, "run", "must hold a checkpoint", "there is none", checkpoints_lost),
    (SAME_STEPS, "meds", "must be the folder", "no such folder", data_moved),
    (RUN, "new", "must be a folder", "it is a file", a_file_in_its_place),
    (RUN, "new", "must be empty or hold a run", "final/thesis.txt", thesis_in_it),
    (f"{RUN} --run.dir=meds", "meds", "empty or hold a run", "data/held_out/0.parquet"),
    (f"{RUN} --run.dir=", "`run.dir`", "must have a value", "got nothing"),
    (f"{SHARDS}meds", "meds", "empty or hold token shards", "data/held_out/0.parquet"),
    (f"{SHARDS}run", "run", "empty or hold token shards", "best/jepa/README.md"),
    (f"{SHARDS}run/prepared --data.format=text", "run/prepared", "prepare it again", "data_format"),
    (
        f"{RUN} --objective.min_future=5000",
        "phase jepa",
        "Lower objective.min_future",
        "none of 12",
    ),
)
