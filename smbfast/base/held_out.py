"""Counts how often figures of held-out patients were asked for, in `held_out.json` of a run.

Held-out patients are for the end: whoever looks, changes something and looks again has chosen on
them. So figures are of tuning unless `--final` asks for held-out ones, and each time is recorded
here, before they are shown.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from smbfast.base.files import committed_file, read_json

FILE = "held_out.json"


def num_looks(folder: Path) -> int:
    """Return how often held-out figures of the run in `folder` were asked for.

    Raises:
        ValueError: the record cannot be read.
    """
    return len(_looks(folder))


def count_look(folder: Path, command: str) -> int:
    """Record that `command` is about to show held-out figures, and return how often that was.

    Args:
        folder: of the run; it is made if it is missing.

    Raises:
        ValueError: the record cannot be read.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    looks = [*_looks(folder), {"at": now, "command": command}]
    with committed_file(Path(folder) / FILE, private=True) as staging:
        staging.write_text(json.dumps({"looks": looks}, indent=1) + "\n", encoding="utf-8")
    return len(looks)


def run_of(embeddings: Path) -> Path | None:
    """Return the folder of the run that wrote `embeddings`, if they lie in it or one below it."""
    near = Path(embeddings).resolve().parents[:2]
    return next((folder for folder in near if (folder / "run.json").is_file()), None)


def times(number: int) -> str:
    """Return a number of times in words."""
    return f"{number:,} time{'' if number == 1 else 's'}"


def _looks(folder: Path) -> list[object]:
    file = Path(folder) / FILE
    if not file.exists():
        return []
    try:
        looks = read_json(file).get("looks")
    except ValueError:
        looks = None
    if not isinstance(looks, list):
        raise ValueError(
            f"{file} must hold the list `looks`, of the times when held-out figures were asked "
            "for; it does not. Put the file back"
        )
    return looks
