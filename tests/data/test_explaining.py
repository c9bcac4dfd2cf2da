"""`prepare --explain`, in every format."""

from pathlib import Path

import pytest

from smbfast import prepare as entry
from smbfast.data.explaining import explained
from smbfast.data.fitting import SUMMARY
from smbfast.data.prepared import Prepared
from smbfast.settings import DataSettings
from smbfast.simulation.dataset import simulate


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "cohort"
    simulate(folder, 60, 0)
    return folder


@pytest.mark.parametrize("form", ["codes", "text", "text-paper"])
def test_prepare_explains(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    out = tmp_path / "out"
    argv = [f"--path={cohort}", f"--out={out}", f"--format={form}", "--bucket=day"]
    entry.main([*argv, "--vocab_size=500", "--splits=train", "--explain"])
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("family", "LAB ", "VITAL "))]
    assert len(table) == 3 and "measurements" in table[1] and "tokens an event" in printed
    assert ("bins" in table[0]) == (form == "codes")
    # the same command again reads what is there, and prints the same
    entry.main([*argv, "--vocab_size=500", "--splits=train", "--explain"])
    assert printed.split("\n\n")[1] == capsys.readouterr().out.split("\n\n")[1]
    # without its summary, as where a vocabulary came with a backbone, events are counted again
    if form == "codes":
        prepared = Prepared.open(out)
        (out / "tokenizer" / SUMMARY).unlink()
        again = explained(prepared, DataSettings(path=str(cohort)))
        assert again == printed.split("\n\n", 1)[1].rstrip("\n").splitlines()
