"""Damaged files and folders: parquet that cannot be read, metadata, shards, a stopped prepare."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from smbfast import prepare as entry
from smbfast.base.files import verify_folder
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings
from tests.factory import CODES, SPLITS, split_rows, write_codes, write_meds, write_table
from tests.kills import killed_in_a_write
from tests.refusal import CANARY, no_canary, nothing_half_written, refused

CANARY_ROWS = [(99, None, f"LAB//{CANARY}", 1.0, CANARY)]


TEXT = {"format": "text-paper", "vocab_size": 500, "workers": 1}


def settings(data: Path, **changed: object) -> DataSettings:
    return DataSettings(path=str(data), **{**TEXT, **changed})


def run(data: Path, out: Path, **changed: object) -> Prepared:
    return prepare(settings(data, **changed), out, None, ("train", "tuning"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_meds(tmp_path / "data", {"train": [*split_rows("train"), *CANARY_ROWS]})


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` as it is above, and `out`, prepared from it."""
    folder = tmp_path_factory.mktemp("once")
    write_meds(folder / "data", {"train": [*split_rows("train"), *CANARY_ROWS]})
    run(folder / "data", folder / "out")
    return folder


@pytest.fixture
def out(once: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage, whose data is `once / "data"`."""
    return shutil.copytree(once / "out", tmp_path / "out")


def damage_text(file: Path) -> None:
    file.write_text(f"subject_id,time,code\n99,,{CANARY}\n")


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def damage_pages(file: Path) -> None:
    """Every page, but not the footer."""
    content = bytearray(file.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for at in range(4, len(content) - footer):
        content[at] ^= 0xFF
    file.write_bytes(content)


def damage_kind(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = [damage_text, damage_empty, damage_end, damage_pages, damage_kind]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["data/train/0.parquet", "metadata/codes.parquet"])
def test_unreadable_parquet(
    data: Path, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    file = data / name
    damage(file)
    if name.startswith("metadata") and damage is damage_kind:
        assert MedsDataset.open(data).descriptions == {}
        return
    argv = [f"--path={data}", f"--out={tmp_path / 'out'}", "--vocab_size=500"]
    refused(lambda: entry.main(argv), file)
    refused(lambda: run(data, tmp_path / "out"), file)
    nothing_half_written(tmp_path)
    assert not (tmp_path / "out").exists()


def read_all(data: Path) -> str:
    rows = []
    for batch in MedsDataset.open(data).batches("train"):
        rows.append((batch.subject_N.tolist(), batch.time_N.tolist(), batch.codes, batch.texts))
        rows.append((batch.code_N.tolist(), batch.text_N.tolist(), str(batch.value_N.tolist())))
    return str(rows)


@pytest.mark.parametrize("checksums", [True, False])
def test_flipped_bytes_are_an_error_or_no_change(tmp_path: Path, checksums: bool) -> None:
    """With page checksums nothing slips through; without, some values may, but no other error."""
    data = write_meds(tmp_path / "data", write_page_checksum=checksums)
    file = data / "data" / "train" / "0.parquet"
    good, content = read_all(data), file.read_bytes()
    draw = random.Random(0)
    errors = 0
    for _ in range(60):
        bad = bytearray(content)
        for _ in range(draw.choice([1, 3, 30])):
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            assert read_all(data) == good or not checksums
        except ValueError as error:
            assert type(error) is ValueError and str(file) in str(error)
            errors += 1
    assert errors > 20


def test_text_that_is_not_utf8(data: Path, tmp_path: Path) -> None:
    file = data / "data" / "train" / "0.parquet"
    bad = pa.array([b"LAB//\xff" + CANARY.encode()], pa.binary())
    for column in ("code", "text_value"):
        table = pa.table(
            {
                "subject_id": pa.array([5], pa.int64()),
                "time": pa.array([5], pa.timestamp("us")),
                "code": pa.array(["LAB//x"]),
                "text_value": pa.array(["x"]),
            }
        )
        text = pa.Array.from_buffers(pa.string(), 1, bad.buffers())
        write_table(file, table.set_column(table.schema.get_field_index(column), column, text))
        refused(lambda: run(data, tmp_path / "out"), file, "UTF-8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"description": [CANARY]}), ("`code`", "`description`")),
        (pa.table({"code": [7], "description": [CANARY]}), ("`code`", "string")),
        (pa.table({"code": ["LAB//x"], "description": [3]}), ("`description`", "string")),
        (pa.table({"code": ["LAB//x", None], "description": [CANARY, "y"]}), ("row 1", "`code`")),
    ],
)
def test_bad_codes(data: Path, tmp_path: Path, table: pa.Table, words: tuple[str, ...]) -> None:
    file = write_table(data / "metadata" / "codes.parquet", table)
    refused(lambda: run(data, tmp_path / "out"), file, *words)
    assert not (tmp_path / "out").exists()


def test_codes_may_be_missing_or_without_descriptions(data: Path, tmp_path: Path) -> None:
    file = data / "metadata" / "codes.parquet"
    for number, table in enumerate(
        (
            pa.table({"code": ["LAB//glucose"]}),
            pa.table({"code": ["LAB//glucose"], "description": pa.nulls(1)}),
            pa.table({"code": ["LAB//glucose"], "description": ["x"], "parent_codes": [[None]]}),
            pa.table({"code": ["LAB//glucose"], "description": ["x"], "parent_codes": [[3]]}),
            None,
        )
    ):
        file.unlink()
        if table is not None:
            write_table(file, table)
        assert run(data, tmp_path / str(number)).counts["subjects"] == 16
        file.touch()


def test_a_stopped_prepare_goes_on(once: Path, out: Path) -> None:
    names = ("train/0.shard", "tuning/0.shard", "tokenizer/manifest.json")
    before = {n: ((out / n).stat().st_mtime_ns, (out / n).read_bytes()) for n in names}
    (out / "prepare.json").unlink()
    killed_in_a_write(out / "tuning" / "0")
    (out / "tuning/0.shard").unlink()
    (out / "tuning" / "0.tmp").mkdir()  # of others
    again = run(once / "data", out)
    after = {n: ((out / n).stat().st_mtime_ns, (out / n).read_bytes()) for n in names}
    assert [n for n in names if after[n][0] != before[n][0]] == ["tuning/0.shard"]
    assert [after[n][1] for n in names] == [before[n][1] for n in names]
    assert len(again.shards("tuning")[0]) == len(SPLITS["tuning"])
    assert list(out.rglob("*.tmp")) == [out / "tuning" / "0.tmp"]


def test_a_failure_half_way_leaves_no_shard(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(out / "train" / "0.shard.tmp"))

    monkeypatch.setattr("smbfast.data.shards.ShardWriter.add", full)
    argv = [f"--path={data}", f"--out={out}", "--vocab_size=500"]
    refused(lambda: entry.main(argv), "No space left on device", "0.shard")
    nothing_half_written(tmp_path)
    assert not (out / "train" / "0.shard").exists()
    monkeypatch.undo()
    entry.main(argv)
    assert (out / "prepare.json").is_file()


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"bucket": "hour"}, "options"),
        ({"delimiters": "text"}, "delimiters"),
        ({"vocab_size": 600}, "tokenizer"),
        ({"format": "codes"}, "data_format"),
    ],
)
@pytest.mark.parametrize("left", ["plan.json", "prepare.json"])
def test_a_folder_of_other_settings(
    once: Path, out: Path, changed: dict, word: str, left: str
) -> None:
    (out / ("prepare.json" if left == "plan.json" else "plan.json")).unlink()
    other = settings(once / "data").model_copy(update=changed)
    message = refused(lambda: prepare(other, out, None, ("train", "tuning")), out, word)
    assert "another folder" in message
    assert (out / left).is_file() and (out / "train" / "0.shard").is_file()


def test_a_folder_of_other_data(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    write_codes(data, {**CODES, "LAB//glucose": CANARY})
    refused(lambda: run(data, tmp_path / "out"), tmp_path / "out", "data differ")


@pytest.mark.parametrize("name", ["plan.json", "prepare.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "\x00\xff"])
def test_a_damaged_record(once: Path, out: Path, name: str, content: str) -> None:
    (out / name).write_text(content, encoding="latin-1")
    refused(lambda: run(once / "data", out), out)
    if name == "prepare.json":
        refused(lambda: Prepared.open(out), out)


@pytest.mark.parametrize("file", ["train/0.shard", "tokenizer/tokenizer.json"])
def test_a_damaged_shard_or_tokenizer(once: Path, out: Path, file: str) -> None:
    content = bytearray((out / file).read_bytes())
    content[len(content) // 2] ^= 1
    for damaged, word in ((bytes(content), "SHA-256"), (bytes(content[:-8]), "bytes")):
        (out / file).write_bytes(damaged)
        refused(lambda: Prepared.open(out), out / file, word)
    (out / "prepare.json").unlink()
    refused(lambda: run(once / "data", out), out / file)
    assert not (out / "prepare.json").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": [1]}}']
)
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    refused(lambda: verify_folder(tmp_path), tmp_path, "manifest.json")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_points_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: [1, "x"]}}))
    refused(lambda: verify_folder(tmp_path), "outside")


@pytest.mark.parametrize("content", ["{", '{"added_tokens": 3}', "[]", ""])
def test_a_broken_tokenizer(data: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    argv = [f"--path={data}", f"--out={tmp_path / 'out'}", f"--tokenizer={folder}"]
    refused(lambda: entry.main(argv), folder, "tokenizer")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    argv = [f"--path={data}", f"--out={tmp_path / 'file' / 'out'}", "--vocab_size=500"]
    refused(lambda: entry.main(argv), tmp_path / "file", "Not a directory")


def test_nothing_of_a_cell_is_printed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    entry.main([f"--path={data}", f"--out={out}", "--vocab_size=500"])
    shown = capsys.readouterr()
    no_canary(shown.out + shown.err)
    for name in ("plan.json", "prepare.json"):
        no_canary((out / name).read_text())
    private = [p for p in (out / "train").rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert private and all(p.stat().st_mode & 0o077 == 0 for p in private)
