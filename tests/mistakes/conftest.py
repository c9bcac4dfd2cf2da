"""The dataset and the finished run that all mistakes are made with."""

import contextlib
import io
from pathlib import Path

import pytest

from smbfast import train
from tests.factory import tiny_run, write_labels, write_meds


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `meds`, twenty patients and one task, and `run`, trained and probed on them."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_labels(write_meds(folder / "meds").parent / "meds")
    more = ("--probe.labels=task", "--data.window=256")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setattr("smbfast.run.loop.write_report", lambda *_run, **_more: None)
        train.main(tiny_run(Path("meds"), Path("run"), *more))
    return folder
