"""A model of the Hugging Face Hub, by its name and revision: exactly its files, and verified.

`python -m smbfast.push` puts a model there. Its manifest names every file with size and SHA-256: it
is fetched first, and what it does not name, or what no model has, is never asked for. The files lie
in the cache of the Hub, in the folder of one commit, which does not change.
"""

import re
import sys
from pathlib import Path
from typing import NoReturn

from smbfast.base.files import MANIFEST, read_json, standing, verify_folder
from smbfast.base.hub_names import PATIENCE, divided, is_local, is_repository, within

# what a model consists of, and no other file goes to the Hub or comes from it
MODEL_FILES = re.compile(
    r"smbfast\.json|(predictor|target|adapter_model)\.safetensors|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"((generation|adapter|tokenizer)_)?config\.json|codes\.json|tokenizer\.(json|model)|"
    r"(special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt|chat_template\.jinja"
)


def fetched(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model, which is downloaded if its name is one of the Hub.

    Args:
        name: a folder, which is returned as it is and for which no socket is opened; or
            `owner/name` or `owner/name@revision` of the Hugging Face Hub. Its files are downloaded
            once into the cache of the Hub; without a network, those that lie there are taken.
        revision: commit, tag or branch of the Hub; None for the newest commit.

    Raises:
        ValueError: there is no such folder or no such model, the Hub cannot be reached, or a file
            is not the one that the manifest names.
    """
    text, own = divided(str(name))
    if is_local(text) and standing(Path(text).expanduser()).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` must be left out for a folder, {text}; got {revision}")
        return Path(text).expanduser()
    if not is_repository(text):
        raise ValueError(
            f"{text} must be the folder of a trained model, or owner/name of one on the Hugging "
            "Face Hub; there is no such folder"
        )
    if own is not None and revision is not None:
        raise ValueError(f"the revision of {text} must be given once, got {own} and {revision}")
    revision = own or revision
    here = _lies_here(text, revision)
    manifest = _file(text, revision, MANIFEST, here=here)
    commit, names = manifest.parent.name, _names(text, manifest)
    _announce(text, commit, manifest)
    for file in names:  # all of one commit, also where a newer one comes now
        _file(text, commit, file, here=here)
    try:
        verify_folder(manifest.parent)
    except ValueError as error:
        raise ValueError(
            f"{text} must be as its manifest says: {error}. Remove that folder to fetch it anew"
        ) from None
    return manifest.parent


def _lies_here(name: str, revision: str | None) -> bool:
    """Whether to take what lies on this machine, because it cannot change or no network is there.

    The Hub is asked once. `hf_hub_download` would ask six times, for 23 s, where there is no
    network.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    has_any = isinstance(try_to_load_from_cache(name, MANIFEST, revision=revision), str)
    if has_any and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return True  # a commit does not change
    errors: list[Exception] = []

    def asked() -> str:
        try:
            HfApi().model_info(name, revision=revision, timeout=PATIENCE)
        except Exception as error:  # as it comes, to the thread that waits
            errors.append(error)
        return ""

    if within(PATIENCE, asked, "late"):
        errors = [TimeoutError()]
    for error in errors:
        if not is_of_network(error):
            raise error
        if not has_any or _is_refusal(error):
            _raise(name, revision, None, error)
        print(
            f"smbfast: the Hub gives no answer; {name} is taken as it lies on this machine",
            file=sys.stderr,
        )
        return True
    return False


def _file(name: str, revision: str | None, file: str, *, here: bool) -> Path:
    """Return where one file of a repository lies, which is downloaded unless `here`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=here))
    except Exception as error:
        if not is_of_network(error):
            raise
        _raise(name, revision, file, error)


def _names(name: str, manifest: Path) -> list[str]:
    """Return the files that a manifest names, if they are those of a model.

    They come from others, so each is compared with the list before it is asked for.
    """
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or "smbfast.json" not in files:
        raise ValueError(f"{name} must be a model that smbfast has saved; its {MANIFEST} is none")
    for file in files:
        if not MODEL_FILES.fullmatch(file):
            raise ValueError(f"{name} must hold the files of a model alone; it names {file[:80]!r}")
    return sorted(files)


def _announce(name: str, commit: str, manifest: Path) -> None:
    """Say what is about to be downloaded, if anything is."""
    missing = {
        file: entry
        for file, entry in read_json(manifest)["files"].items()
        if not (manifest.parent / file).is_file()
    }
    if missing:
        sizes = [entry[0] for entry in missing.values() if isinstance(entry, list) and entry]
        num_bytes = sum(size for size in sizes if isinstance(size, int))
        print(
            f"smbfast: fetching {name} at commit {commit[:12]}: {len(missing)} files, "
            f"{num_bytes / 1e6:,.1f} MB",
            file=sys.stderr,
        )


def is_of_network(error: Exception) -> bool:
    """Whether an error is one of the Hub, of an HTTP library or of a socket, and none of ours."""
    package = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or package.startswith(("huggingface_hub", "http", "requests"))


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub has answered, and says that there is no such thing or nothing for us."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


def _raise(name: str, revision: str | None, file: str | None, error: Exception) -> NoReturn:
    """Raise a ValueError that says in words why the Hub gave nothing."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name}@{revision}" if revision else name
    if isinstance(error, GatedRepoError):
        words = "it is gated: ask for access on its page, then `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        words = "the Hub shows you none of that name: it is absent, or private (`hf auth login`)"
    elif isinstance(error, RevisionNotFoundError):
        words = "it has no such revision"
    elif isinstance(error, RemoteEntryNotFoundError):
        words = f"it has no {file}"
    else:
        words = (
            f"it cannot be fetched ({type(error).__name__}), and it does not lie whole on this "
            "machine. Where there is no network, give the folder of the model"
        )
    raise ValueError(f"{at} must be a model on the Hugging Face Hub; {words}") from None
