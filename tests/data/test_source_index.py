"""The index of a dataset: the same dataset with it and without, and no file read twice."""

import os
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data import source_index
from smbfast.data.meds import MedsDataset
from smbfast.data.splits import SPLITS
from tests.factory import CODES, subject_rows, write_codes, write_flat, write_meds
from tests.factory import write_table as written
from tests.refusal import refused


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = write_meds(tmp_path / "meds")
    for subject in (30, 31, 32):
        written(folder / "data" / "train" / f"{subject}.parquet", subject_rows(subject))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose subjects are read or whose bytes are hashed."""
    names: list[str] = []
    honest, hashed = source_index.open_parquet, source_index.file_digest

    def opening(file: Path, *more: object) -> pq.ParquetFile:
        names.append(file.name)
        return honest(file, *more)

    def hashing(file: Path) -> str:
        names.append(f"# {file.name}")
        return hashed(file)

    monkeypatch.setattr(source_index, "open_parquet", opening)
    monkeypatch.setattr(source_index, "file_digest", hashing)
    return names


def of(dataset: MedsDataset) -> tuple:
    """What a dataset is, of its subjects, rows, codes and bytes."""
    subjects = [dataset.subjects(split).tolist() for split in SPLITS]
    rows = [dataset.num_rows(file) for file in dataset.splits["train"]]
    names = dict(dataset.descriptions), dict(dataset.parents)
    return subjects, rows, names, dataset.digest(SPLITS)


def test_a_file_is_read_once(data: Path, tmp_path: Path, read: list[str]) -> None:
    plain = of(MedsDataset.open(data))
    read.clear()
    index = tmp_path / "new" / "index"
    assert of(MedsDataset.open(data, index=index)) == plain
    assert len([n for n in read if n[0] != "#"]) == 6 == len([n for n in read if n[0] == "#"])
    read.clear()
    assert of(MedsDataset.open(data, index=index)) == plain and not read
    for path in (index.parent, index, *index.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_changed_file_is_read_again_alone(data: Path, tmp_path: Path, read: list[str]) -> None:
    index, file = tmp_path / "index", data / "data" / "train" / "31.parquet"
    # a corrected export of equal size, under the same mtime: pages are plain, so that sizes agree
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    rows = subject_rows(31)
    written(file, rows, **options)
    before = of(MedsDataset.open(data, index=index))
    state = file.stat()
    written(file, [(*row[:3], row[3] and row[3] + 1, row[4]) for row in rows], **options)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    read.clear()
    after = of(MedsDataset.open(data, index=index))
    assert read == ["31.parquet", "# 31.parquet"]
    assert after[:-1] == before[:-1] and after[-1] != before[-1]
    assert after == of(MedsDataset.open(data))


def test_files_that_come_and_go(data: Path, tmp_path: Path, read: list[str]) -> None:
    index, train = tmp_path / "index", data / "data" / "train"
    MedsDataset.open(data, index=index)
    (train / "30.parquet").unlink()
    written(train / "33.parquet", subject_rows(33))
    read.clear()
    dataset = MedsDataset.open(data, index=index)
    assert read == ["33.parquet"]
    assert dataset.subjects("train").tolist()[12:] == [31, 32, 33]
    read.clear()
    (train / "31.parquet").rename(train / "29.parquet")
    assert of(MedsDataset.open(data, index=index)) == of(MedsDataset.open(data))
    written(train / "34.parquet", subject_rows(32))
    refused(lambda: MedsDataset.open(data, index=index), "34.parquet", "row 0", "32.parquet")


@pytest.mark.parametrize("name", [source_index.FILE, "codes.arrow"])
@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"\0" * 4096, None])
def test_a_damaged_index_is_made_again(
    data: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    index = tmp_path / "index"
    plain = of(MedsDataset.open(data, index=index))
    whole = (index / name).read_bytes()
    (index / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert of(MedsDataset.open(data, index=index)) == plain
    # an index of another form is no index of ours
    sink = pa.ipc.new_file(str(index / name), pa.schema([("x", pa.int64())]))
    sink.close()
    assert of(MedsDataset.open(data, index=index)) == plain


@pytest.mark.parametrize("name", [source_index.FILE, "codes.arrow"])
def test_any_flipped_bit_of_an_index_is_seen(data: Path, tmp_path: Path, name: str) -> None:
    """Arrow itself would read other ids, or end the process."""
    index = tmp_path / "index"
    MedsDataset.open(data, index=index)
    whole = (index / name).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (index / name).write_bytes(flipped)
        assert source_index.map_arrow(index / name, lambda _: True) is None, at


def test_an_index_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert of(MedsDataset.open(data, index=tmp_path / "file" / "index")) == of(
        MedsDataset.open(data)
    )


def test_a_subject_that_only_an_index_has_is_sought_in_an_empty_file_too(tmp_path: Path) -> None:
    for number, rows in enumerate(([], subject_rows(30))):
        file = written(tmp_path / f"{number}.parquet", rows)
        with pytest.raises(ValueError, match=r"must hold the subjects .*: remove the index"):
            source_index.row_of(file, pq.ParquetFile(file), 31)


def test_every_byte_is_in_the_digest(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "meds")
    index, seen = tmp_path / "index", set()
    codes, splits = (data / "metadata" / f"{n}.parquet" for n in ("codes", "subject_splits"))
    seen.add(MedsDataset.open(data, index=index).digest(SPLITS))
    write_codes(data, {**CODES, "LAB//glucose": "Glucose in blood, corrected"})
    seen.add(MedsDataset.open(data, index=index).digest(SPLITS))
    rows = pq.read_table(splits)
    moved = pa.array(["tuning", *rows["split"].to_pylist()[1:]])
    written(splits, rows.set_column(1, "split", moved))
    seen.add(MedsDataset.open(data, index=index).digest(SPLITS))
    assert len(seen) == 3
    assert MedsDataset.open(data).digest(SPLITS) in seen
    codes.unlink()
    seen.add(MedsDataset.open(data, index=index).digest(SPLITS))
    assert len(seen) == 4
    assert MedsDataset.open(data).digest(("train",)) not in seen


def test_a_file_that_changes_while_it_is_read(data: Path, tmp_path: Path) -> None:
    dataset = MedsDataset.open(data)
    file = data / "data" / "train" / "31.parquet"
    os.utime(file, ns=(1, 1))
    refused(lambda: dataset.digest(("train",)), file, "changed")
