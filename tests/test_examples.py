"""The examples run as they stand, and what the notebook shows is what its cells give."""

import json
import os
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.notebooks import NOTEBOOK, code_cells, run_cells

EXAMPLES = NOTEBOOK.parent


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, no_report: None
) -> tuple[Path, list[list[dict]], dict]:
    """The notebook, run in a folder of its own: the folder, outputs by cell, and its names."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outputs, names = run_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    return folder, outputs, names


@pytest.mark.slow
def test_the_notebook_goes_from_meds_to_auroc(executed: Any) -> None:
    _, _, names = executed
    # of 300 patients with the outcome in a quarter, chance has a standard deviation of 0.03
    assert 0.6 < names["low"] < names["auroc"] < names["high"] < 1
    assert names["today"]["risk"].between(0, 1).all() and len(names["today"]) > 100
    assert set(names["nodes"]["subject_id"]).isdisjoint(names["held_out"]["subject_id"])


@pytest.mark.slow
def test_what_the_notebook_shows_is_of_the_kinds_that_its_cells_give(executed: Any) -> None:
    """Figures and losses differ by rounding from machine to machine, so they are not compared."""
    _, outputs, _ = executed
    cells = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell, given in zip(cells, outputs, strict=True):
        kinds = [(o["output_type"], sorted(o.get("data", ()))) for o in given]
        assert [(o["output_type"], sorted(o.get("data", ()))) for o in cell["outputs"]] == kinds
    shown = json.dumps([cell["outputs"] for cell in cells])
    assert not any(f'"{place}/' in shown or f" {place}/" in shown for place in ("/tmp", "/home"))


@pytest.mark.slow
def test_the_script_embeds_one_patient_and_all(
    executed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, _, names = executed
    work, out = folder / names["work"], tmp_path / "now.parquet"
    final, cohort = work / "run" / "final", work / "cohort"
    monkeypatch.setattr(sys, "argv", ["embed_patients.py", *map(str, (final, cohort, out))])
    umask = os.umask(0o022)
    try:
        run_path(str(EXAMPLES / "embed_patients.py"), run_name="__main__")
    finally:
        os.umask(umask)
    table = pq.read_table(out)
    said = capsys.readouterr().out
    assert f"{len(table)} patients x 32 numbers" in said and "two years before: 1" in said
    assert out.stat().st_mode & 0o077 == 0
    expected = names["model"].embed(cohort).vector_KD
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), expected)
