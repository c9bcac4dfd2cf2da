"""Labels, nodes and embeddings that do not fit the data: refused, or skipped and counted."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast import embed, probe
from tests.factory import at, split_rows, write_labels, write_meds, write_table
from tests.refusal import CANARY, CANARY_SUBJECT, no_canary, nothing_half_written, refused

Embed = Callable[..., dict[str, int]]


@pytest.fixture
def embedded(
    trained: Path,
    meds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Embed:
    """Embed label rows of one task (or of a task folder); what was counted."""

    # the log itself does not tell 1 to 10 apart
    monkeypatch.setattr("smbfast.base.counts.of_whole", lambda count, whole: str(count))

    def run(rows: Sequence[tuple] | Path, data: Path = meds, *more: str) -> dict[str, int]:
        task = rows
        if not isinstance(rows, Path):
            task = tmp_path / "task"
            write_labels_file(task / "any.parquet", rows)
        argv = [f"--model={trained / 'final'}", f"--data={data}", f"--labels={task}"]
        capsys.readouterr()
        embed.main([*argv, f"--out={tmp_path / 'out.parquet'}", *more])
        shown = capsys.readouterr()
        no_canary(shown.out + shown.err)
        words = [part.rsplit(" ", 1) for part in shown.out.splitlines()[-1].split(", ")]
        return {name.replace(" ", "_"): int(count) for name, count in words}

    return run


def write_labels_file(file: Path, rows: Sequence[tuple], **columns: pa.Array) -> Path:
    table = {
        "subject_id": pa.array([r[0] for r in rows], pa.int64()),
        "prediction_time": pa.array([r[1] for r in rows], pa.timestamp("us")),
        "boolean_value": pa.array([i % 2 == 0 for i in range(len(rows))], pa.bool_()),
    }
    return write_table(file, pa.table(table | columns))


def out_rows(tmp_path: Path) -> list[tuple[int, int]]:
    table = pq.read_table(tmp_path / "out.parquet")
    times = table["prediction_time"].cast(pa.int64()).to_pylist()
    return list(zip(table["subject_id"].to_pylist(), times, strict=True))


def microseconds(time: np.datetime64) -> int:
    return int(time.astype("datetime64[us]").astype(np.int64))


def test_unknown_subjects_are_counted(embedded: Embed, tmp_path: Path) -> None:
    counts = embedded([(1, at(3)), (CANARY_SUBJECT, at(3)), (13, at(3)), (CANARY_SUBJECT, at(4))])
    assert (counts["nodes"], counts["embedded"], counts["unknown_subjects"]) == (4, 2, 2)
    assert out_rows(tmp_path) == [(1, microseconds(at(3))), (13, microseconds(at(3)))]
    assert pq.read_table(tmp_path / "out.parquet")["split"].to_pylist() == ["train", "tuning"]


def test_unknown_subjects_in_files_of_a_split_are_counted(embedded: Embed, tmp_path: Path) -> None:
    for split, subject in (("train", 1), ("tuning", CANARY_SUBJECT)):
        write_labels_file(tmp_path / "mine" / f"{split}.parquet", [(subject, at(3))])
    counts = embedded(tmp_path / "mine")
    assert (counts["embedded"], counts["unknown_subjects"]) == (1, 1)


def test_nodes_before_the_first_event_are_counted(embedded: Embed, tmp_path: Path) -> None:
    counts = embedded([(1, at(-1)), (1, at(0, 7)), (1, at(0, 8)), (2, at(3))])
    assert (counts["before_first_event"], counts["embedded"]) == (2, 2)
    assert out_rows(tmp_path)[0] == (1, microseconds(at(0, 8)))


@pytest.mark.parametrize(
    "rows", [[(CANARY_SUBJECT, at(3))], [(1, at(-500)), (2, at(-1))], [(1, at(-1)), (77, at(3))]]
)
def test_no_node_that_could_be_embedded(embedded: Embed, tmp_path: Path, rows: list[tuple]) -> None:
    refused(lambda: embedded(rows), "no decision node")
    assert not (tmp_path / "out.parquet").exists()
    nothing_half_written(tmp_path)


def test_no_label_row(embedded: Embed, tmp_path: Path) -> None:
    refused(lambda: embedded([]), "no decision node")
    (tmp_path / "empty").mkdir()
    refused(lambda: embedded(tmp_path / "empty"), tmp_path / "empty", "parquet")
    refused(lambda: embedded(tmp_path / "missing"), "missing", "task")
    assert not (tmp_path / "out.parquet").exists()


def test_labels_in_the_file_of_another_split(embedded: Embed, tmp_path: Path) -> None:
    write_labels_file(tmp_path / "mine" / "held_out.parquet", [(1, at(3)), (17, at(3))])
    refused(lambda: embedded(tmp_path / "mine"), "mine", "<=10 rows", "split")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"subject_id": pa.array([str(CANARY_SUBJECT), "2"])}, ("`subject_id`", "int64")),
        ({"subject_id": pa.array([1, None], pa.int64())}, ("`subject_id`", "row 1", "null")),
        ({"prediction_time": pa.array([CANARY, "b"])}, ("`prediction_time`", "timestamp")),
        (
            {"prediction_time": pa.array([1, 2], pa.timestamp("us", tz="Asia/Tokyo"))},
            ("`prediction_time`", "time zone"),
        ),
        ({"prediction_time": pa.array([1, None], pa.timestamp("us"))}, ("row 1", "null")),
    ],
)
def test_bad_columns_of_labels(
    embedded: Embed, tmp_path: Path, columns: dict, words: tuple[str, ...]
) -> None:
    rows = [(CANARY_SUBJECT, at(3)), (2, at(3))]
    file = write_labels_file(tmp_path / "mine" / "train.parquet", rows, **columns)
    refused(lambda: embedded(file.parent), file, *words)
    file.write_text(f"{CANARY_SUBJECT},{CANARY}")
    refused(lambda: embedded(file.parent), file, "parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_bad_data_under_good_labels(embedded: Embed, tmp_path: Path) -> None:
    rows = [*split_rows("train"), (CANARY_SUBJECT, at(1), None, 1.0, CANARY)]
    data = write_meds(tmp_path / "data", {"train": rows})
    refused(lambda: embedded([(CANARY_SUBJECT, at(3))], data), "0.parquet", f"row {len(rows) - 1}")
    refused(lambda: embedded([(1, at(3))], tmp_path / "no"), tmp_path / "no")
    assert not (tmp_path / "out.parquet").exists()


def test_an_output_that_cannot_be_written(embedded: Embed, meds: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.parquet").mkdir()
    for name in ("file/out.parquet", "folder.parquet"):
        refused(lambda n=name: embedded([(1, at(3))], meds, f"--out={tmp_path / n}"), tmp_path)
        nothing_half_written(tmp_path)


def test_embeddings_are_private(embedded: Embed, tmp_path: Path) -> None:
    embedded([(1, at(3))])
    assert (tmp_path / "out.parquet").stat().st_mode & 0o777 == 0o600


def probe_words(embeddings: Path, data: Path, *more: str) -> list[str]:
    out = embeddings.parent / "probed"
    return [f"--embeddings={embeddings}", f"--data={data}", f"--out={out}", *more]


def test_probe_refuses_what_does_not_fit(embedded: Embed, meds: Path, tmp_path: Path) -> None:
    embedded([(1, at(2))])
    good = tmp_path / "out.parquet"
    missing, broken = tmp_path / "missing.parquet", tmp_path / "broken.parquet"
    broken.write_text(CANARY)
    table = pq.read_table(good)
    vectors = table.schema.get_field_index("embedding")
    nan = pa.FixedSizeListArray.from_arrays(pa.array([np.nan, 1.0], pa.float32()), 2)
    labelled = pa.array([at(3, 15)], pa.timestamp("us"))  # rows that no label asks for are not read
    wrong = table.set_column(vectors, "embedding", nan).set_column(1, "prediction_time", labelled)
    cases = [
        (missing, (missing,)),
        (broken, (broken, "parquet")),
        (write_table(tmp_path / "a.parquet", table.drop_columns(["split"])), ("`split`",)),
        (
            write_table(tmp_path / "b.parquet", wrong),
            ("`embedding`", "row 0", "finite"),
        ),
        (good, ("label rows of task",)),
    ]
    for file, words in cases:
        refused(lambda f=file: probe.main(probe_words(f, meds)), *words)
    refused(lambda: probe.main(probe_words(good, meds, "--labels=mortality")), "mortality")
    refused(lambda: probe.main(probe_words(good, tmp_path / "no")), tmp_path / "no")
    assert not (tmp_path / "probed").exists()
    nothing_half_written(tmp_path)


def test_probe_without_a_row_in_a_split(trained: Path, tmp_path: Path) -> None:
    data = write_meds(tmp_path / "data")
    write_labels(data, rows={"train": [(1, at(3), True), (2, at(3), False)]})
    embedding = pa.FixedSizeListArray.from_arrays(pa.array([0.0, 1.0], pa.float32()), 2)
    table = pa.table(
        {
            "subject_id": pa.array([1], pa.int64()),
            "prediction_time": pa.array([microseconds(at(3))], pa.timestamp("us")),
            "split": ["train"],
            "embedding": embedding,
        }
    )
    file = write_table(tmp_path / "out.parquet", table)
    refused(lambda: probe.main(probe_words(file, data)), "task", "no row in tuning")
    final = probe_words(file, data, "--final")
    refused(lambda: probe.main(final), "task", "no row in tuning, held_out")
    assert not (tmp_path / "held_out.json").exists()
