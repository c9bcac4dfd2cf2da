"""Models beside: which files are taken, joined by node, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data.labels import Labels
from smbfast.probing.beside import parsed

SPLIT_N = np.repeat(["train", "tuning"], 4)
TRUE_N = np.array([True, False] * 4)
LABELS = Labels("sick", "binary", np.arange(8), np.arange(8) * 10, SPLIT_N, TRUE_N)
LATE = Labels("late", "time_to_event", *(getattr(LABELS, n) for n in ("subject_N", "time_N")),
              SPLIT_N, None, np.arange(8.0), TRUE_N)  # fmt: skip
SCORE_J = [0.1, 0.9, 0.4, 0.2]


def write(path: Path, order: list[int], column: str, scores: list, **other: list) -> Path:
    """Write predictions of the rows 4 + `order`, those of tuning."""
    rows = 4 + np.array(order)
    columns = {
        "subject_id": pa.array(rows),
        "prediction_time": pa.array(rows * 10, pa.timestamp("us")),
        column: pa.array(scores, pa.float64()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | other), path)
    return path


def chances(path: Path, order: list[int], **other: list) -> Path:
    scores = [SCORE_J[at] for at in order]
    return write(path, order, "predicted_boolean_probability", scores, **other)


def test_predictions_are_joined_by_node(tmp_path: Path) -> None:
    file = chances(tmp_path / "a.parquet", [2, 0, 3, 1], boolean_value=[True, True, False, False])
    scored = parsed([f"peer={file}"], set())[0].scored(LABELS, "tuning")
    assert (scored.name, scored.role) == ("peer", "beside")
    np.testing.assert_array_equal(scored.score_SN, [[np.nan] * 4 + SCORE_J])
    hazards = write(tmp_path / "b.parquet", [1, 0, 2, 3], "log_hazard", [-1.0, 5.0, 0.0, 2.0])
    late = parsed([f"peer={hazards}"], set())[0].scored(LATE, "tuning")
    assert late.score_SN[0, 4:].tolist() == [5, -1, 0, 2]


def test_folders_by_task_with_versions(tmp_path: Path) -> None:
    for name in ("smbfast-0", "smbfast-1", "counts"):
        chances(tmp_path / "run" / "predictions" / "sick" / f"{name}.parquet", [0, 1, 2, 3])
    beside = parsed([f"old={tmp_path / 'run'}"], set())[0]
    assert beside.scored(LABELS, "tuning").score_SN.shape == (2, 8)
    absent = beside.scored(LATE, "tuning")
    assert absent.score_SN.shape == (0, 8) and "no predictions of this task" in absent.reason
    for name in ("xgb", "lr"):
        chances(tmp_path / "peers" / "sick" / f"{name}.parquet", [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"must hold one model.*lr, xgb"):
        parsed([f"p={tmp_path / 'peers'}"], set())[0].scored(LABELS, "tuning")


def test_what_cannot_be_judged_is_refused_without_a_small_count(tmp_path: Path) -> None:
    cases = {
        "must score every tuning row of .*; <=10 of <=10 are not so": chances(
            tmp_path / "a.parquet", [0, 1, 2]
        ),
        "must agree with the labels of .*; <=10": chances(
            tmp_path / "b.parquet", [0, 1, 2, 3], boolean_value=[False, True, True, False]
        ),
        "rows repeat": chances(tmp_path / "c.parquet", [0, 1, 2, 3, 3]),
        "scores of every judged row": write(
            tmp_path / "d.parquet", [0, 1, 2, 3], "predicted_boolean_probability", [0, 1, 2, np.nan]
        ),
    }
    for words, file in cases.items():
        with pytest.raises(ValueError, match=words):
            parsed([f"peer={file}"], set())[0].scored(LABELS, "tuning")


def test_names_and_paths(tmp_path: Path) -> None:
    file = chances(tmp_path / "a.parquet", [0])
    neither = write(tmp_path / "b.parquet", [0], "other", [1.0])
    for words, given in {
        "NAME=PATH": ["a"],
        "name of letters": [f"a b={file}"],
        "`counts` is taken": [f"counts={file}"],
        "`a` is taken": [f"a={file}", f"a={file}"],
        "a parquet file or a folder": [f"a={tmp_path / 'absent'}"],
        "must have a column": [f"a={neither}"],
    }.items():
        with pytest.raises(ValueError, match=words):
            parsed(given, {"counts"})
