"""The simulated patient of the report: what is shown of its tokens, and what is hidden."""

from pathlib import Path

import pytest

from smbfast import prepare
from smbfast.data.prepared import Prepared
from smbfast.reporting.sample import HIDDEN, sample_of
from smbfast.settings import load
from smbfast.simulation.dataset import simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 60, 0)
    return folder


def sample(cohort: Path, out: Path, form: str, *more: str) -> dict:
    prepare.main([f"--path={cohort}", f"--out={out}", f"--format={form}", "--vocab_size=512"])
    words = ["--data.window=256", f"--data.format={form}", *more]
    return sample_of(Prepared.open(out), load("tiny", words))


def test_codes_are_names_and_hidden_ones_have_theirs_beside_them(
    cohort: Path, tmp_path: Path
) -> None:
    shown = sample(cohort, tmp_path / "a", "codes")
    lines = shown["lines"]
    assert lines[0]["text"].startswith("<begin>  GENDER//")
    masked = [line for line in lines if line["masked"]]
    assert masked and {line["text"] for line in masked} == {HIDDEN * 3}
    assert all("//" in line["truth"] and line["kind"] == "line" for line in masked)
    gaps = [line for line in lines if "later>" in line["text"]]
    assert gaps and {line["kind"] for line in gaps} == {"header"}
    assert not any(line["truth"] for line in lines if not line["masked"])


def test_a_hidden_skeleton_is_shown_as_hidden_and_not_as_predicted(
    cohort: Path, tmp_path: Path
) -> None:
    shown = sample(cohort, tmp_path / "a", "codes", "--objective.skeleton=hidden")
    future = [line for line in shown["lines"] if line["part"] == "future"]
    gaps = [line for line in future if line["kind"] == "header"]
    assert gaps and all(set(line["text"]) <= {HIDDEN, " "} for line in gaps)
    assert all("later>" in line["truth"] and not line["masked"] for line in gaps)
    assert "skeleton" in shown["note"]


def test_days_of_lean_text_are_headers(cohort: Path, tmp_path: Path) -> None:
    lines = sample(cohort, tmp_path / "a", "text")["lines"]
    days = [line for line in lines if line["text"].startswith("+")]
    assert days and {line["kind"] for line in days} == {"header"}
    assert not any(line["truth"] for line in lines)
