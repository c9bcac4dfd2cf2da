"""What settings decide beyond their own keys, and refuse before anything large is imported."""

from pathlib import Path

from smbfast.settings.data import VOCABULARY, DataSettings
from smbfast.settings.training import TrainSettings


def decided_data(settings: TrainSettings) -> DataSettings:
    """Return the data settings of a run with the format decided.

    Raises:
        ValueError: settings of the data contradict each other or the backbone, or there is no
            folder at `data.path`.
    """
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
    if not path.is_dir():
        there = "it is a file" if path.exists() else "there is no such folder"
        raise ValueError(f"{path} must be the folder of a MEDS dataset; {there}")
