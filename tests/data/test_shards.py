"""Shards: what is written is what is read, and `prepare` makes the same ones every time."""

import json
import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from mmap import mmap
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from smbfast.base import workers as base_workers
from smbfast.batch import Timeline
from smbfast.data import fitting, preparing
from smbfast.data.array_file import ArrayFile, OpenMaps
from smbfast.data.formats import read_encoding
from smbfast.data.formats import serializer_of as serializer_of_record
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.data.shards import FIELDS, Shard, ShardWriter
from smbfast.settings import DataSettings, ObjectiveSettings
from tests.data.event_tables import assert_same_timeline, batch_of, event, our_bpe, serializer_of
from tests.factory import SPLITS, at, split_rows, table_of, write_meds, write_table

RARE = "zyxomma"  # stands in no training subject
SUBJECTS = [
    [event(None, "GENDER//F"), event("2150-01-31 10:00", "LAB//a", 1), event("2150-02-01", "LAB")],
    [event("2150-01-31", "DIAGNOSIS//b")],
    [event("2150-01-31", f"LAB//{i}", i) for i in range(40)],
]


def write_shard(path: Path, timelines: list[Timeline]) -> Path:
    with ShardWriter(path) as writer:
        for timeline in timelines:
            writer.add(timeline)
        writer.index["split"] = "train"
    return path


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
    """All files but the record of what was verified, which has times of change."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "verified.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def with_rare(split: str) -> list[tuple]:
    """The rows of a split, with a code and a text value that stand in no other split."""
    rows = split_rows(split)
    last = {row[0]: i for i, row in enumerate(rows)}  # of every subject: ten are not rare
    for i in last.values():
        rows[i] = (*rows[i][:2], f"LAB//{RARE}", None, f"{RARE} {RARE}")
    return rows


def memory_of(array: np.ndarray) -> object:
    """What an array, or the array that it is a part of, lies in."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def test_round_trip(timelines: list[Timeline], tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "0.shard", timelines))
    assert len(shard) == len(timelines) == 3
    for got, expected in zip(shard, timelines, strict=True):
        assert_same_timeline(got, expected)
        for name, dtype in FIELDS.items():
            array = getattr(got, name)
            assert array.dtype == dtype and not array.flags.writeable
            assert type(array) is np.ndarray and isinstance(memory_of(array), mmap)
    assert shard.index == {
        "timelines": 3,
        "tokens": sum(map(len, timelines)),
        "split": "train",
    }
    with pytest.raises(IndexError):
        shard[3]


def test_arrays_are_aligned(timelines: list[Timeline], tmp_path: Path) -> None:
    write_shard(tmp_path / "0.shard", timelines)
    file = ArrayFile.open(tmp_path / "0.shard")
    assert all(place.first % 64 == 0 for place in file.places.values())
    assert all(array.flags.aligned for array in file.mapped().values())


@pytest.mark.parametrize("most", [1, 2, 4096])
def test_blocks_are_the_timelines_without_ids(
    timelines: list[Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("smbfast.data.shards.BLOCK", most)
    shard = Shard(write_shard(tmp_path / "0.shard", timelines))
    blocks = list(shard.blocks())
    assert [b.first for b in blocks] == list(range(0, 3, most))
    got = [block[i] for block in blocks for i in range(len(block.header_S))]
    for timeline, expected in zip(got, timelines, strict=True):
        left_out = {
            "ids_T": np.zeros(len(expected), np.int32),
            "line_time_L": np.zeros(len(expected.line_time_L), np.int64),
            "line_code_L": np.empty(0, np.int32),
        }
        assert_same_timeline(timeline, replace(expected, **left_out))


def test_a_changed_token_would_be_seen(timelines: list[Timeline], tmp_path: Path) -> None:
    changed = timelines[0].ids_T.copy()
    changed[-1] += 1
    shard = Shard(write_shard(tmp_path / "0.shard", [replace(timelines[0], ids_T=changed)]))
    with pytest.raises(AssertionError):
        assert_same_timeline(shard[0], timelines[0])


def test_an_empty_shard(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "0.shard", []))
    shard.verify()
    assert len(shard) == 0 and list(shard) == list(shard.blocks()) == []


def test_any_flipped_bit_is_refused(timelines: list[Timeline], tmp_path: Path) -> None:
    file = write_shard(tmp_path / "0.shard", timelines)
    whole = file.read_bytes()
    for place in [*range(0, 600, 7), *range(600, len(whole), 211), len(whole) - 1]:
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"0\.shard"):
            Shard(file).verify()


def test_a_short_long_or_missing_shard_is_refused(
    timelines: list[Timeline], tmp_path: Path
) -> None:
    file = write_shard(tmp_path / "0.shard", timelines)
    whole = file.read_bytes()
    for size in (0, 7, 40, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"0\.shard"):
            Shard(file, 3)[0]
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=rf"0\.shard must hold {len(whole)} bytes"):
        Shard(file, 3)[0]
    file.unlink()
    with pytest.raises(ValueError, match=r"0\.shard must be a finished file"):
        Shard(file, 3)[0]


def test_a_shard_that_changes_while_it_is_used_is_refused(
    timelines: list[Timeline], tmp_path: Path
) -> None:
    file = write_shard(tmp_path / "0.shard", timelines)
    shard = Shard(file)
    os.truncate(file, file.stat().st_size - 64)  # reading a map of it would end the process
    with pytest.raises(ValueError, match="must not change"):
        shard[0]
    with pytest.raises(ValueError, match="must not change"):
        next(shard.blocks())


def test_shards_that_are_read_need_few_open_files(
    timelines: list[Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By four threads at once; what one of them holds stays valid when its file is closed."""
    monkeypatch.setattr("smbfast.data.shards._MAPS", OpenMaps(8))
    shards = [Shard(write_shard(tmp_path / f"{i}.shard", timelines[i % 3 :])) for i in range(24)]
    before = len(os.listdir("/proc/self/fd"))
    first = shards[0][0]

    def read(seed: int) -> int:
        most = 0
        for i in np.random.default_rng(seed).permutation(24).tolist():
            assert_same_timeline(shards[i][0], timelines[i % 3])
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return most

    with ThreadPoolExecutor(4) as pool:
        most = max(pool.map(read, range(4)))
    # each thread may use a map that was put out, open the next file, and list what is open
    assert 8 <= most <= 8 + 1 + 4 * 4
    assert_same_timeline(first, timelines[0])


@pytest.mark.parametrize("changed", ["content", "time", "size", "gone"])
def test_a_shard_is_read_whole_again_only_if_it_changed(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(write_meds(tmp_path / "meds"), tmp_path / "out").folder
    read: list[str] = []
    honest = ArrayFile.verify
    monkeypatch.setattr(ArrayFile, "verify", lambda f: (read.append(f.path.name), honest(f)))
    Prepared.open(folder)
    assert read == []
    file = folder / "train/0.shard"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    if changed == "gone":
        file.unlink()
        with pytest.raises(ValueError, match=r"train/0\.shard must be there"):
            Prepared.open(folder)
        return
    raw = bytearray(file.read_bytes())
    raw[-100] ^= changed != "time"
    file.write_bytes(raw[:-64] if changed == "size" else raw)
    if changed == "content":  # and nobody can see it from outside
        os.utime(file, ns=times)
        Prepared.open(folder)
        with pytest.raises(ValueError, match=r"0\.shard does not match its SHA-256"):
            Prepared.open(folder, "all")
    elif changed == "time":
        Prepared.open(folder)
        assert read == ["0.shard"]
        Prepared.open(folder)
        assert read == ["0.shard"]  # the record has its new time
    else:
        with pytest.raises(ValueError, match=r"0\.shard must hold"):
            Prepared.open(folder)


def test_another_whole_shard_is_refused(tmp_path: Path) -> None:
    folder = prepared(write_meds(tmp_path / "meds"), tmp_path / "out").folder
    (folder / "train/0.shard").write_bytes((folder / "tuning/0.shard").read_bytes())
    with pytest.raises(ValueError, match="it is another file"):
        Prepared.open(folder)


def test_files_are_private(timelines: list[Timeline], tmp_path: Path) -> None:
    assert stat.S_IMODE(write_shard(tmp_path / "0.shard", timelines).stat().st_mode) == 0o600
    made = prepared(write_meds(tmp_path / "meds"), tmp_path / "out")
    made.windows("train", 128, ObjectiveSettings())
    for entry in made.folder.rglob("*"):
        if entry.suffix in (".shard", ".windows") or entry.name == "verified.json":
            assert stat.S_IMODE(entry.stat().st_mode) == 0o600, entry
            parents = {p for p in entry.parents if p.is_relative_to(made.folder)}
            assert {stat.S_IMODE(p.stat().st_mode) for p in parents} <= {0o700}


def test_a_failed_shard_leaves_nothing(timelines: list[Timeline], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "0.shard") as writer:
        writer.add(timelines[0])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_shard(
    timelines: list[Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(BytesIO):
        def write(self, *_: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"No space left.*0\.shard"):
        write_shard(tmp_path / "0.shard", timelines)
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
    monkeypatch.setattr(fitting, "PARALLEL_ROWS", 0)
    calls: list[str] = []
    pool = base_workers.worker_pool

    def counting(*args: object, **options: object) -> object:
        calls.append("pool")
        return pool(*args, **options)

    monkeypatch.setattr(base_workers, "worker_pool", counting)
    # a spawned process would import for five seconds what this one has
    monkeypatch.setattr(base_workers, "get_context", lambda _spawn: get_context("fork"))
    together = prepared(data, tmp_path / "two", workers=2).folder
    assert calls == ["pool"]
    assert content(alone) == content(together)


def test_workers_are_processes_that_begin_anew() -> None:
    with base_workers.worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        # signals of a job are for the parent to answer; a fork would have what pytest has imported
        assert pool.submit(signal.getsignal, signal.SIGTERM).result() == signal.SIG_IGN
        assert pool.submit(eval, "'numpy' in __import__('sys').modules").result() is False


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
    assert plain["tuning/0.shard"] != others["tuning/0.shard"]
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
    data = tmp_path / "meds"
    for key in ("data_format", "layout"):
        (folder / "prepare.json").write_text(
            json.dumps({k: v for k, v in record.items() if k != key})
        )
        with pytest.raises(ValueError, match=r"prepared by an earlier version.*again"):
            Prepared.open(folder)
        with pytest.raises(ValueError, match=r"prepared by an earlier version.*again"):
            prepared(data, folder)


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
