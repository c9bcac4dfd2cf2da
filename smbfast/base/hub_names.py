"""Names of models: a folder of this machine, or a name on the Hugging Face Hub.

A name that looks like a folder never goes to the network. One of the hub is asked for once, for a
few seconds at most: libraries ask five times over, which takes a minute without a network.
"""

import difflib
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PATIENCE = 3.0  # seconds in which the hub must answer; a name server is waited for within them
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_local(name: str) -> bool:
    """Whether a name is of a folder or file: it is there, or nothing else can be meant."""
    if not _HUB_NAME.fullmatch(name) or Path(name).exists():
        return True
    return "/" in name and Path(name).parent.exists()


def is_repository(name: str) -> bool:
    """Whether a name is of the form owner/name, as our own models have it, and of no folder."""
    return "/" in name and ".." not in name and not is_local(name)


def divided(name: str) -> tuple[str, str | None]:
    """Return the name and the revision of `owner/name@revision`; None where it has none."""
    before, mark, revision = name.partition("@")
    if not mark or Path(name).exists() or is_local(before):  # a folder may have an @ in its name
        return name, None
    return before, revision


def require_model_folder(name: str, key: str) -> Path:
    """Return the folder of a local name.

    Raises:
        ValueError: there is none; the message names the nearest one beside it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"`{key}` {name} must be a folder with a model; it is a file")
    there, hint = "there is none", ""
    if "://" in name:
        hint = "; of an address of the hub, give the last two parts, OWNER/MODEL"
    elif name.startswith("~"):
        hint = "; behind `=` a shell leaves ~ as it is, so write $HOME"
    elif folder.parent.is_dir():
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        near = difflib.get_close_matches(folder.name, names, n=1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
    else:
        there = f"there is not even {folder.parent}"
    raise ValueError(f"`{key}` {name} must be a folder with a model; {there}{hint}")


def model_inside(folder: Path) -> str:
    """Return the end of a message about a folder that is no model but a run: where its model is."""
    inner = folder / "final"
    return f"; the model of this run is {inner}" if inner.is_dir() else ""


def refuse_missing(name: str, key: str) -> None:
    """Refuse a name that looks like a folder where there is none; `owner/name@revision` passes.

    Raises:
        ValueError: see `require_model_folder`.
    """
    if is_local(name.partition("@")[0]) and not Path(name).expanduser().is_dir():
        require_model_folder(name, key)


@cache
def from_cache(name: str, key: str = "model.path") -> bool:
    """Whether a model of the hub must be read from the cache, because the hub does not answer.

    The answer holds for the process, so the hub is asked once.

    Raises:
        ValueError: no such model, one that this user may not read, or one that is neither in the
            cache nor to be had.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE is set and the cache does not hold it; unset it"
    else:
        problem = within(PATIENCE, lambda: _problem(name), _no_answer())
    if not problem:
        return False
    if cached:
        if not constants.HF_HUB_OFFLINE:
            print(
                f"smbfast: `{key}` {name} is read from the cache of the hub: {problem}",
                file=sys.stderr,
            )
        return True
    raise ValueError(
        f"`{key}` {name} must be a folder, or the name of a model on the Hugging Face Hub; there "
        f"is no such folder here, and {problem}"
    )


def options_of(name: str, key: str = "model.path") -> dict[str, Any]:
    """Return what `from_pretrained` of transformers needs to ask the network only if it must.

    Raises:
        ValueError: see `require_model_folder` and `from_cache`.
    """
    if is_local(name):
        require_model_folder(name, key)
        return {"trust_remote_code": False, "local_files_only": True}
    return {"trust_remote_code": False, "local_files_only": from_cache(name, key)}


def _problem(name: str) -> str:
    """Return why a model of the hub cannot be read, as the hub says; "" where it can."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
    )

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=PATIENCE)
    except GatedRepoError:  # it is a kind of the next error
        return (
            f"the hub gives it only to those who have accepted its terms: do so at "
            f"https://huggingface.co/{name}, then run `hf auth login`"
        )
    except RepositoryNotFoundError:
        return (
            "the hub has no such model, or a private one: correct the name, or run `hf auth login`"
        )
    except EntryNotFoundError:
        return "that on the hub has no config.json, so it is no model of transformers"
    except Exception:  # what the libraries of connections raise has no common type
        return _no_answer()
    return ""


def _no_answer() -> str:
    return (
        "huggingface.co does not answer: name a folder, or run `hf download` where there is a "
        "network and copy the folder"
    )


def within(seconds: float, ask: Callable[[], str], otherwise: str) -> str:
    """Return what `ask` returns, or `otherwise` if it takes longer: a look-up of a name has no
    limit of its own."""
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else otherwise
