"""What a name of a model means: a folder here, or a repository of the Hugging Face Hub.

It imports only the standard library and opens no socket.
"""

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path, so that no network is asked about it.

    It is one if something lies there, if it begins as a path does, or if its first part is a folder
    here: who has a folder `runs` and types `runs/x` means that one.
    """
    if name.startswith((".", "/", "~")) or "\\" in name:
        return True
    path = Path(name)
    return path.exists() or ("/" in name and Path(path.parts[0]).is_dir())


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form owner/name and can be no path."""
    return bool(_NAME.fullmatch(name)) and ".." not in name and not looks_local(name)


def divided(name: str) -> tuple[str, str | None]:
    """Return the name and the revision of `owner/name@revision`; None where it has none."""
    if looks_local(name):  # a folder may have an @ in its name
        return name, None
    before, mark, revision = name.partition("@")
    return (before, revision) if mark else (name, None)
