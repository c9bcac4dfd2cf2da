"""The same of mistakes in Python, and in what torchrun would have put into the environment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import smbfast
from smbfast import train
from tests.refusal import refused

MODEL = "run/final"


@pytest.fixture(scope="module")
def model(shared: Path) -> Any:
    """The trained model, in Python."""
    return smbfast.load(shared / MODEL)


def events(shared: Path) -> pa.Table:
    """The events of the training patients, in memory."""
    return pq.read_table(shared / "meds/data/train/0.parquet")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, d: m.embed(d, at="yesterday"), ("`at`", "must be `last`, a date", "yesterday")),
        (lambda m, d: m.embed(d, at="last", pool="max"), ("pools", "last, mean", "got 'max'")),
        (lambda m, d: m.embed(d, at="last", encoder="x"), ("encoder", "online or", "got 'x'")),
        (lambda m, d: m.embed(d, at="last", path="x"), ("path", "shared or", "got 'x'")),
        (lambda m, d: m.embed(d, at="last", codes="x"), ("`codes`", "beside a table", "folder")),
        (lambda m, d: m.embed([1], at="last"), ("`data`", "pyarrow, pandas or polars", "got list")),
        (lambda m, d: m.embed(None, at="last"), ("`data`", "a table", "got NoneType")),
        (lambda m, d: m.embed("a.csv", at="last"), ("a.csv", "folder", "no such folder")),
        (lambda m, d: smbfast.load("nosuch"), ("nosuch", "a trained model", "no such folder")),
        (lambda m, d: smbfast.load(d), ("meds", "`final` folder", "no smbfast.json")),
    ],
)
def test_a_mistake_in_python(
    call: Callable[[Any, Path], object], words: tuple[str, ...], model: Any, shared: Path
) -> None:
    refused(lambda: call(model, shared / "meds"), *words)


def test_a_table_that_is_no_events(model: Any, shared: Path) -> None:
    table = events(shared)
    without = table.drop_columns(["time"])
    refused(lambda: model.embed(without, at="last"), "table of events", "`time`", "`subject_id`")
    refused(lambda: model.embed(table.slice(0, 0), at="last"), "decision node", "0 asked for")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("RANK", "torchrun", "no MASTER_ADDR or MASTER_PORT")),
        ({"RANK": "3", "WORLD_SIZE": "2"}, ("below WORLD_SIZE", "torchrun", "RANK=3")),
        ({"RANK": "a", "WORLD_SIZE": "2"}, ("must be a number", "torchrun", "RANK=a")),
        ({"RANK": "0"}, ("WORLD_SIZE", "torchrun", "WORLD_SIZE=nothing")),
    ],
)
def test_half_of_what_torchrun_says(
    environment: dict[str, str],
    words: tuple[str, ...],
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "MASTER_ADDR" not in words[-1]:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
    arguments = ["tiny", f"--data.path={shared / 'meds'}", f"--run.dir={tmp_path / 'new'}"]
    refused(lambda: train.main(arguments), *words)
    assert not (tmp_path / "new").exists()
