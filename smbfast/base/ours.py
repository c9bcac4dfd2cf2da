"""What we write, by name and form, so that nothing of others is ever taken for it.

It imports only the standard library: folders are looked at before anything is loaded or written.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from smbfast.base.claims import CLAIMS
from smbfast.base.locks import LOCK
from smbfast.base.replace import MANIFEST
from smbfast.base.staging import is_staging

# what systems leave in any folder and nobody misses; it is never touched either
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|lost\+found|Thumbs\.db|desktop\.ini")
_EVENTS = re.compile(r"events\.out\.tfevents\..*")
_COHORT = re.compile(r"cohort-\d+-\d+(-\d+)?")
_PREPARED = (
    *("plan.json", "prepare.json", "classes.json", "tokenizer", "counts"),
    *("train", "tuning", "held_out"),
)
_INDEXES = ("source", "windows", "verified.json")  # beside shards, or in a run instead of there
_DIGESTS = "digests.json"  # of weights, in a run
_TAIL = 1 << 20  # bytes at the end of a parquet file that are searched for the names of its columns
_OUTPUTS = (
    "report.html",
    "probe.json",
    "risk.json",
    "risk_functions.safetensors",
    "held_out.json",
    "embeddings/*.parquet",
    "predictions/*.parquet",
    "predictions/*/*.parquet",
)


def require_run_folder(folder: Path) -> None:
    """Refuse a folder for a run that holds anything of others.

    A run that has begun has a `config.toml`, or lost it and has its id or its status; files of
    others beside these are never touched, and it is refused only if one has the name of an output.
    What a run leaves that ended earlier is ours.

    Raises:
        ValueError: it names the first such file.
    """
    folder = Path(folder)
    _require_folder(folder)
    if not folder.is_dir():
        return
    if _has_begun(folder):
        for pattern in _OUTPUTS:
            for file in sorted(folder.glob(pattern)):
                require_replaceable(file)
        return
    for entry in _entries(folder):
        if foreign := _foreign_to_run(entry):
            raise ValueError(
                f"{folder} must be empty or hold a run; it holds {foreign.relative_to(folder)} and "
                "no config.toml of a run. Name another --run.dir, or move that file"
            )


def require_prepared_folder(folder: Path) -> None:
    """Refuse a folder for token shards that holds anything of others.

    Raises:
        ValueError: it names the first such file.
    """
    folder = Path(folder)
    _require_folder(folder)
    if folder.is_dir() and (foreign := _foreign_to_prepared(folder)):
        raise ValueError(
            f"{folder} must be empty or hold token shards; it holds "
            f"{foreign.relative_to(folder)}. Name another folder, or move that file"
        )


def require_replaceable(file: Path) -> None:
    """Refuse to replace a file that is not an earlier one of the same kind, by its name.

    Raises:
        ValueError: it is of others.
    """
    file = Path(file)
    # predictions lie in a folder for each task
    names = (file.name, file.parent.name, file.parent.parent.name)
    _require(file, _FORMS[next(name for name in names if name in _FORMS)])


def require_embeddings(file: Path) -> None:
    """Refuse to replace a file that does not hold embeddings.

    Raises:
        ValueError: it is of others.
    """
    _require(Path(file), _is_embeddings)


def require_runs_page(file: Path) -> None:
    """Refuse to replace a file that is not a page that compares runs.

    Raises:
        ValueError: it is of others, or a folder.
    """
    _require_page(file, b"smbfast runs</title>")


def require_patient_page(file: Path) -> None:
    """Refuse to replace a file that is not the page of a patient.

    Raises:
        ValueError: it is of others, or a folder.
    """
    _require_page(file, b"smbfast patient</title>")


def _require_page(file: Path, title: bytes) -> None:
    if Path(file).is_dir():
        raise ValueError(f"`out` must be a file to write to; {file} is a folder")
    _require(Path(file), lambda page: title in page.open("rb").read(1 << 14))


def prepared_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder of token shards that are ours."""
    ours = [e for e in _entries(folder) if e.name in (*_PREPARED, *_INDEXES) or is_staging(e)]
    return [e for e in ours if not e.is_symlink()]


def _require_folder(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} must be a folder to write to; it is a file")


def _require(file: Path, is_ours: Callable[[Path], bool]) -> None:
    if file.is_file() and file.stat().st_size and not is_ours(file):
        raise ValueError(
            f"{file} exists and was not written by smbfast, so it is not replaced; move it or name "
            "another file"
        )


def _has_begun(folder: Path) -> bool:
    """Whether a run has written what says which run it is, or how far it is."""
    begun = _json(folder / "run.json").keys() >= {"run", "format"}
    begun = begun or _json(folder / "status.json").keys() >= {"state", "step", "command"}
    return begun or (folder / "config.toml").is_file()


def _foreign_to_run(entry: Path) -> Path | None:
    """Return what is not ours in an entry of the folder of a run that has not begun, or None."""
    name = entry.name
    if name in (LOCK, CLAIMS) or is_staging(entry):
        return None
    if name in _INDEXES and entry.is_dir():
        return None
    if name == _DIGESTS and entry.is_file():
        return None if _json(entry) else entry
    if name == "prepared" and entry.is_dir():
        return _foreign_to_prepared(entry)
    if _COHORT.fullmatch(name) and (entry / MANIFEST).is_file():
        return None
    if name == "tensorboard" and entry.is_dir():
        return next((e for e in _entries(entry) if not _EVENTS.fullmatch(e.name)), None)
    if name == "metrics.jsonl" and entry.is_file():
        start = entry.open("rb").read(8)
        return None if start in (b"", b'{"kind":') else entry
    return _first(entry)


def _foreign_to_prepared(folder: Path) -> Path | None:
    entries = _entries(folder)  # before, as another process may begin in between
    begun = (folder / "plan.json").is_file() or (folder / "prepare.json").is_file()
    for entry in entries:
        ours = entry.name in (*_INDEXES, LOCK, CLAIMS) or is_staging(entry)
        ours = ours or (begun and entry.name in _PREPARED)
        if not ours and os.path.lexists(entry):  # what another process wrote may be gone
            return _first(entry)
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if not _OF_SYSTEMS.fullmatch(e.name))


def _first(entry: Path) -> Path:
    """Return the first file of a folder, or the entry itself."""
    if entry.is_dir() and not entry.is_symlink():
        for root, folders, files in os.walk(entry):
            folders.sort()
            if files:
                return Path(root) / min(files)
    return entry


def _is_report(file: Path) -> bool:
    return b"smbfast report</title>" in file.open("rb").read(1 << 14)


def _is_probe(file: Path) -> bool:
    return _json(file).keys() >= {"tasks", "protocol"}


def _is_risk(file: Path) -> bool:
    return _json(file).keys() >= {"moments", "tasks", "rule"}


def _is_risk_functions(file: Path) -> bool:
    return b'"smbfast"' in file.open("rb").read(1 << 14)  # in the header


def _is_comparison(file: Path) -> bool:
    return _json(file).keys() >= {"methods", "headline", "tasks"}


def _is_compare_page(file: Path) -> bool:
    return b"smbfast compare</title>" in file.open("rb").read(1 << 14)


def _is_record_of_looks(file: Path) -> bool:
    return "looks" in _json(file)


def _json(file: Path) -> dict:
    """Return the JSON object in a file, empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_embeddings(file: Path) -> bool:
    return _has_columns(file, b"prediction_time", b"embedding")


def _is_predictions(file: Path) -> bool:
    scores = (b"predicted_boolean_probability", b"log_hazard")
    return any(_has_columns(file, b"prediction_time", score) for score in scores)


def _has_columns(file: Path, *names: bytes) -> bool:
    with file.open("rb") as opened:
        start = opened.read(4)
        opened.seek(max(file.stat().st_size - _TAIL, 0))
        tail = opened.read()
    return start == b"PAR1" == tail[-4:] and all(name in tail for name in names)


_FORMS: dict[str, Callable[[Path], bool]] = {
    "report.html": _is_report,
    "probe.json": _is_probe,
    "risk.json": _is_risk,
    "risk_functions.safetensors": _is_risk_functions,
    "held_out.json": _is_record_of_looks,
    "compare.json": _is_comparison,
    "compare.html": _is_compare_page,
    "embeddings": _is_embeddings,
    "predictions": _is_predictions,
}
