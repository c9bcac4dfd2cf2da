"""Mistakes with what a run has left: embedding, probing, comparing and reporting; and tasks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.mistakes.case import mistakes
from tests.mistakes.files import EVENTS, changed, column
from tests.refusal import CANARY

NOW = "embed --model=run/final --data=meds --out=out.parquet --at=last"
AT = "embed --model=run/final --data=meds --out=out.parquet --at="
EMBEDDINGS = "run/embeddings/online.parquet"
PROBE = f"probe --embeddings={EMBEDDINGS} --data=meds --out=probed --bootstraps=0"
FOLDS = "experiment folds --work=w"
PREDICTIONS = "run/predictions/task/smbfast.parquet"


def moments(text: str, name: str) -> Callable[[Path], None]:
    """What writes a csv file of moments."""

    def make(here: Path) -> None:
        (here / "at.csv").write_text(text)

    make.__name__ = name
    return make


def someone_elses_file(here: Path) -> None:
    (here / "out.parquet").write_text("mine")


def a_bit_flipped(here: Path) -> None:
    file = here / "run/final/model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


NAMES = moments("subject,when\n1,2150-01-04\n", "other_names")
GERMAN = moments("subject_id,prediction_time\n1,04.01.2150\n", "dates_with_dots")
WORDS = moments("subject_id,prediction_time\nAnna,2150-01-04\n", "names_of_people")
HOLE = moments("subject_id,prediction_time\n1,\n", "a_time_missing")
NOBODY = moments("subject_id,prediction_time\n99,2150-01-04\n", "unknown_patient")

EMBED = mistakes(
    (f"{AT}yesterday", "`at`", "must be `last`, a date", "`yesterday`"),
    (f"{AT}31/12/2150", "`at`", "must be `last`, a date", "`31/12/2150`"),
    (f"{AT}2150-01-04T12:00+02:00", "`at`", "without a time zone", "+02:00"),
    (f"{AT}nosuch.csv", "nosuch.csv", "must be a csv file", "No such file"),
    (f"{AT}at.csv", "at.csv", "`subject_id`", "2 columns", NAMES),
    (f"{AT}at.csv", "at.csv", "such as 2024-01-31", "something else", GERMAN),
    (f"{AT}at.csv", "at.csv", "an integer `subject_id`", "something else", WORDS),
    (f"{AT}at.csv", "`prediction_time` of at.csv", "no nulls", "row 0 is null", HOLE),
    (f"{AT}at.csv", "decision node", "subject must be", "<=10 asked for", NOBODY),
    (f"{AT}1990-01-01", "decision node", "event by its time", "0 asked for"),
    (f"{NOW} --labels=task", "labels and at", "one of", "got both", None, 2),
    (NOW.removesuffix(" --at=last"), "labels and at", "one of", "got neither", None, 2),
    (f"{NOW} --pool=max", "`pool`", "'last', 'mean'", "got 'max'", None, 2),
    (f"{NOW} --tokens=1", "`tokens`", "at least 64", "got 1", None, 2),
    (f"{NOW} --model=run/best/sft --encoder=target", "encoder=target", "JEPA", "had none"),
    (f"{NOW} --model=run", "run", "`final` folder", "no smbfast.json"),
    (f"{NOW} --model=meds", "meds", "`final` folder", "no smbfast.json"),
    (f"{NOW} --data=nosuch", "nosuch", "must be the folder", "no such folder"),
    (f"{NOW} --out=now.csv", "`out`", "ends in .parquet", "got 'now.csv'", None, 2),
    (f"{NOW} --out=", "`out`", "must have a value", "got nothing", None, 2),
    (f"{NOW} --backbone=other", "run/final", "leave out", "--model.path=other"),
    (f"{NOW} --device=cuda", "device=cuda", "must exist", "0 CUDA GPUs"),
    (NOW, "out.parquet", "was not written by smbfast", "exists", someone_elses_file),
    (NOW, "run/final/model.safetensors", "SHA-256", "damaged", a_bit_flipped),
)


def embeddings_twice(here: Path) -> None:
    changed(EMBEDDINGS, lambda t: pa.concat_tables([t, t]), "")(here)


def no_split(here: Path) -> None:
    changed(EMBEDDINGS, lambda t: t.drop_columns(["split"]), "")(here)


def not_numbers(here: Path) -> None:
    def nan(vectors: pa.ChunkedArray) -> pa.Array:
        width = vectors.type.list_size
        flat = pa.array(np.full(len(vectors) * width, np.nan, np.float32))
        return pa.FixedSizeListArray.from_arrays(flat, width)

    changed(EMBEDDINGS, column("embedding", nan), "")(here)


def someone_elses_probe(here: Path) -> None:
    (here / "probed").mkdir()
    (here / "probed/probe.json").write_text(json.dumps({"mine": 1}))


def file_for_folder(here: Path) -> None:
    (here / "probed").write_text("mine")


def copied(file: str, change: Callable[[pa.Table], pa.Table], name: str) -> Callable[[Path], None]:
    """A prediction file of another method beside the run's, changed."""

    def make(here: Path) -> None:
        pq.write_table(change(pq.read_table(here / file)), here / "other.parquet")

    make.__name__ = name
    return make


DISAGREES = copied(
    PREDICTIONS,
    column("boolean_value", lambda v: pa.array([not x for x in v.to_pylist()])),
    "outcomes_turned",
)
STRANGERS = copied(
    PREDICTIONS,
    column("subject_id", lambda v: pa.array([x + 1000 for x in v.to_pylist()])),
    "other_patients",
)
TOO_SURE = copied(
    PREDICTIONS,
    column("predicted_boolean_probability", lambda v: pa.array([2.0] * len(v))),
    "probabilities_of_2",
)


def no_metrics(here: Path) -> None:
    (here / "run/metrics.jsonl").unlink()


def a_page_of_mine(here: Path) -> None:
    (here / "run/report.html").write_text("<p>mine")


def tasks_file(text: str, name: str) -> Callable[[Path], None]:
    """What writes a file of task definitions."""

    def make(here: Path) -> None:
        (here / "t.toml").write_text(text)

    make.__name__ = name
    return make


def names_for_ids(here: Path) -> None:
    names = column("subject_id", lambda v: pa.array([f"{CANARY} {x}" for x in v.to_pylist()]))
    changed(EVENTS, names, "")(here)


OTHERS = mistakes(
    (f"{PROBE} --embeddings=no.parquet", "no.parquet", "no such file", "no.parquet"),
    (f"{PROBE} --labels=tsk", "labels `tsk`", "a task of meds/labels", "(task)"),
    (f"{PROBE} --labels=task,task", "labels", "each task once", "twice"),
    (f"{PROBE} --beside=x", "beside", "must be NAME=PATH", "got `x`"),
    (f"{PROBE} --model=nosuch", "`model`", "folder of a trained model", "got nosuch"),
    (f"{PROBE} --competing=task=task", "task", "must be of time to event", "is binary"),
    (f"{PROBE} --final=maybe", "`final`", "true or false", "got 'maybe'", None, 2),
    (PROBE, EMBEDDINGS, "must have a column `split`", "it has `subject_id`", no_split),
    (PROBE, EMBEDDINGS, "must be finite", "row 0", not_numbers),
    (PROBE, EMBEDDINGS, "once", "32 rows repeat", embeddings_twice),
    (PROBE, "probed/probe.json", "not written by smbfast", "exists", someone_elses_probe),
    (PROBE, "`out`", "must be a folder", "probed is a file", file_for_folder),
    ("compare nosuch run", "nosuch", "must be a prediction file", "nothing at nosuch"),
    ("compare run run:foo", "`run:foo`", "one of the models there", "no `foo`"),
    ("compare a=run a=run:bag", "`a`", "a name of its own", "twice"),
    ("compare run run:bag --tasks=foo", "`foo`", "in two methods", "run:bag has task"),
    ("compare run run:bag --against=both", "`against`", "'first' or 'all'", "'both'", None, 2),
    ("compare run run:bag --out=meds/metadata/dataset.json", "`out`", "a folder", "is a file"),
    ("compare run meds", "codes.parquet", "`subject_id`", "it has `code`"),
    ("compare run other.parquet", "outcomes of task", "must be the same", "<=10", DISAGREES),
    ("compare run other.parquet", "methods", "the same patients", "share no patient", STRANGERS),
    ("compare run other.parquet", "other.parquet", "from 0 to 1", "not all are", TOO_SURE),
    ("report --run=nosuch", "run", "the folder of a training run", "got nosuch"),
    ("report run nosuch", "nosuch", "the folder of a training run", "no such folder"),
    ("report --run=run/final", "run/final", "metrics.jsonl", "no metrics.jsonl"),
    ("report --run=run", "run", "metrics.jsonl", "no metrics.jsonl", no_metrics),
    ("report --run=run", "run/report.html", "not written by smbfast", "exists", a_page_of_mine),
    ("tasks mimik --data=meds", "`mimik`", "mimic", "must be a .toml file"),
    ("tasks t.toml --data=meds", "t.toml", "`tasks` is required", "", tasks_file("", "empty")),
    ("tasks t.toml --data=meds", "t.toml", "must be TOML", "", tasks_file("[", "torn")),
    ("tasks --data=meds --check=nosuch", "labels `nosuch`", "a task of meds/labels", "(task)"),
    (f"{FOLDS} --data=nosuch", "nosuch", "must be the folder", "no such folder"),
    (f"{FOLDS} --data=meds", EVENTS, "`subject_id` must be int64", "is string", names_for_ids),
)
