"""The same of mistakes in Python, and in what torchrun would have put into the environment."""

import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import smbfast
from smbfast import train
from tests.factory import write_table
from tests.refusal import refused

MODEL = "run/final"


@pytest.fixture(scope="module")
def model(shared: Path) -> Any:
    """The trained model, in Python."""
    return smbfast.load(shared / MODEL)


def events(shared: Path) -> pa.Table:
    """The events of the training patients, in memory."""
    return pq.read_table(shared / "meds/data/train/0.parquet")


def embedder(model: Any, data: Path, **more: Any) -> object:
    """The embeddings of one node as a step of scikit-learn."""
    nodes = {"subject_id": [1], "prediction_time": [datetime(2030, 1, 1)]}
    return smbfast.PatientEmbedder(model, data, **more).transform(nodes)


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
        (lambda m, d: smbfast.load(d.parent / "run"), ("`final` folder", "this run is", MODEL)),
        (lambda m, d: m.embed(d, at=pd.NaT), ("`at`", "last", "NaT")),
        (lambda m, d: m.embed({"time": [datetime.max, pd.NaT]}), ("`data`", "Arrow", "dict")),
        (lambda m, d: m.embed(d, tokens=0), ("`tokens`", "at least 64", "got 0")),
        (lambda m, d: m.write(d.parent / "o.parquet", d, at="last", tokens=-1), ("at least 64",)),
        (lambda m, d: embedder(m, d, tokens=0, missing="nan"), ("`tokens`", "at least 64")),
        (lambda m, d: embedder(m, d, cache=d / "metadata/codes.parquet"), ("`cache`", "a file")),
    ],
)
def test_a_mistake_in_python(
    call: Callable[[Any, Path], object], words: tuple[str, ...], model: Any, shared: Path
) -> None:
    refused(lambda: call(model, shared / "meds"), *words)


def test_codes_of_another_system_are_warned_of(
    model: Any, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table, codes = events(shared), shared / "meds"
    names = pc.binary_join_element_wise("ELSEWHERE", table["code"].cast(pa.string()), "-")
    other = table.set_column(table.column_names.index("code"), "code", names)
    with pytest.warns(UserWarning, match="neither the code nor one near it") as seen:
        model.embed(other, at="last", codes=codes)
    assert [Path(warning.filename).name for warning in seen] == ["test_in_python.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.embed(table, at="last", codes=codes)
    for name, data in (("other", other), ("own", table)):
        write_table(tmp_path / name / "data" / "train" / "0.parquet", data)
        model.write(tmp_path / f"{name}.parquet", tmp_path / name, at="last")
        assert ("neither the code" in capsys.readouterr().err) == (name == "other")


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
