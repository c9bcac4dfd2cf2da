"""Data with something wrong in the very cells of the planted patient, and the commands that see it.

Each case is a command and what is done to the files before: `meds`, the planted dataset, and `run`,
a run on it (`tests.canary`). What the command then says must hold nothing of the patient.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.canary import SUBJECT, planted_strings, shown
from tests.canary import TASKS as TASKS_FILE

Change = Callable[[pa.Table, list[bool]], pa.Table]
Make = Callable[[Path], object]

EVENTS = "meds/data/train/0.parquet"
CODES = "meds/metadata/codes.parquet"
SPLITS = "meds/metadata/subject_splits.parquet"
LABELS = "meds/labels/task/train.parquet"
EMBEDDINGS = "run/embeddings/online.parquet"
PREDICTIONS = "run/predictions/task/smbfast.parquet"
PREPARE = "prepare --path=meds --out=shards --workers=1 --vocab_size=700 --format=text"
IN_CODES = PREPARE.replace("=text", "=codes")
CHECK = "check tiny --run.dir=new --data.path=meds --probe.labels=task"
EMBED = "embed --model=run/final --data=meds --out=out.parquet"
PROBE = f"probe --embeddings={EMBEDDINGS} --data=meds --out=probed --bootstraps=100"
EMBED_TASK, PROBE_TASK = f"{EMBED} --labels=task", f"{PROBE} --labels=task"
COMPARE = "compare run other.parquet --bootstraps=100"
TASKS = "tasks tasks.toml --data=meds --out=labels"
FOLDS = "experiment folds --data=meds --work=work --folds=2 --labels=task --train=tiny\\ --nosuch=1"
ONE_PATIENT = "report --run=run --data=meds --patient=1 --out=patient.html"
REPORT, COMPARED = "report --run=run", "report run run-2 --out=runs.html"
PUSH = "push run/final --to=us/model --dry-run"
WORDS = planted_strings()


def cases(*, every: bool = True) -> Iterator[tuple[str, Make]]:
    """The words of a command, as a shell reads them, and what makes the mistake.

    Args:
        every: whether each mistake is made with each command that reads the file, or with one.
    """
    for command in (PREPARE, IN_CODES)[: 1 + every]:
        for change in _EVENT_CHANGES:
            yield command, _apply(EVENTS, change)
        for how in _TORN:
            yield command, _torn(EVENTS, how)
        yield command, _in_two_splits
    for change in _CODE_CHANGES:
        yield PREPARE, _apply(CODES, change)
    for change in _SPLIT_CHANGES:
        yield PREPARE, _apply(SPLITS, change)
    for change in _LABEL_CHANGES:
        readers = ("tasks --check=task --data=meds", CHECK, EMBED_TASK, PROBE_TASK)
        for command in readers if every else readers[:1]:
            yield command, _apply(LABELS, change)
    for text in _MOMENTS:
        yield f"{EMBED} --at=at.csv", _written("at.csv", text)
    for change in _ROW_CHANGES:
        yield PROBE_TASK, _apply(EMBEDDINGS, change)
        yield COMPARE, _apply(PREDICTIONS, change, "other.parquet")
    yield PUSH, _written("run/final/tokenizer.json", json.dumps({WORDS[0]: WORDS[1]}))
    for file in (LABELS, CODES, SPLITS, EMBEDDINGS):
        for how in _TORN:
            yield _reader(file), _torn(file, how)
    for file in ("run/final/tokenizer.json", "run/final/smbfast.json", "run/prepared/prepare.json"):
        yield EMBED_TASK, _written(file, json.dumps({WORDS[0]: WORDS[1]}))
    yield PREPARE, _written("meds/metadata/dataset.json", f'{{"{WORDS[0]}": ')
    yield from _of_other_commands(every)


def _of_other_commands(every: bool) -> Iterator[tuple[str, Make]]:
    for change in _EVENT_CHANGES if every else _EVENT_CHANGES[:1]:
        yield TASKS, _asked(_apply(EVENTS, change))
    for change in _EVENT_CHANGES[: 5 if every else 1]:
        yield FOLDS, _apply(EVENTS, change)
    yield FOLDS, _as_is  # the views of folds are made before their runs are refused
    readers = (CHECK, EMBED_TASK, PROBE_TASK, ONE_PATIENT) if every else ()
    for file, changes in ((EVENTS, _EVENT_CHANGES), (SPLITS, _SPLIT_CHANGES)):
        for change in changes:
            yield from ((command, _apply(file, change)) for command in readers)
    for file in ("run/metrics.jsonl", "run/probe.json") if every else ():
        torn = _in_the_middle(file, f'\n{{"{WORDS[0]}": "{WORDS[1]}\n')
        yield REPORT, torn
        yield COMPARED, _second_run(torn)


def _reader(file: str) -> str:
    return {LABELS: CHECK, EMBEDDINGS: PROBE_TASK}.get(file, PREPARE)


def _apply(file: str, change: Change, out: str = "") -> Make:
    """Change the table of a file, knowing which rows are of the patient."""

    def make(here: Path) -> None:
        table = pq.read_table(here / file)
        if "subject_id" in table.column_names:
            own = [subject == SUBJECT for subject in table["subject_id"].to_pylist()]
        else:
            own = [bool(shown(code)) for code in table["code"].to_pylist()]
        pq.write_table(change(table, own), here / (out or file))

    return make


def _put(name: str, value: Any, kind: pa.DataType) -> Change:
    """Put a value into a column of the patient's rows, or the column into another type."""

    def change(table: pa.Table, own: list[bool]) -> pa.Table:
        at = table.schema.get_field_index(name)
        cells = table[name].to_pylist()
        for row in np.flatnonzero(own).tolist():
            cells[row] = value(cells[row]) if callable(value) else value
        if pa.types.is_string(kind):
            cells = [None if cell is None else str(cell) for cell in cells]
        elif kind == pa.float64():  # a column of another type has nothing else
            cells = [cell if isinstance(cell, int | float) else None for cell in cells]
        return table.set_column(at, name, pa.array(cells, kind))

    return change


def _dropped(name: str) -> Change:
    return lambda table, own: table.drop_columns([name])


def _reversed(table: pa.Table, own: list[bool]) -> pa.Table:
    """The rows of the patient, latest first."""
    return table.take(np.arange(len(own))[::-1])


def _scattered(table: pa.Table, own: list[bool]) -> pa.Table:
    """A row of the patient behind those of all others."""
    return pa.concat_tables([table, table.slice(0, 1)])


def _twice(table: pa.Table, own: list[bool]) -> pa.Table:
    return pa.concat_tables([table, table])


def _all_his(table: pa.Table, own: list[bool]) -> pa.Table:
    """All rows are of the patient."""
    at = table.schema.get_field_index("subject_id")
    return table.set_column(at, "subject_id", pa.array([SUBJECT] * len(own), pa.int64()))


def _in_two_splits(here: Path) -> None:
    table = pq.read_table(here / EVENTS)
    own = pa.array([subject == SUBJECT for subject in table["subject_id"].to_pylist()])
    pq.write_table(table.filter(own), here / "meds/data/tuning/1.parquet")


_TEXT, _TIME = pa.string(), pa.timestamp("us")
_EVENT_CHANGES: tuple[Change, ...] = (
    _put("subject_id", WORDS[0], _TEXT),
    _put("subject_id", None, pa.int64()),
    _put("subject_id", lambda s: float(s), pa.float64()),
    _put("time", WORDS[1], _TEXT),
    _put("time", 1.5e9, pa.float64()),
    _put("time", lambda t: None if t is None else t.replace(year=1), _TIME),
    _put("time", lambda t: None if t is None else t.replace(year=9999), _TIME),
    _put("time", None, _TIME),
    _put("code", None, _TEXT),
    _put("code", "", _TEXT),
    _put("code", lambda c: c.encode() + b"\xff\xfe", pa.binary()),
    _put("numeric_value", WORDS[2], _TEXT),
    _put("numeric_value", float("inf"), pa.float32()),
    _put("numeric_value", 1e300, pa.float64()),
    _put("text_value", lambda t: t and t.encode() + b"\xff", pa.binary()),
    _dropped("code"),
    _dropped("time"),
    _reversed,
    _scattered,
    _twice,
    _all_his,
)
_CODE_CHANGES: tuple[Change, ...] = (
    lambda table, own: pa.concat_tables([table, table]),
    lambda table, own: pa.concat_tables(
        [table, table.set_column(1, "description", pa.array([WORDS[3]] * len(own)))]
    ),
    _put("code", None, _TEXT),
    _put("description", lambda d: [d], pa.list_(_TEXT)),
    _put("parent_codes", lambda p: str(p), _TEXT),
    _put("description", WORDS[4] * 40_000, _TEXT),
)
_SPLIT_CHANGES: tuple[Change, ...] = (
    _put("split", "tuning", _TEXT),
    _put("split", WORDS[5], _TEXT),
    _put("split", None, _TEXT),
    _put("subject_id", None, pa.int64()),
    _put("subject_id", WORDS[6], _TEXT),
    _twice,
    _dropped("split"),
)
_LABEL_CHANGES: tuple[Change, ...] = (
    _put("subject_id", WORDS[7], _TEXT),
    _put("subject_id", SUBJECT + 1, pa.int64()),
    _put("subject_id", None, pa.int64()),
    _put("prediction_time", WORDS[8], _TEXT),
    _put("prediction_time", lambda t: t.replace(year=1), _TIME),
    _put("prediction_time", None, _TIME),
    _put("boolean_value", lambda v: WORDS[9], _TEXT),
    _put("boolean_value", None, pa.bool_()),
    _dropped("boolean_value"),
    _twice,
    _all_his,
)
_ROW_CHANGES: tuple[Change, ...] = (
    _put("subject_id", WORDS[10], _TEXT),
    _put("prediction_time", WORDS[11], _TEXT),
    _put("prediction_time", None, _TIME),
    _twice,
    _all_his,
)
_MOMENTS = (
    f"subject_id,prediction_time\n{SUBJECT},{WORDS[0]}\n",
    f"subject_id,prediction_time\n{WORDS[1]},2163-09-02\n",
    f"subject_id,prediction_time\n{SUBJECT}\n",
    f"subject_id,{WORDS[2]}\n{SUBJECT},2163-09-02\n",
    f"subject_id,prediction_time\n{SUBJECT},1000-01-01\n",
    f"subject_id,prediction_time\n{SUBJECT},\n",
    f'subject_id,prediction_time\n"{SUBJECT},2163-09-02\n',
    f"subject_id,prediction_time\n{SUBJECT}{SUBJECT}{SUBJECT},2163-09-02\n",
)
_TORN = ("cut", "text", "flipped")


def _torn(file: str, how: str) -> Make:
    """A file that is cut, or a text with what it held, or has a byte that has changed."""

    def make(here: Path) -> None:
        path = here / file
        content = bytearray(path.read_bytes())
        if how == "text":
            path.write_text(str(pq.read_table(path).to_pylist()[:50]))
            return
        if how == "flipped":
            for at in range(4, len(content) - 4, max(1, len(content) // 9)):
                content[at] ^= 0xFF
        path.write_bytes(bytes(content[: len(content) * 2 // 3] if how == "cut" else content))

    return make


def _in_the_middle(file: str, text: str) -> Make:
    def make(here: Path) -> None:
        content = (here / file).read_text()
        at = len(content) // 2
        (here / file).write_text(content[:at] + text + content[at:])

    return make


def _second_run(make: Make) -> Make:
    """A mistake in one of two runs."""

    def made(here: Path) -> None:
        shutil.copytree(here / "run", here / "run-2")
        make(here)

    return made


def _as_is(here: Path) -> None:
    """Leave the files as they are: the arguments are the mistake."""


def _asked(make: Make) -> Make:
    """A mistake beside definitions of tasks."""

    def made(here: Path) -> None:
        make(here)
        (here / "tasks.toml").write_text(TASKS_FILE)

    return made


def _written(file: str, text: str) -> Make:
    def make(here: Path) -> None:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text(text)

    return make
