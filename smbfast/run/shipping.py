"""What leaves this machine as a model, file by file, and the commit that puts it on the Hub.

Only names on a list go out (`smbfast.run.hub.MODEL_FILES` and the card), JSON files are written
anew without paths of this machine, and `smbfast.json` without keys that loading does not need. The
manifest names what went out, so that `smbfast.run.hub.fetched` can verify it.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smbfast.base.counts import FEW
from smbfast.base.digests import check_weights, hub_commit, local_model
from smbfast.base.files import FORMAT as MANIFEST_FORMAT
from smbfast.base.files import MANIFEST, read_json, verify_folder
from smbfast.base.replace import sha256
from smbfast.base.typed import as_typed
from smbfast.run.hub import MODEL_FILES, is_of_network
from smbfast.run.model_card import CARD, shared_card
from smbfast.run.model_record import RECORD, check_record, shared_record
from smbfast.settings import PushSettings
from smbfast.settings.data import VOCABULARY

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TARGET = "target.safetensors"
_BESIDE = ("LICENSE", "NOTICE")  # what people may put beside a card
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini")
_MIN_PATIENTS = 10  # behind every entry of a vocabulary
_PEOPLE = r"(patients?|subjects?|persons?|people|women|men|deaths?|positives?|cases|rows|nodes)"
_PATH = re.compile(r"(/[^/\n]+){2,}/?|[A-Za-z]:\\[^\n]*")  # all of a text
_BETWEEN = re.compile(r"[\s`'\"()<>|,;=\[\]]+")  # the words of a card
_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
# a count of 1 to 10 people in a sentence, 3 or three patients, 3 older patients or 3 of 20
# patients, or in a row of a table that begins with what it counts
_SMALL = re.compile(
    r"(?<![\d.,%$-])(?<!than )(?<![<≤>≥] )(?<![<≤>≥])(?<![<>]= )(?<![<>]=)"
    rf"\b([1-9]|10|{_WORDS})\s+(of\s+(the\s+)?[\d,]+\s+|[a-z]+\s+)?{_PEOPLE}\b(?! or fewer)|"
    rf"^\|\s*{_PEOPLE}\s*\|\s*([1-9]|10)\s*\|",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Shipment:
    """What goes out: `files`, by name, each a path as it lies here or the bytes of a new text."""

    files: dict[str, Path | bytes]
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in self.files.items()
        }


def ship(settings: PushSettings, say: Callable[[str], None] = print) -> str | None:
    """List what goes out, and put it on the Hub unless that is only tried; return its address.

    Raises:
        ValueError: the folder is no whole model, holds anything that must not go out, or the Hub
            refuses it. Nothing is sent then.
    """
    shipment = shipment_of(settings)
    sizes = shipment.sizes()
    who = "everybody may read it" if settings.public else "private"
    total = _size(sum(sizes.values()))
    say(f"{settings.model} to {settings.to} ({who}): {len(sizes)} files, {total}")
    for name, size in sizes.items():
        say(f"  {_size(size):>10}  {name}")
    for note in shipment.notes:
        say(f"  {note}")
    if settings.dry_run:
        say("nothing was sent: without --dry-run the same command sends it")
        return None
    address = _sent(settings, shipment)
    say(f"pushed: {address}")
    use = f"python -m smbfast.embed --model={settings.to} --data=MEDS_FOLDER --at=last --out=F"
    say(f"use: {as_typed(use)}")
    return address


def shipment_of(settings: PushSettings) -> Shipment:
    """Return what goes out of a folder, everything checked; no network is used.

    Raises:
        ValueError: see `ship`.
    """
    folder = settings.model
    manifest = verify_folder(folder)
    _require_list(folder, set(manifest["files"]))
    has_record = RECORD in manifest["files"]
    record = check_record(folder / RECORD) if has_record else {}
    if not has_record and "config.json" not in manifest["files"]:
        raise ValueError(f"{folder} must be the folder of a trained model; it has no {RECORD}")
    _require_patients(folder)
    files: dict[str, Path | bytes] = {}
    notes: list[str] = []
    for name in sorted(manifest["files"]):
        if name == _TARGET and not settings.target:
            notes.append(f"left here: {_TARGET}, the EMA teacher; --target sends it too")
            continue
        files[name] = folder / name
    if record.get("trains") == "lora":
        base, note = _base(settings, record)
        notes += [note] if note else []
        commit = record.get("backbone_revision")
        if settings.base is not None:
            commit = hub_commit(settings.base)
        record = {**record, "backbone": base, "backbone_revision": commit}
        config = read_json(folder / "adapter_config.json")
        config |= {"base_model_name_or_path": base, "revision": commit}
        files["adapter_config.json"] = _json(config)
    elif settings.base is not None:
        raise ValueError(f"`base` must be left out for {folder}, which holds all weights")
    elif Path(record.get("backbone") or "").is_absolute():  # from which all weights were trained
        record = {**record, "backbone": Path(record["backbone"]).name}
    if has_record:
        files[RECORD] = _json(shared_record(record))
    _require_no_paths(folder, files)
    named = _manifest(files)
    files[CARD] = _card(settings, record)
    files |= {name: folder / name for name in _BESIDE if (folder / name).is_file()}
    files[MANIFEST] = named
    return Shipment(files, notes)


def _require_list(folder: Path, named: set[str]) -> None:
    """Refuse a folder with anything that is no file of a model."""
    for name in sorted(named):
        if not MODEL_FILES.fullmatch(name):
            raise ValueError(f"{folder} must hold a model alone to go out; it holds {name}")
    for file in sorted(folder.iterdir()):
        known = file.name in named or file.name in (MANIFEST, CARD, *_BESIDE)
        if not known and not _OF_SYSTEMS.fullmatch(file.name):
            raise ValueError(
                f"{folder} must hold a model alone to go out; it holds {file.name}, which is no "
                "file of a model. Move that away, also where it was not meant to be sent"
            )


def _require_patients(folder: Path) -> None:
    """Refuse a vocabulary of which an entry may stand on fewer than ten training patients."""
    file = folder / VOCABULARY
    if not file.is_file():  # words of a tokenizer that we train stand in ten texts
        return
    vocabulary = read_json(file).get("vocabulary")
    least = vocabulary.get("min_subjects") if isinstance(vocabulary, dict) else None
    if not isinstance(least, int) or least < _MIN_PATIENTS:
        raise ValueError(
            f"{file} must be fitted so that at least {_MIN_PATIENTS} training patients stand "
            f"behind each entry, to go out; it says {least}"
        )


def _base(settings: PushSettings, record: dict) -> tuple[str, str | None]:
    """Return the name of the backbone that others read, and what to say about it."""
    named = str(record["backbone"])
    if settings.base is None:
        if not Path(named).is_absolute():
            return named, None
        return Path(named).name, (
            f"the backbone is only called {Path(named).name}, as it was a folder here; --base="
            "owner/name lets others load it by itself"
        )
    if local_model(settings.base) is None:
        return settings.base, (
            f"the weights of {settings.base} were not compared with those of the run, as they are "
            "not on this machine; who loads the model compares them"
        )
    check_weights(record, settings.base)
    return settings.base, None


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _require_no_paths(folder: Path, files: dict[str, Path | bytes]) -> None:
    """Refuse a configuration or record that names a path of this machine."""
    home = str(Path.home())
    for name, file in files.items():
        if not name.endswith("config.json") and name != RECORD:  # others hold words of any kind
            continue
        text = (file if isinstance(file, bytes) else file.read_bytes()).decode("utf-8", "replace")
        known = {str(folder.resolve()), home} - {"/"}
        if any(json.dumps(path)[1:-1] in text for path in known) or _has_path(json.loads(text)):
            raise ValueError(
                f"{folder / name} must name no path of this machine to go out; it names one"
            )


def _has_path(value: Any) -> bool:
    """Whether a text among JSON values is an absolute path."""
    if isinstance(value, dict | list):
        return any(map(_has_path, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def _manifest(files: dict[str, Path | bytes]) -> bytes:
    entries = {}
    for name, file in files.items():
        if isinstance(file, bytes):
            entries[name] = (len(file), hashlib.sha256(file).hexdigest())
        else:
            entries[name] = (file.stat().st_size, sha256(file))
    return _json({"format": MANIFEST_FORMAT, "files": entries})


def _card(settings: PushSettings, record: dict) -> bytes:
    """Return the card that goes out, once it has a license where one is needed."""
    file = settings.model / CARD
    if not file.is_file():
        raise ValueError(f"{settings.model} must hold a card, {CARD}, to go out; it has none")
    for each in (file, *(settings.model / name for name in _BESIDE)):
        if each.is_symlink():
            raise ValueError(f"{each} must be a file to go out; it is a link to another place")
    before = file.read_text(encoding="utf-8")
    for number, line in enumerate(before.splitlines(), start=1):
        if any(_PATH.fullmatch(word) for word in _BETWEEN.split(line)):
            raise ValueError(
                f"{file}, line {number}, must name no path of this machine to go out; it names one"
            )
        if _SMALL.search(line):
            raise ValueError(
                f"{file}, line {number}, must not count {FEW} people or fewer to go out; write "
                "that they are few"
            )
    if not settings.target:
        before = before.replace("| EMA teacher | stored beside it |", "| EMA teacher | not here |")
    text, is_licensed = shared_card(before, settings.model, settings.to, record, settings.license)
    if settings.public and not is_licensed:
        raise ValueError(
            f"{settings.to} must have a license to be public, and {file} names none that was "
            "decided; give it as --license=NAME"
        )
    return text.encode()


def _sent(settings: PushSettings, shipment: Shipment) -> str:
    """Put a shipment on the Hub in one commit, and return the address of the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        _require_visibility(api, settings)
        stale = {n for n in api.list_repo_files(settings.to) if MODEL_FILES.fullmatch(n)}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, file) for name, file in shipment.files.items()
        ]
        operations += [CommitOperationDelete(n) for n in sorted(stale - shipment.files.keys())]
        commit = api.create_commit(settings.to, operations, commit_message=settings.message)
    except Exception as error:
        if isinstance(error, ValueError) or not is_of_network(error):
            raise
        raise ValueError(_in_words(settings.to, error)) from None
    return f"https://huggingface.co/{settings.to}/tree/{commit.oid}"


def _require_visibility(api: "HfApi", settings: PushSettings) -> None:
    """Make the repository, and refuse one that is public where that is not asked for."""
    api.create_repo(settings.to, private=not settings.public, exist_ok=True)
    is_private = api.model_info(settings.to).private
    if not settings.public and is_private is not True:
        raise ValueError(
            f"{settings.to} must be private, and everybody may read it; make it private on its "
            "page, or say --public"
        )
    if settings.public and is_private:
        print(f"smbfast: {settings.to} is private and stays so: see its page", file=sys.stderr)


def _in_words(name: str, error: Exception) -> str:
    """Return in words why the Hub did not take a model."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        why = "the Hub does not let you: `hf auth login` with a token that may write there"
    elif isinstance(error, HfHubHTTPError):
        why = f"the Hub answers with status {status}"
    else:
        why = f"it cannot be reached ({type(error).__name__})"
    return f"{name} must be a repository that you may write on the Hugging Face Hub; {why}"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
