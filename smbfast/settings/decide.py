"""What settings decide beyond their own keys, and refuse before anything large is imported."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from smbfast.settings.data import VOCABULARY, DataSettings
from smbfast.settings.training import TrainSettings


def _require_trackers(settings: TrainSettings) -> None:
    """Refuse trackers that cannot be opened, before anything is made.

    Raises:
        ValueError: a package is not installed, or MLflow has no server to send to.
    """
    for name in settings.run.track:
        if find_spec(name) is None:
            raise ValueError(
                f"run.track={name} needs the package {name}, which is not installed: pip install "
                f"'smbfast[{name}]', or leave it out"
            )
    online = settings.run.track_online and "mlflow" in settings.run.track
    if online and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "run.track_online=true needs the address of an MLflow server in MLFLOW_TRACKING_URI; "
            "it is not set"
        )


def decided_data(settings: TrainSettings) -> DataSettings:
    """Return the data settings of a run with the format decided.

    Raises:
        ValueError: settings of the data contradict each other or the backbone, a tracker cannot be
            opened, or there is no folder at `data.path`.
    """
    _require_trackers(settings)
    simulated = settings.data.path is None
    if not simulated:
        require_meds_folder(settings.data.folder)
    return settings.data.decided(tokenizer_folder(settings), simulated=simulated)


def tokenizer_folder(settings: TrainSettings) -> str | None:
    """Return what the tokens come from: the backbone, or an adapter that was trained on codes."""
    adapter = settings.model.adapter
    if adapter and (Path(adapter) / VOCABULARY).is_file():
        return adapter
    return settings.model.path


def require_meds_folder(path: Path) -> None:
    """Raise a ValueError unless there is a folder at `path`."""
    if re.match(r"\w{2,}:/", str(path)):  # a path holds no two slashes
        raise ValueError(
            f"{str(path).replace(':/', '://', 1)} must be a folder of this machine; copy or mount "
            "it, as no other is read"
        )
    if not path.is_dir():
        there = "it is a file" if path.exists() else "there is no such folder"
        raise ValueError(f"{path} must be the folder of a MEDS dataset; {there}")
