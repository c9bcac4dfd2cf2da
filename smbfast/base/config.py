"""Fills settings (pydantic models) from TOML and from `--a.b=c` on the command line.

Every key is validated, and the message about an unknown key names the nearest known one. The
classes are in `smbfast.settings`, and `--help` shows their docstrings and descriptions.
"""

import json
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from smbfast.base.help_page import group_class, help_text, table_class
from smbfast.base.nearest import MOST_HINTS, Foreign, edits, hint, nearest
from smbfast.base.schema import schema_text
from smbfast.base.typed import as_typed

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings, in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )
    epilog: ClassVar[str] = ""  # examples, which end the help of a command
    aliases: ClassVar[dict[str, str]] = {}  # further names of keys on the command line
    foreign: ClassVar[Mapping[str, Foreign]] = {}  # names of other programs, for messages alone
    instead: ClassVar[Mapping[str, str]] = {}  # keys of a table that take the place of another

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _at_home(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Write out the home folder, as no shell does behind `=`, and refuse an empty word."""
        if value == "" and cls.model_fields[str(info.field_name)].default != "":
            raise ValueError("must have a value, got nothing; is a variable of the shell empty?")
        if isinstance(value, list):
            return [_home(one) for one in value]
        return _home(value)


def command_line(
    model: type[T],
    argv: list[str] | None = None,
    *,
    prog: str,
    words: str = "",
    epilog: str = "",
    read: Callable[[list[str]], T] | None = None,
) -> T:
    """Return the settings that arguments `--a.b=c`, `--a.b c` or `a.b=c` give.

    On `--help` it prints help and on `--schema` the JSON schema of the settings, and exits with 0.
    On a bad argument it prints one line and exits with 2.

    Args:
        words: what may stand before the settings, for help, such as `[RUN ...]`.
        read: reads the arguments, where there are words without a key among them.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(model, f"{prog} {words}".rstrip(), epilog))
        raise SystemExit(0)
    if "--schema" in argv:
        print(schema_text(model))
        raise SystemExit(0)
    try:
        return read(argv) if read else build(model, {}, argv)
    except ValueError as error:
        print(f"{as_typed(prog)}: {error}", file=sys.stderr)
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
    before, given = "", set[str]()
    for text in joined(model, overrides):
        name, separator, value = text.lstrip("-").partition("=")
        key = model.aliases.get(name.replace("-", "_"), name.replace("-", "_"))
        if not separator and _annotation(model, key) is bool:
            separator, value = "=", "true"
        if not separator and text.startswith("-") and _annotation(model, key) is None:
            raise ValueError(f"unknown key `{name}`{_meant(model, name, values)}")
        if not separator:
            commas = f"; a list is written with commas, {before},{text}" if before else ""
            raise ValueError(f"argument `{text}` must have the form --key=value{commas}")
        before = text if _is_list(_annotation(model, key)) else ""
        values = _with_override(model, values, key, value, given)
    for unknown in _unknown_keys(model, values):
        raise ValueError(f"unknown key `{unknown}`{_meant(model, unknown, values)}")
    return values


def joined(model: type[BaseModel], words: list[str]) -> list[str]:
    """Return the words of a command line with `--key value` written as `--key=value`.

    A word is the value of a key of `model` that stands before it without one, unless it begins with
    `--`. A switch, true or false, takes no other word.
    """
    whole: list[str] = []
    aliases = getattr(model, "aliases", {})
    for word in words:
        before = whole[-1] if whole else ""
        key = before.removeprefix("--").replace("-", "_")
        waits = before.startswith("--") and "=" not in before and not word.startswith("--")
        kind = _annotation(model, aliases.get(key, key)) if waits else None
        if kind is not None and (kind is not bool or word in ("true", "false")):
            whole[-1] = f"{before}={word}"
        else:
            whole.append(word)
    return whole


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


def _with_override(
    model: type[BaseModel], values: dict, name: str, value: str, given: set[str]
) -> dict:
    """Return `values` with the dotted `name` set to the parsed `value`.

    Args:
        given: names of items' keys that this command line has set, to which it is added.
    """
    root = name.split(".")[0]
    if _annotation(model, name) is None and not _is_table(model, root):
        raise ValueError(f"unknown key `{name}`{_meant(model, name, values)}")
    head, *rest = name.split(".")
    values = dict(values)
    if not rest and _is_table(model, head):
        values[head] = _chosen(values, head, value)
    elif not rest:
        values[head] = _parsed(value, model.model_fields[head].annotation)
    if not rest:
        return values
    if _is_table(model, head):
        return _with_table_override(model, values, head, rest, value, given)
    inner = values.get(head, {})
    group = group_class(model.model_fields[head].annotation)
    if group and isinstance(inner, dict):  # otherwise validation reports it
        values[head] = _with_override(group, inner, ".".join(rest), value, given)
    return values


def _is_table(model: type[BaseModel], name: str) -> bool:
    """Whether `name` is a list of tables, whose items are reached as `phases.0.steps`."""
    return name in model.model_fields and bool(table_class(model.model_fields[name].annotation))


def _with_table_override(
    model: type[BaseModel], values: dict, head: str, rest: list[str], value: str, given: set[str]
) -> dict:
    """Return `values` with a key of one item of a list of tables changed, by its name or number."""
    items = values.get(head, [])
    if not isinstance(items, list) or not all(isinstance(v, dict) for v in items):
        return values  # validation reports it
    name = ".".join([head, *rest])
    at = _row(values, head, rest[0])
    table = table_class(model.model_fields[head].annotation)
    if at is None or len(rest) != 2 or table is None:
        hinted = hint(nearest(name, _candidates(model, name, values)))
        rows = ", ".join(_rows(values, head)) if items else "none"
        raise ValueError(
            f"`{name}` must name a key of one of the {len(items)} {head} ({rows}), such as "
            f"`{head}.0.steps`{hinted}"
        )
    if rest[1] not in table.model_fields:
        raise ValueError(f"unknown key `{name}`{_meant(model, name, values)}")
    items = [dict(v) for v in items]
    own = f"{head}.{items[at].get('name', at)}."  # numbers change where phases are chosen
    other = getattr(table, "instead", {}).get(rest[1])
    if f"{own}{other}" not in given:  # of a preset or file, whose place it takes
        items[at].pop(other, None)
    given.add(f"{own}{rest[1]}")
    items[at][rest[1]] = _parsed(value, table.model_fields[rest[1]].annotation)
    values[head] = items
    return values


def _chosen(values: dict, head: str, value: str) -> list:
    """Return the items of a list of tables that a command line names, in its order."""
    chosen = []
    for word in filter(None, (w.strip() for w in value.split(","))):
        at = _row(values, head, word)
        if at is None:
            rows = ", ".join(_rows(values, head))
            raise ValueError(f"`{head}` must name one or more of {rows}, got `{word}`")
        chosen.append(values[head][at])
    return chosen


def _row(values: dict, head: str, word: str) -> int | None:
    """Return the place of an item by its number from 0 or its name, None if there is none."""
    rows = _rows(values, head) if values.get(head) else []
    if word.isdecimal() and int(word) < len(rows):
        return int(word)
    plain = [row.replace("-", "_") for row in rows]
    word = word.replace("-", "_")
    return plain.index(word) if word in plain else None


def _is_list(annotation: Any) -> bool:
    options = (annotation, *typing.get_args(annotation))
    return any(typing.get_origin(option) in (list, tuple) for option in options)


def _parsed(value: str, annotation: Any) -> Any:
    options = {annotation, *typing.get_args(annotation)}
    if value.lower() in ("none", "null") and type(None) in options:
        return None
    if _is_list(annotation):
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


def _annotation(model: type[BaseModel], name: str) -> Any:
    """Return the type of the setting with a dotted name, None if there is none."""
    head, _, rest = name.partition(".")
    if head not in model.model_fields:
        return None
    annotation = model.model_fields[head].annotation
    if table := table_class(annotation):
        at, _, key = rest.partition(".")
        return annotation if not rest else _annotation(table, key) if at else None
    if group := group_class(annotation):
        return _annotation(group, rest)
    return None if rest else annotation


def _unknown_keys(model: type[BaseModel], values: dict, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names in `values` that `model` does not have."""
    for key, value in values.items():
        if key not in model.model_fields:
            yield f"{prefix}{key}"
            continue
        annotation = model.model_fields[key].annotation
        inner, table = group_class(annotation), table_class(annotation)
        if inner and isinstance(value, dict):
            yield from _unknown_keys(inner, value, f"{prefix}{key}.")
        elif table and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown_keys(table, item, f"{prefix}{key}.{i}.")


def _meant(model: type[BaseModel], name: str, values: dict) -> str:
    """Return the end of the message about an unknown key: what was meant, or why there is none."""
    plain = name.lower().replace("-", "_")
    table: Mapping[str, Foreign] = getattr(model, "foreign", {})
    forms = (plain, "_".join(plain.rsplit(".", 2)[-2:]), plain.rsplit(".", 1)[-1])
    foreign = next((table[form] for form in forms[:2] if form in table), None)
    near: list[str] = []
    if foreign is None:
        near = nearest(name, _candidates(model, name, values))
        is_typo = len(near) == 1 and edits(near[0], name) == 1  # `cohrt.seed` is not their `seed`
        foreign = None if is_typo else table.get(forms[2])
    if foreign is None:
        info = model.model_fields.get(name)
        group = group_class(info.annotation) if info else None
        if group:
            return f"; it is a group of keys, such as `{name}.{next(iter(group.model_fields))}`"
        return hint(near)
    if not foreign.key:
        return f"; {foreign.why}"
    head, star, leaf = foreign.key.partition(".*.")
    keys = [f"{head}.{row}.{leaf}" for row in _asked(values, head, name)] if star else [foreign.key]
    here = ", ".join(f"`{key}`" for key in keys)
    return f"; here it is {here}" + (f", {foreign.why}" if foreign.why else "")


def _candidates(model: type[BaseModel], name: str, values: dict) -> list[str]:
    """Return the names that `name` may have been meant for: keys, groups, keys of tables."""
    tables = [head for head in model.model_fields if _is_table(model, head)]
    keys = [key for key in known_keys(model) if key not in tables]
    if "." not in name and isinstance(values.get(name), dict | list):
        keys = list(model.model_fields)  # a table of a file, such as [dat]
    for head in tables:
        rows = _asked(values, head, name)[:MOST_HINTS]
        table = table_class(model.model_fields[head].annotation)
        keys += (
            [f"{head}.{row}.{key}" for row in rows for key in known_keys(table)] if table else []
        )
    return keys


def _asked(values: dict, head: str, name: str) -> list[str]:
    """Return the item of a list of tables that `name` names, or else all that there are."""
    parts = name.split(".")
    if len(parts) > 1 and parts[0] == head and _row(values, head, parts[1]) is not None:
        return parts[1:2]
    return _rows(values, head)


def _rows(values: dict, head: str) -> list[str]:
    """Return what the items of a list of tables are called: their names, or numbers from 0."""
    items = values.get(head)
    items = items if isinstance(items, list) else []
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [n if isinstance(n, str) else str(at) for at, n in enumerate(names)] or ["0"]


# our words for the errors of pydantic, by their type; the rest have pydantic's
_WORDS = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "too_short": "must have at least {min_length}, got {actual_length}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def _message(error: Any) -> str:
    """Return an error of pydantic in one line: the key, what was expected, what was received."""
    *above, last = error["loc"] or ("",)
    key, value = ".".join(map(str, error["loc"])), error.get("input")
    if error["type"] == "missing" and isinstance(last, int):
        fewer = f"must have {last + 1} values with commas between them, got {len(value)}"
        return f"`{'.'.join(map(str, above))}`: {fewer}"
    if error["type"] == "missing":
        return f"`{key}` is required"
    if error["type"] == "value_error":  # of our own validators, who may have named the value
        message = error["msg"].removeprefix("Value error, ")
    else:
        plain = re.sub(r"^(Input|String|List|Tuple) should", "must", error["msg"])
        words = _WORDS.get(error["type"], f"{plain[0].lower()}{plain[1:]}")
        limits = error.get("ctx", {}).items()
        message = words.format_map({k: f"{v:g}" if isinstance(v, float) else v for k, v in limits})
    received = isinstance(value, str | int | float | bool) and ", got " not in message
    return (f"`{key}`: " if key else "") + message + (f", got {value!r}" if received else "")


def _home(value: Any) -> Any:
    is_below = isinstance(value, str) and value.startswith("~/")
    return str(Path(value).expanduser()) if is_below else value


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
