"""Shards: what is written is what is read, and `prepare` makes the same ones every time."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from smbfast.base.files import committed_folder
from smbfast.batch import Timeline
from smbfast.data import preparing
from smbfast.data.formats import read_encoding
from smbfast.data.formats import serializer_of as serializer_of_record
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.data.shards import FIELDS, Shard, ShardWriter
from smbfast.settings import DataSettings
from tests.data.event_tables import assert_same_timeline, batch_of, event, our_bpe, serializer_of
from tests.factory import SPLITS, at, split_rows, table_of, write_meds, write_table

RARE = "zyxomma"  # stands in no training subject
SUBJECTS = [
    [event(None, "GENDER//F"), event("2150-01-31 10:00", "LAB//a", 1), event("2150-02-01", "LAB")],
    [event("2150-01-31", "DIAGNOSIS//b")],
    [event("2150-01-31", f"LAB//{i}", i) for i in range(40)],
]


def write_shard(folder: Path, timelines: list[Timeline]) -> Path:
    with committed_folder(folder, private=True) as staging:
        writer = ShardWriter(staging)
        for timeline in timelines:
            writer.add(timeline)
        writer.close(split="train")
    return folder


@pytest.fixture
def timelines() -> list[Timeline]:
    return serializer_of(our_bpe()).timelines(batch_of(*SUBJECTS))


def prepared(
    data: Path, out: Path, splits: tuple[str, ...] = ("train", "tuning"), **options: object
) -> Prepared:
    made = DataSettings(
        path=str(data), **{"format": "text-paper", "vocab_size": 500, "workers": 1, **options}
    )
    return prepare(made, out, None, splits)


def content(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def with_rare(split: str) -> list[tuple]:
    """The rows of a split, with a code and a text value that stand in no other split."""
    rows = split_rows(split)
    last = {row[0]: i for i, row in enumerate(rows)}  # of every subject: ten are not rare
    for i in last.values():
        rows[i] = (*rows[i][:2], f"LAB//{RARE}", None, f"{RARE} {RARE}")
    return rows


def test_round_trip(timelines: list[Timeline], tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "0", timelines))
    assert len(shard) == len(timelines) == 3
    for got, expected in zip(shard, timelines, strict=True):
        assert_same_timeline(got, expected)
        for name, dtype in FIELDS.items():
            array = getattr(got, name)
            assert array.dtype == dtype and not array.flags.writeable
            assert type(array) is np.ndarray and isinstance(array.base.base, np.memmap)
    assert shard.index == {
        "timelines": 3,
        "tokens": sum(map(len, timelines)),
        "split": "train",
    }
    with pytest.raises(IndexError):
        shard[3]


def test_a_changed_token_would_be_seen(timelines: list[Timeline], tmp_path: Path) -> None:
    changed = timelines[0].ids_T.copy()
    changed[-1] += 1
    shard = Shard(write_shard(tmp_path / "0", [replace(timelines[0], ids_T=changed)]))
    with pytest.raises(AssertionError):
        assert_same_timeline(shard[0], timelines[0])


def test_an_empty_shard(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "0", []))
    assert len(shard) == 0 and list(shard) == []


@pytest.mark.parametrize("name", [*(f"{n}.bin" for n in FIELDS), "timelines.bin", "index.json"])
def test_a_flipped_byte_is_refused(timelines: list[Timeline], tmp_path: Path, name: str) -> None:
    folder = write_shard(tmp_path / "0", timelines)
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}.*damaged"):
        Shard(folder)


def test_a_short_or_missing_file_is_refused(timelines: list[Timeline], tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "0", timelines)
    file = folder / "ids_T.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"ids_T\.bin must hold"):
        Shard(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"ids_T\.bin must hold"):
        Shard(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        Shard(folder)


def test_files_are_private(timelines: list[Timeline], tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "0", timelines)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in folder.iterdir():
        if file.name != "manifest.json":  # sizes and hashes
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    out = prepared(write_meds(tmp_path / "meds"), tmp_path / "out").folder
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(f.stat().st_mode) for f in out.rglob("*.bin")}
    assert modes == {0o600}


def test_a_failed_shard_leaves_nothing(timelines: list[Timeline], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), committed_folder(tmp_path / "0", private=True) as staging:
        ShardWriter(staging).add(timelines[0])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_prepare_twice_gives_the_same_files(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "meds")
    first, second = (prepared(data, tmp_path / n).folder for n in ("a", "b"))
    assert content(first) == content(second)
    before = {f: f.stat().st_mtime_ns for f in first.rglob("*") if f.is_file()}
    assert prepared(data, first).folder == first  # done: opened, not made again
    assert before == {f: f.stat().st_mtime_ns for f in first.rglob("*") if f.is_file()}


def test_shards_hold_what_the_serializer_makes(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "meds")
    made = prepared(data, tmp_path / "out")
    dataset = MedsDataset.open(data)
    serializer = made.serializer(dataset)
    for split in ("train", "tuning"):
        expected = [t for b in dataset.batches(split) for t in serializer.timelines(b)]
        stored = [t for shard in made.shards(split) for t in shard]
        assert [t.subject for t in stored] == list(SPLITS[split])
        for got, want in zip(stored, expected, strict=True):
            assert_same_timeline(got, want)
    assert made.counts["events"] == sum(len(split_rows(s)) for s in ("train", "tuning"))
    assert made.counts["subjects"] == len(SPLITS["train"]) + len(SPLITS["tuning"])


@pytest.mark.slow
def test_one_and_two_workers_give_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_meds(tmp_path / "meds")
    alone = prepared(data, tmp_path / "one").folder
    monkeypatch.setattr(preparing, "PARALLEL_ROWS", 0)
    calls: list[str] = []
    pool = preparing.worker_pool

    def counting(*args: object, **options: object) -> object:
        calls.append("pool")
        return pool(*args, **options)

    monkeypatch.setattr(preparing, "worker_pool", counting)
    together = prepared(data, tmp_path / "two", workers=2).folder
    assert calls == ["pool"]
    assert content(alone) == content(together)


def test_a_stopped_run_goes_on_with_the_files_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_meds(tmp_path / "meds")
    whole = prepared(data, tmp_path / "whole").folder
    made: list[str] = []
    honest = preparing._make_shard

    def stopped(*args: object) -> None:
        made.append(args[2])
        if args[2] == "tuning" and made.count("tuning") == 1:
            raise KeyboardInterrupt
        honest(*args)

    monkeypatch.setattr(preparing, "_make_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared(data, tmp_path / "again")
    with pytest.raises(ValueError, match=r"prepare\.json"):
        Prepared.open(tmp_path / "again")
    assert content(prepared(data, tmp_path / "again").folder) == content(whole)
    assert made == ["train", "tuning", "tuning"]


def test_the_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    names = ("plain", "others", "training")
    rare = ({}, {s: with_rare(s) for s in ("tuning", "held_out")}, {"train": with_rare("train")})
    splits = ("train", "tuning", "held_out")
    plain, others, training = (
        content(
            prepared(write_meds(tmp_path / n / "meds", rows), tmp_path / n / "out", splits).folder
        )
        for n, rows in zip(names, rare, strict=True)
    )
    file = "tokenizer/tokenizer.json"
    assert plain[file] == others[file]
    assert plain[file] != training[file]  # the string would have changed it
    assert plain["tuning/0/ids_T.bin"] != others["tuning/0/ids_T.bin"]
    vocabulary = json.loads(others[file])["model"]["vocab"]
    assert not any(RARE[:4] in token for token in vocabulary)
    assert any(RARE[:4] in t for t in json.loads(training[file])["model"]["vocab"])


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_held_out_rows_beyond_subject_ids_are_not_read(tmp_path: Path, split: str) -> None:
    data = write_meds(tmp_path / "meds", write_page_checksum=True)
    file = data / "data" / split / "0.parquet"
    raw, group = bytearray(file.read_bytes()), pq.read_metadata(file).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    for column in columns:
        if column.path_in_schema != "subject_id":
            last = column.data_page_offset + 8
            raw[last : last + 8] = bytes(8)
    file.write_bytes(raw)
    if split == "held_out":
        assert prepared(data, tmp_path / "out").counts["subjects"] == 16
        with pytest.raises(ValueError, match="held_out"):
            prepared(data, tmp_path / "all", ("train", "held_out"))
    else:  # the damage is real: where rows are read, it is found
        with pytest.raises(ValueError, match="train"):
            prepared(data, tmp_path / "out")


def test_a_folder_of_an_earlier_version_is_refused_as_that(tmp_path: Path) -> None:
    folder = prepared(write_meds(tmp_path / "meds"), tmp_path / "out").folder
    record = json.loads((folder / "prepare.json").read_text())
    del record["data_format"]
    (folder / "prepare.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="prepared by an earlier version"):
        Prepared.open(folder)


def test_a_model_of_an_earlier_version_is_refused_as_that(tmp_path: Path) -> None:
    made = prepared(write_meds(tmp_path / "meds"), tmp_path / "out")
    earlier = {k: v for k, v in made.record.items() if k != "data_format"} | {"format": 1}
    encoding = read_encoding(made.folder / "tokenizer", made.tokenizer, earlier)
    with pytest.raises(ValueError, match="format of text-paper must be 2, the record says 1"):
        serializer_of_record(MedsDataset.open(tmp_path / "meds"), encoding, earlier)


def test_another_tokenizer_or_other_settings_are_refused(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "meds")
    out = prepared(data, tmp_path / "out").folder
    with pytest.raises(ValueError, match=r"prepared from other settings \(options differ\)"):
        prepared(data, out, bucket="hour")
    with pytest.raises(ValueError, match=r"splits differ\)"):
        prepared(data, out, ("train",))
    later = [*split_rows("train"), (12, at(30), "LAB//glucose", 1.0, None)]
    write_table(data / "data" / "train" / "0.parquet", table_of(later))
    with pytest.raises(ValueError, match=r"\(data differ\)"):
        prepared(data, out)
    other = prepared(data, tmp_path / "other", vocab_size=450).folder
    for file in (other / "tokenizer").iterdir():
        (out / "tokenizer" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="the tokenizer is not the one"):
        Prepared.open(out)
