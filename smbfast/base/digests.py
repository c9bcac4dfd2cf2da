"""Digests of files and of the weights of a model: whether something is still what it was.

The digest of a file is the SHA-256 of all its bytes. It is taken again when size, time of
modification or time of change are not those at which it was taken; the last of them cannot be set
back, so a file of equal size and date is not mistaken for the one before.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from smbfast.base.files import write_text
from smbfast.base.replace import sha256

CACHE = "digests.json"  # in the folder of a run
_FORMAT = 1  # of a cache
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = ("config.json", "adapter_config.json", "adapter_model.safetensors")


def weights_digest(path: str | Path, cache: Path | None = None) -> str:
    """Return one digest, 64 hex digits, over the weights and the configuration of a model.

    It covers names and bytes of the safetensors files that transformers or PEFT loads from the
    folder and of its `config.json` or `adapter_config.json`; not the tokenizer, cards or notes.

    Args:
        path: a folder, or a hub name whose files are on this machine.
        cache: a JSON file of the digests of single files, which is made or extended.

    Raises:
        ValueError: if there is no such model on this machine, or it has no safetensors file.
    """
    folder = local_model(path)
    if folder is None:
        raise ValueError(
            f"{path} must be the folder of a model, or a hub name whose files are on this machine; "
            "it is neither"
        )
    files = weight_files(folder)
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{folder} must hold weights as safetensors; it has none")
    digests = _cached_digests(files, cache)
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_weights(record: dict, path: str | Path, cache: Path | None = None) -> str | None:
    """Refuse a backbone that is not the one a model was trained on.

    Args:
        record: `smbfast.json` of the model's folder.
        path: the backbone, as a folder or a hub name whose files are on this machine.

    Returns:
        None if it is the same, or a warning for a record without a digest.

    Raises:
        ValueError: if its weights or configuration are others, or it cannot be read.
    """
    expected = record.get("weights_digest")
    if expected is None:
        return (
            f"the model was saved by an earlier version, which did not record the digest of its "
            f"backbone; {path} is taken as it is"
        )
    check_digest(record, path, weights_digest(path, cache))
    return None


def check_digest(record: dict, path: str | Path, digest: str) -> None:
    """Refuse a backbone by its digest, if the record of a model has another one.

    Raises:
        ValueError: the digests differ; see `check_weights`.
    """
    expected = record.get("weights_digest")
    if expected is not None and digest != expected:
        raise ValueError(
            f"{path} must be the backbone that the model was trained on, whose weights have the "
            f"digest {short(expected)}; these have {short(digest)}"
        )


def local_model(path: str | Path, revision: str | None = None) -> Path | None:
    """Return the folder of a model, that of a hub name in the cache on disk, or None.

    It asks no network.

    Args:
        revision: of a hub name; None for what lies here as its branch `main`.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(path), "config.json", revision=revision)
    except HFValidationError:  # a path, which is no name of the hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def hub_commit(path: str | Path) -> str | None:
    """Return the commit of a hub name's files on this machine; None for a folder."""
    folder = local_model(path)
    if folder is None or Path(path).is_dir() or folder.parent.name != "snapshots":
        return None
    return folder.name


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a model is loaded from, by name."""
    names = {name for name in _BESIDE if (folder / name).is_file()}
    if (folder / _WHOLE).is_file():
        names.add(_WHOLE)
    elif (folder / _INDEX).is_file():
        names |= {_INDEX, *_named_by(folder / _INDEX)}
    elif "adapter_model.safetensors" not in names:
        names |= {file.name for file in folder.glob("*.safetensors")}
    return [folder / name for name in sorted(names)]


def _named_by(index: Path) -> set[str]:
    """Return the names of the files that an index of weights names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all(Path(name).name == name and (index.parent / name).is_file() for name in names):
            return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{index} must name the safetensors files beside it; it does not")


def _cached_digests(files: list[Path], cache: Path | None) -> list[str]:
    """Return the digest of each file, of which those in the cache are not read."""
    before = _read(cache) if cache else {}
    now, digests = dict(before), []
    for file in files:
        status = file.stat()
        seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        key = str(file.resolve())
        entry = before.get(key)
        if not (isinstance(entry, list) and len(entry) == 4 and entry[:3] == seen):
            entry = [*seen, sha256(file)]
        now[key] = entry
        digests.append(str(entry[3]))
    if cache and now != before:
        with suppress(OSError):  # without it the next digest takes longer, and is the same
            write_text(cache, json.dumps({"format": _FORMAT, "files": now}, indent=1))
    return digests


def _read(cache: Path) -> dict[str, object]:
    """Return what a cache holds: nothing if there is none, or none that can be read."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        return dict(content["files"]) if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def short(digest: object) -> str:
    """The first digits of a digest for a message, enough to tell two of them from each other."""
    return digest[:12] if isinstance(digest, str) else "none"
