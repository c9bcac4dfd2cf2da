"""Patients whose outcome nobody knows yet: from Python and by the command, wherever things lie."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pyarrow import csv

import smbfast
from smbfast import embed, serving, train
from smbfast.data.meds import MedsDataset
from smbfast.data.moments import nodes_at, read_moments
from smbfast.data.tokens import train_tokenizer
from smbfast.probing.embedding_file import METADATA
from smbfast.run.model_card import about
from smbfast.settings import POOLS
from tests.factory import (
    CODES,
    at,
    split_rows,
    table_of,
    write_codes,
    write_meds,
    write_table,
)
from tests.ops.tolerance import rounding
from tests.refusal import refused
from tests.tiny import tiny_lm

EVENTS = table_of(split_rows("held_out"))
LAST = at(7, 20)  # of every subject
SINGLE = 2e-6  # of the largest state: a product of one row sums in another order than one of many
# transformers also writes layers otherwise: two of them, of seven products of at most 24 terms
PLAIN = rounding(2 * 7 * 24)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, no_report: None) -> Path:
    """`base`, a backbone; `run`, a LoRA run that named it by a relative path; `new` patients."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer([f"word{i} value {i}.5, glucose\n" for i in range(60)], 400)
    tokenizer.save_pretrained(home / "base")
    lm = tiny_lm("qwen3", vocab_size=len(tokenizer), max_position_embeddings=2048)
    lm.save_pretrained(home / "base")
    data = write_meds(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        short = ["--phases.0.steps=1", "--phases.1.steps=1", "--optim.micro_tokens=512"]
        paths = [f"--data.path={data}", f"--run.dir={home / 'run'}", "--model.path=base"]
        train.main(["tiny", *paths, *short, "--lora.r=4", "--objective.self_check=false"])
    write_new(home / "new" / "data" / "0.parquet")
    return home


@pytest.fixture(scope="module")
def model(home: Path) -> Any:
    return smbfast.load(home / "run" / "final", device="cpu")


@pytest.fixture
def command(home: Path, tmp_path: Path) -> Callable[..., pa.Table]:
    """What the command writes for new patients, whose folder has neither labels nor splits."""

    def run(*more: str, data: Path = home / "new", final: Path = home / "run" / "final"):
        argv = [f"--model={final}", f"--data={data}", "--device=cpu", *more]
        (tmp_path / "e.parquet").unlink(missing_ok=True)
        embed.main([*argv, f"--out={tmp_path / 'e.parquet'}"])
        return pq.read_table(tmp_path / "e.parquet")

    return run


def write_new(file: Path) -> Path:
    """A file of new patients, in a folder that has codes.parquet and nothing else."""
    folder = file.parent.parent if file.parent.name == "data" else file.parent
    write_codes(folder, CODES)
    return write_table(file, EVENTS)


def codes(home: Path) -> Path:
    return home / "data" / "metadata" / "codes.parquet"


def vectors(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_pylist()).astype(np.float32)


def at_table(subjects: list[int], times: list[np.datetime64]) -> pa.Table:
    columns = {"subject_id": pa.array(subjects, pa.int64())}
    return pa.table(columns | {"prediction_time": pa.array(times, pa.timestamp("us"))})


def test_no_labels(command: Any, model: Any, home: Path, tmp_path: Path, capsys: Any) -> None:
    """At each patient's last event, at a date, and at times of a table in either format."""
    last = command("--at=last")
    assert last["subject_id"].to_pylist() == [17, 18, 19, 20]
    assert set(last["prediction_time"].to_numpy()) == {LAST}
    assert set(last["split"].to_pylist()) == {""}
    table = at_table([20, 17, 18, 19, 17], [LAST] * 5)  # in any order, and one twice
    write_table(tmp_path / "at.parquet", table)
    csv.write_csv(table, tmp_path / "at.csv")
    for name in ("at.parquet", "at.csv"):
        assert command(f"--at={tmp_path / name}").equals(last)
    then = command("--at=2150-01-04")
    assert (vectors(then) != vectors(last)).any(axis=1).all()
    assert then.equals(command("--at=2150-01-04T00:00:00"))
    # nothing of the day that begins then is seen
    assert then["embedding"].equals(command("--at=2150-01-03T23:59")["embedding"])
    capsys.readouterr()
    assert "no decision node" in refused(lambda: command("--at=2149-01-01"))


def test_the_command_says_no_count_of_few_nodes_nor_what_it_leaves(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    counts = {"nodes": 40, "embedded": 37, "before_first_event": 0, "unknown_subjects": 3}
    model = SimpleNamespace(write=lambda *_, **__: counts)
    monkeypatch.setattr(serving, "load", lambda *_, **__: model)
    run, data = str(home / "run" / "final"), str(home / "data")
    embed.main([f"--model={run}", f"--data={data}", "--at=last", "--out=o.parquet"])
    printed = capsys.readouterr().out
    assert "embedded all but <=10 nodes" in printed and "unknown subjects <=10" in printed
    assert not re.search(r"\b(3|37)\b", printed)


def test_births_are_nobody_s_last_event() -> None:
    """Nor are events without a time; who has nothing else is not embedded."""
    late = (17, at(9), "MEDS_BIRTH", None, None)
    only = [(21, None, "GENDER//F", None, None), (21, at(0), "MEDS_BIRTH", None, None)]
    rows = [*(row for row in split_rows("held_out") if row[0] == 17), late, *only]
    nodes = nodes_at(MedsDataset.of_table(table_of(rows)), "last")
    assert nodes.subject_K.tolist() == [17] and nodes.time_K.astype("datetime64[us]") == [LAST]


def test_labels_need_no_outcome(command: Any, home: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "task" / "held_out.parquet", at_table([17, 18], [LAST, LAST]))
    both = command(f"--labels={tmp_path / 'task'}")
    assert both["split"].to_pylist() == ["held_out"] * 2
    write_table(tmp_path / "at.parquet", at_table([17, 18], [LAST, LAST]))
    assert both["embedding"].equals(command(f"--at={tmp_path / 'at.parquet'}")["embedding"])


@pytest.mark.parametrize("place", ["data/held_out/0.parquet", "data/a/b.parquet", "0.parquet"])
def test_only_held_out_or_no_split_at_all(command: Any, tmp_path: Path, place: str) -> None:
    write_table(tmp_path / "meds" / place, EVENTS)
    write_codes(tmp_path / "meds", CODES)
    table = command("--at=last", data=tmp_path / "meds")
    split = "held_out" if "held_out" in place else ""
    assert table["split"].to_pylist() == [split] * 4
    assert table["embedding"].equals(command("--at=last")["embedding"])


def test_the_same_table_in_memory_gives_the_same_bits(command: Any, model: Any, home: Path) -> None:
    expected = command("--at=last")
    result = model.embed(EVENTS, at="last", codes=codes(home))
    assert result.table.equals(expected)
    assert result.table.schema.metadata[METADATA] == expected.schema.metadata[METADATA]
    np.testing.assert_array_equal(result.vector_KD, vectors(expected))
    assert result.subject_K.tolist() == [17, 18, 19, 20] and set(result.time_K) == {LAST}
    assert model.embed(home / "new", at="last").table.equals(expected)
    frame = EVENTS.to_pandas()
    assert model.embed(frame, at="last", codes=codes(home)).table.equals(expected)
    times = at_table([17, 18, 19, 20], [LAST] * 4).to_pandas()
    assert model.embed(EVENTS, at=times, codes=pq.read_table(codes(home))).table.equals(expected)
    for which in ({"encoder": "target"}, {"pool": "mean"}):
        other = model.embed(EVENTS, at="last", codes=codes(home), **which)
        words = [f"--{key}={value}" for key, value in which.items()]
        assert other.table.equals(command("--at=last", *words))
        assert (other.vector_KD != result.vector_KD).any()


def test_events_in_any_order_of_any_library(model: Any, home: Path, recwarn: Any) -> None:
    expected = model.embed(EVENTS, codes=codes(home)).table  # at the last event by itself
    mixed = EVENTS.take(np.random.default_rng(0).permutation(len(EVENTS)))
    categories = pl.from_arrow(mixed).with_columns(pl.col("code").cast(pl.Categorical))
    nanoseconds = mixed.to_pandas().astype({"code": "category"}).set_index("subject_id")
    for events in (mixed, mixed.to_pandas(), pl.from_arrow(mixed), categories, nanoseconds):
        assert model.embed(events, codes=pl.read_parquet(codes(home))).table.equals(expected)
    known = smbfast.load(home / "run" / "final", codes=home / "data", device="cpu")
    assert known.embed(mixed).table.equals(expected)
    assert known.tokens(mixed)["subject_id"].to_pylist() == [17, 18, 19, 20]
    assert not [w for w in recwarn if "descriptions" in str(w.message)]
    with pytest.warns(UserWarning, match="descriptions of codes"):
        assert model.text(mixed)["text"] != known.text(mixed)["text"]
    lazy = pl.from_arrow(mixed).lazy()
    assert ".collect()" in refused(lambda: model.embed(lazy), "`data`", "lazy LazyFrame")
    refused(lambda: model.embed(mixed.to_pandas()["code"]), "`data`", "columns", "Series")
    refused(lambda: model.embed(mixed, encoder="ema"), "`encoder`", "target", "'ema'")
    for one in (mixed.drop_columns("time"), mixed.to_pandas().assign(time="2024-01-31")):
        refused(lambda one=one: model.embed(one), "`time`")


def test_what_calls_share_is_made_once_and_again_when_files_change(
    model: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, laid_out = [], []
    for name, calls in (("MedsDataset.open", opened), ("serializer_of", laid_out)):
        place = "smbfast.serving." + name
        real = MedsDataset.open if name == "MedsDataset.open" else serving.serializer_of
        monkeypatch.setattr(place, lambda *a, _r=real, _c=calls, **k: _c.append(a) or _r(*a, **k))
    data = tmp_path / "data"
    write_new(data / "data" / "0.parquet")
    first, _again = (model.embed(data).table for _ in range(2))
    assert len(opened) == len(laid_out) == 1
    file = write_codes(tmp_path, CODES)
    for _ in range(2):
        assert model.embed(EVENTS, codes=file).table.equals(first)
    assert len(laid_out) == 2
    write_codes(tmp_path, CODES | {"LAB//glucose": "Sugar"})
    assert not model.embed(EVENTS, codes=file).table.equals(first)
    assert model.embed(data).table.equals(first) and len(opened) == 1
    write_table(data / "data" / "1.parquet", split_rows("train"))
    assert len(model.embed(data).table) == len(first) + 12


def test_one_patient_in_memory(command: Any, model: Any, home: Path) -> None:
    expected = {row["subject_id"]: row["embedding"] for row in command("--at=last").to_pylist()}
    for subject in (17, 20):
        rows = EVENTS.filter(pa.compute.equal(EVENTS["subject_id"], subject))
        result = model.embed(rows, at=LAST, codes=codes(home))
        assert result.counts["embedded"] == 1 and result.subject_K.tolist() == [subject]
        scale = np.abs(expected[subject]).max()
        assert np.abs(result.vector_KD[0] - expected[subject]).max() <= SINGLE * scale
    unknown = at_table([17, 99, 17], [LAST, LAST, at(-9)])
    counts = model.embed(EVENTS, at=unknown, codes=codes(home)).counts
    assert [counts[n] for n in ("nodes", "embedded", "unknown_subjects", "before_first_event")] == [
        3,
        1,
        1,
        1,
    ]


def test_tokens_are_what_a_plain_model_needs(model: Any, home: Path) -> None:
    by = model.embed_by(POOLS, EVENTS, at="last", codes=codes(home))
    result = model.embed(EVENTS, at="last", codes=codes(home), pool="last")
    assert by["last"].table.equals(result.table, check_metadata=True)
    table = model.text(EVENTS, at="last", codes=codes(home))
    assert table["subject_id"].to_pylist() == result.subject_K.tolist()
    plain = AutoPeftModelForCausalLM.from_pretrained(home / "run" / "final")
    for place, row in enumerate(table.to_pylist()):
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            layers = plain(input_ids=ids, output_hidden_states=True).hidden_states
        states_TD, means = layers[-1][0].numpy(), [layer[0].mean(0).numpy() for layer in layers]
        last, own = states_TD[-1], [states_TD.mean(0), states_TD.max(0), states_TD.std(0)]
        expected = {"last": last, "mean": own[0], "layers": np.concatenate(means)}
        for pool, vector in (expected | {"spread": np.concatenate([last, *own])}).items():
            gap = np.abs(vector - by[pool].vector_KD[place]).max()
            assert gap <= PLAIN * np.abs(vector).max(), pool
        assert model.tokenizer(row["text"], add_special_tokens=False).input_ids == row["token_ids"]
        assert "Glucose in Blood" in row["text"]  # a description, from codes


def test_the_backbone_has_moved(command: Any, home: Path, tmp_path: Path, capsys: Any) -> None:
    expected = command("--at=last")
    moved, final = home / "moved", home / "run" / "final"
    (home / "base").rename(moved)
    try:
        assert "--model.path=" in refused(lambda: command("--at=last"))
        for name in ("model.path", "backbone"):
            assert command("--at=last", f"--{name}={moved}").equals(expected)
        assert smbfast.load(final, path=moved).embed(home / "new", at="last").table.equals(expected)
        other = shutil.copytree(moved, tmp_path / "other")
        lm = tiny_lm("qwen3", seed=1, vocab_size=401, max_position_embeddings=2048)
        lm.resize_token_embeddings(json.loads((moved / "config.json").read_text())["vocab_size"])
        lm.save_pretrained(other)
        refused(lambda: command("--at=last", f"--model.path={other}"), other)
        with pytest.raises(ValueError, match=f"folder of .*; {tmp_path}/no is neither"):
            smbfast.load(final, path=tmp_path / "no")
    finally:
        moved.rename(home / "base")


def test_another_working_directory(
    command: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = command("--at=last")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("--at=last").equals(expected)
    config = json.loads((home / "run" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((home / "base").resolve())
    monkeypatch.chdir(home / "run")
    assert command("--at=last", final=Path("final"), data=Path("../new")).equals(expected)


def test_the_card_says_what_the_model_is_and_can_be_edited(
    command: Any, home: Path, tmp_path: Path
) -> None:
    final = home / "run" / "final"
    card = (final / "README.md").read_text()
    record = json.loads((home / "run" / "prepared" / "prepare.json").read_text())
    for word in ("library_name: peft", "LoRA adapter of base", record["data"], "| sft |"):
        assert word in card
    assert "| subjects | fewer than 100 |" in card and "Information Needed" not in card
    assert 'smbfast.load("final", path="BACKBONE_FOLDER")' in card
    expected = command("--at=last")
    try:
        (final / "README.md").write_text("# Ours\n")
        (final / "notes.md").write_text("more")
        assert command("--at=last").equals(expected)
    finally:
        (final / "README.md").write_text(card)


def test_counts_in_a_card_are_rounded() -> None:
    assert [about(n) for n in (0, 12, 99)] == ["fewer than 100"] * 3
    assert [about(n) for n in (100, 1234, 1250, 99_600)] == [
        "about 100",
        "about 1,200",
        "about 1,300",
        "about 100,000",
    ]


def test_a_file_says_what_made_it(command: Any, home: Path) -> None:
    origin = json.loads(command("--at=last", "--pool=mean").schema.metadata[METADATA])
    record = json.loads((home / "run" / "final" / "smbfast.json").read_text())
    assert origin["version"] == smbfast.__version__ and origin["encoder"] == "online"
    assert (origin["pool"], origin["window"]) == ("mean", record["window"])
    assert origin["backbone"] == str(home / "base") and origin["data_format"] == "text"
    target = command("--at=last", "--encoder=target").schema.metadata[METADATA]
    assert json.loads(target) == origin | {"encoder": "target", "pool": record["pool"]}


def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smbfast.serving.load", lambda *a, **k: pytest.fail("it was loaded"))
    (tmp_path / "folder.parquet").mkdir()
    inside = home / "data" / "data" / "e.parquet"
    good = {"model": home / "run" / "final", "data": home / "new", "out": tmp_path / "e.parquet"}
    for more, words in [
        ({}, ("labels", "at", "neither")),
        ({"at": "last", "labels": "task"}, ("labels", "at", "both")),
        ({"at": "last", "out": tmp_path / "e.csv"}, ("out", ".parquet")),
        ({"at": "last", "out": tmp_path / "folder.parquet"}, ("out", "folder")),
        # every parquet file there is read as events
        ({"at": "last", "data": home / "data", "out": inside}, ("out", "outside of")),
        ({"at": "yesterday"}, ("at", "last", "2024-01-31")),
        ({"at": tmp_path / "none.csv"}, ("none.csv",)),
    ]:
        with pytest.raises(SystemExit) as caught:
            embed.main([f"--{key}={value}" for key, value in (good | more).items()])
        said = capsys.readouterr().err + str(caught.value)
        assert all(word in said for word in words), said


def test_forms_of_a_moment(tmp_path: Path) -> None:
    moment = datetime(2024, 1, 31, 12)
    for given in (moment, "2024-01-31T12:00", "2024-01-31 12:00:00", np.datetime64(moment)):
        assert read_moments(given) == moment
    assert read_moments(moment.replace(tzinfo=UTC)) == moment
    assert read_moments(date(2024, 1, 31)) == datetime(2024, 1, 31) == read_moments("2024-01-31")
    with pytest.raises(ValueError, match="no time zone"):
        read_moments(moment.replace(tzinfo=timezone(timedelta(hours=1))))
    old = pa.table({"patient_id": [7], "prediction_time": [date(2024, 1, 31)]})
    subject_N, time_N = read_moments(old)
    assert (subject_N.tolist(), time_N.tolist()) == (
        [7],
        [int(datetime(2024, 1, 31, tzinfo=UTC).timestamp()) * 10**6],
    )
    pq.write_table(old, tmp_path / "days.parquet")
    csv.write_csv(old, tmp_path / "DAYS.CSV")
    for name in ("days.parquet", "DAYS.CSV"):  # a file says what a table in memory does
        assert read_moments(tmp_path / name) == (subject_N, time_N)
    for columns, words in [
        ({"prediction_time": [moment]}, "`subject_id`"),
        ({"subject_id": [1]}, "`prediction_time`"),
        ({"subject_id": [1, None], "prediction_time": [moment] * 2}, "row 1"),
        ({"subject_id": ["x"], "prediction_time": [moment]}, "int64"),
        ({"subject_id": [1], "prediction_time": [1]}, "timestamp"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_moments(columns)
    (tmp_path / "bad.csv").write_text("subject_id,prediction_time\n1,secret\n")
    assert "secret" not in refused(lambda: read_moments(tmp_path / "bad.csv"), "bad.csv")
    with pytest.raises(ValueError, match="table of pyarrow"):
        read_moments(3)


def test_the_package_alone_imports_no_torch() -> None:
    code = (
        "import smbfast, sys; assert set(smbfast.__all__) == set(dir(smbfast));"
        "assert 'torch' not in sys.modules; smbfast.loads"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError" in done.stderr and "loads" in done.stderr
    assert all(hasattr(smbfast, name) for name in smbfast.__all__)
