"""`prepare.json` and `plan.json`, the records of a prepared folder, checked when they are read.

A folder may come from another machine, so no key is used before it is known to be what it should.
"""

from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from smbfast.base.files import read_json
from smbfast.data.sections import SECTIONS


class _Strict(BaseModel):
    """A record in which a number is a number and a text is a text; others may have more keys."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Shard(_Strict):
    file: str
    sha256: str
    timelines: int = Field(ge=0)
    tokens: int = Field(ge=0)


class _Rules(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    rules: dict[str, int]
    fallback: int = Field(ge=0, lt=len(SECTIONS))


class _Options(_Strict):
    bucket: str = ""
    values_per_line: int | None = None
    terminal: list[str] = []
    text_chars: int = Field(64, ge=0)


class _Record(_Strict):
    """The keys that are read of a finished folder; those of `_Strict` are read by nobody."""

    data: str
    data_format: Literal["text", "text-paper", "codes"]
    format: int
    options: _Options
    delimiters: Literal["special", "text"]
    section_rules: _Rules
    encoder: str
    classes: str
    new_tokens: list[Any]
    splits: list[str]
    shards: dict[str, list[_Shard]]
    counts: dict[str, dict[str, int]]
    unmapped: dict[str, int | str]
    unread: dict[str, int] = {}
    split: list[float] | None = None


def read_record(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: there is none.
    """
    try:
        return read_json(file)
    except ValueError:
        raise ValueError(f"{file} must say what was prepared, as JSON; remove its folder") from None


def require_record(file: Path, record: dict[str, Any]) -> None:
    """Raise a ValueError, which names the first odd key, unless a record is one of this version."""
    try:
        checked = _Record.model_validate(record)
    except (pydantic.ValidationError, RecursionError) as error:
        errors = error.errors() if isinstance(error, pydantic.ValidationError) else []
        key = ".".join(map(str, errors[0]["loc"][:2])) if errors else "a key"
        raise ValueError(f"{file}: `{key}` is missing or odd; prepare the data again") from None
    lacking = [split for split in {"train", *checked.splits} if split not in checked.counts]
    if lacking or not {"tokens", "events"} <= checked.counts["train"].keys():
        raise ValueError(f"{file}: `counts` must be of each split; prepare the data again")
    names = [shard.file for of_split in checked.shards.values() for shard in of_split]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise ValueError(f"{file} names a shard outside its folder")
    if not all(name.isascii() and name.isprintable() for name in names):
        raise ValueError(f"{file} must name shards as they are named here; prepare the data again")
