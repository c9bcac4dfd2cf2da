"""One tiny training run that the tests of checkpoints and labels share."""

from pathlib import Path

import pytest

from smbfast import train
from tests.factory import tiny_run, write_labels, write_meds


@pytest.fixture(scope="session")
def meds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a task; tests that change it make their own."""
    folder = write_meds(tmp_path_factory.mktemp("meds") / "data")
    write_labels(folder)
    return folder


@pytest.fixture(scope="session")
def trained(meds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `meds`; tests that change it copy it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smbfast.run.loop.write_report", lambda *_run, **_more: None)
        train.main(tiny_run(meds, run))
    return run
