"""Prediction files: what they hold, whose they are, and which are replaced."""

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.judging.predictions import (
    PREDICTIONS,
    about_predictions,
    require_predictions,
    write_predictions,
)
from tests.judging.planted import HORIZONS, planted


def test_every_model_and_version_has_a_file(tmp_path: Path) -> None:
    judged, scored, _ = planted(1.0, patients=20)
    write_predictions(tmp_path, judged, scored, "tuning")
    files = {file.name for file in (tmp_path / "predictions" / "task").iterdir()}
    versions = {f"untrained-{s}.parquet" for s in range(5)}
    single = {f"{model.name}.parquet" for model in scored if len(model.score_SN) == 1}
    assert files == single | versions  # and none of what was not measured
    file = tmp_path / "predictions" / "task" / "untrained-3.parquet"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    table = pq.read_table(file)
    assert table.schema.remove_metadata().equals(PREDICTIONS)
    own = next(model for model in scored if model.name == "untrained")
    shown = table["predicted_boolean_probability"].to_numpy()
    np.testing.assert_array_equal(shown, own.score_SN[3])
    about = about_predictions(file)
    assert (about["task"], about["kind"], about["model"]) == ("task", "binary", "untrained")
    assert (about["role"], about["version"], about["judged_on"]) == ("baseline", 3, "tuning")
    # of an earlier probe with other models nothing is left
    write_predictions(tmp_path, judged, scored[:2], "tuning")
    assert len(list(file.parent.iterdir())) == 2


def test_time_to_event_has_probabilities_where_they_are_known(tmp_path: Path) -> None:
    judged, scored, _ = planted(1.0, kind="time_to_event", patients=20)
    judged = replace(judged, competing_N=~judged.event_N)
    write_predictions(tmp_path, judged, scored, "held_out", HORIZONS)
    folder = tmp_path / "predictions" / "task"
    table = pq.read_table(folder / "counts.parquet")
    counts = next(model for model in scored if model.name == "counts")
    np.testing.assert_array_equal(table["event_probability_1"], counts.chance_SNH[0, :, 1])
    np.testing.assert_array_equal(table["log_hazard"], counts.score_SN[0])
    assert table["competing"].to_pylist() == (~judged.event_N).tolist()
    assert about_predictions(folder / "counts.parquet")["horizons_days"] == list(HORIZONS)
    oracle = pq.read_schema(folder / "oracle_filter.parquet")
    assert "log_hazard" in oracle.names and "event_probability_0" not in oracle.names


def test_files_of_others_are_neither_replaced_nor_removed(tmp_path: Path) -> None:
    judged, scored, _ = planted(1.0, patients=20)
    folder = tmp_path / "predictions" / "task"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), folder / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine\.parquet exists and was not written by smbfast"):
        require_predictions(tmp_path, ["task"])
    require_predictions(tmp_path, ["other"])
    write_predictions(tmp_path, judged, scored, "tuning")
    assert pq.read_table(folder / "mine.parquet").num_rows == 1
