"""`smbfast.json`, the record in the folder of a model: what loading it needs beside its tensors.

A folder may come from anywhere, so every key is checked before anything is made of it.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from smbfast.base.files import ForeignFormat, read_json
from smbfast.data.formats import VERSIONS
from smbfast.data.sections import SECTIONS
from smbfast.data.serialize import Bucket
from smbfast.settings import Pool

RECORD = "smbfast.json"
FORMAT = 1  # of the record of a checkpoint and of a model's folder
_Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    """A record in which a number is a number and a text is a text."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Closed(_Strict):
    """A record without other keys."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Rules(_Closed):
    rules: dict[str, int]
    fallback: int = Field(ge=0, lt=len(SECTIONS))


class _CodeOptions(_Closed):
    gap_floor: int = Field(ge=0)
    max_codes: int = Field(ge=1)
    terminal: list[str] = []
    text_chars: int = Field(ge=0)


class _TextOptions(_Closed):
    bucket: Bucket
    format: Literal["text", "text-paper"]
    values_per_line: int | None = Field(None, ge=1)
    terminal: list[str] = []
    text_chars: int = Field(ge=0)


class _ModelRecord(_Strict):
    """The keys of `smbfast.json`; those with a default are missing in older records."""

    trains: Literal["lora", "all"]
    backbone: str | None
    dtype: _Dtype
    compute: _Dtype | None = None
    vocabulary: int = Field(ge=1)
    predictor_layers: int = Field(ge=1)
    window: int = Field(ge=1, lt=1 << 31)
    pool: Pool
    pool_choice: dict[str, Any] | None = None
    data_format: Literal["text", "text-paper", "codes"] = "text-paper"
    delimiters: Literal["special", "text"]
    format: int
    encoder: str
    section_rules: _Rules
    options: dict[str, Any]
    matmul: str | None = None
    run: str | None = None
    data_digest: str | None = None
    weights_digest: str | None = None
    backbone_revision: str | None = None  # commit of a backbone of the hub


_T = TypeVar("_T", bound=BaseModel)


def _validated(kind: type[_T], content: dict[str, Any], file: Path, under: str = "") -> _T:
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = under + ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: `{key}` is missing or odd: {first['msg']}") from None


def check_record(file: Path) -> dict[str, Any]:
    """Return the record of a model's folder.

    Raises:
        ValueError: if it is no JSON object, or a key is missing or odd; the first is named.
        ForeignFormat: if another version wrote it, in a format of its own.
    """
    content = read_json(file)
    version = content.get("format_version")  # older records lack it
    if version not in (None, FORMAT):
        raise ForeignFormat(
            f"{file} has format_version {version!r}, and this version reads {FORMAT} alone; use "
            "the version that wrote it"
        )
    record = _validated(_ModelRecord, content, file)
    options = _CodeOptions if record.data_format == "codes" else _TextOptions
    _validated(options, record.options, file, "options.")
    if record.trains == "lora" and record.backbone is None:
        raise ValueError(f"{file}: `backbone` must name what the adapter is for; it is null")
    if record.trains == "lora" and record.compute not in (None, record.dtype):
        raise ValueError(
            f"{file}: `compute` must be the dtype of the frozen weights, {record.dtype}, got "
            f"{record.compute}"
        )
    if not all(0 <= section < len(SECTIONS) for section in record.section_rules.rules.values()):
        raise ValueError(
            f"{file}: `section_rules.rules` must name sections 0 to {len(SECTIONS) - 1}; one is "
            "another"
        )
    if record.format != VERSIONS[record.data_format]:
        raise ValueError(
            f"the format of {record.data_format} must be {VERSIONS[record.data_format]}, "
            f"{file} says {record.format}: prepare the data and train again with this version"
        )
    return content


def shared_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record for others: what loading reads, without figures of the run."""
    read = {*_ModelRecord.model_fields, "format_version", "split", "step"} - {"pool_choice"}
    return {key: value for key, value in record.items() if key in read}
