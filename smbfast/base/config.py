"""Fills settings (pydantic models) from TOML and from `--a.b=c` on the command line.

Every key is validated, and the message about an unknown key names the nearest known one. The
classes are in `smbfast.settings`, and `--help` shows their docstrings and descriptions.
"""

import difflib
import json
import re
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from smbfast.base.help_page import group_class, help_text, table_class

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings, in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )
    epilog: ClassVar[str] = ""  # examples, which end the help of a command
    aliases: ClassVar[dict[str, str]] = {}  # further names of keys on the command line


def command_line(
    model: type[T], argv: list[str] | None = None, *, prog: str, epilog: str = ""
) -> T:
    """Return the settings that arguments `--a.b=c` or `a.b=c` give.

    On `--help` it prints help and exits with 0. On a bad argument it prints one line and exits
    with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(model, prog, epilog))
        raise SystemExit(0)
    try:
        return build(model, {}, argv)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def build(model: type[T], values: dict[str, Any], overrides: list[str]) -> T:
    """Validate `values` (as read from TOML), in which `overrides` (`a.b=c`) replace keys.

    Raises:
        ValueError: if a key is unknown (the message names the nearest), or a value is of a wrong
            type or out of range.
    """
    values = with_overrides(model, values, overrides)
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_message(e) for e in error.errors())) from None


def with_overrides(
    model: type[Settings], values: dict[str, Any], overrides: list[str]
) -> dict[str, Any]:
    """Return `values` (as read from TOML) with `overrides` (`a.b=c`) applied, not yet validated.

    Raises:
        ValueError: if `model` does not have a key (the message names the nearest), or an override
            has no key.
    """
    for text in overrides:
        name, separator, value = text.removeprefix("--").partition("=")
        switch = model.model_fields.get(name.replace("-", "_"))
        if not separator and switch is not None and switch.annotation is bool:
            separator, value = "=", "true"
        if not separator:
            hint = _nearest(name, known_keys(model))
            raise ValueError(f"argument `{text}` must have the form --key=value{hint}")
        key = name.replace("-", "_")
        values = _with_override(model, values, model.aliases.get(key, key), value)
    _check_keys(model, values, "")
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        ValueError: if the file is missing, or is not TOML (the message has the line).
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} must be a TOML file: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be TOML: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} must be TOML; it is not even text") from None


def to_toml(settings: Settings) -> str:
    """Return settings as TOML that reads back to the same settings; `None` is left out."""
    lines: list[str] = []
    _write_table(settings.model_dump(mode="json"), "", lines)
    return "\n".join(lines).strip() + "\n"


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all dotted keys of `model`."""
    keys = []
    for name, field in model.model_fields.items():
        inner = group_class(field.annotation)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _with_override(model: type[BaseModel], values: dict, name: str, value: str) -> dict:
    """Return `values` with the dotted `name` set to the parsed `value`."""
    keys = known_keys(model)
    root = name.split(".")[0]
    if name not in keys and not _is_table(model, root):
        raise ValueError(f"unknown key `{name}`{_nearest(name, keys)}")
    head, *rest = name.split(".")
    values = dict(values)
    if not rest:
        values[head] = _parsed(value, model.model_fields[head].annotation)
        return values
    if _is_table(model, head):
        return _with_table_override(values, head, rest, value)
    inner = values.get(head, {})
    group = group_class(model.model_fields[head].annotation)
    if group and isinstance(inner, dict):  # otherwise validation reports it
        values[head] = _with_override(group, inner, ".".join(rest), value)
    return values


def _is_table(model: type[BaseModel], name: str) -> bool:
    """Whether `name` is a list of tables, whose items are reached as `phases.0.steps`."""
    return name in model.model_fields and bool(table_class(model.model_fields[name].annotation))


def _with_table_override(values: dict, head: str, rest: list[str], value: str) -> dict:
    items = values.get(head, [])
    if not isinstance(items, list) or not all(isinstance(v, dict) for v in items):
        return values  # validation reports it
    items = [dict(v) for v in items]
    index = int(rest[0]) if rest[0].isdecimal() else len(items)
    if index >= len(items) or len(rest) != 2:
        raise ValueError(
            f"`{head}.{'.'.join(rest)}` must name a key of one of the {len(items)} {head}, such as "
            f"`{head}.0.steps`"
        )
    items[index][rest[1]] = _literal(value)
    values[head] = items
    return values


def _parsed(value: str, annotation: Any) -> Any:
    options = {annotation, *typing.get_args(annotation)}
    if value.lower() in ("none", "null") and type(None) in options:
        return None
    if any(typing.get_origin(o) in (list, tuple) for o in options):
        inner = value.strip().removeprefix("[").removesuffix("]")
        return [_literal(v.strip()) for v in inner.split(",") if v.strip()]
    if options & {str, Path}:
        return value
    return _literal(value)


def _literal(value: str) -> Any:
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return value


def _check_keys(model: type[BaseModel], values: dict, prefix: str) -> None:
    for key, value in values.items():
        if key not in model.model_fields:
            hint = _nearest(f"{prefix}{key}", [f"{prefix}{k}" for k in model.model_fields])
            raise ValueError(f"unknown key `{prefix}{key}`{hint}")
        annotation = model.model_fields[key].annotation
        inner, table = group_class(annotation), table_class(annotation)
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{prefix}{key}.")
        elif table and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    _check_keys(table, item, f"{prefix}{key}.{i}.")


def _nearest(name: str, keys: list[str]) -> str:
    nearest = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    if not nearest:
        leaf = {k.split(".")[-1]: k for k in keys}
        nearest = [leaf[m] for m in difflib.get_close_matches(name.split(".")[-1], leaf, n=1)]
    return f"; did you mean `{nearest[0]}`?" if nearest else ""


def _message(error: Any) -> str:
    """Return an error of pydantic in one line: the key, what was expected, what was received."""
    key = ".".join(str(p) for p in error["loc"]) or "settings"
    if error["type"] == "missing":
        return f"`{key}` is required"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|List|Tuple) should", "must", message)
    value = error.get("input")
    # our own validators may have named the value already
    received = isinstance(value, str | int | float | bool) and ", got " not in message
    return f"`{key}`: {message[0].lower()}{message[1:]}" + (f", got {value!r}" if received else "")


def _write_table(values: dict, prefix: str, lines: list[str]) -> None:
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    lists = {k: v for k, v in values.items() if v and isinstance(v, list) and _all_tables(v)}
    for key, value in values.items():
        if key not in tables and key not in lists and value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    for key, items in lists.items():
        for item in items:
            lines += ["", f"[[{prefix}{key}]]"]
            _write_table(item, f"{prefix}{key}.", lines)
    for key, value in tables.items():
        lines += ["", f"[{prefix}{key}]"]
        _write_table(value, f"{prefix}{key}.", lines)


def _all_tables(items: list) -> bool:
    return all(isinstance(i, dict) for i in items)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)
