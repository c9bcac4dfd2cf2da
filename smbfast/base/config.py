"""Settings: pydantic models, filled from TOML and from `--a.b=c` on the command line.

Every key is validated; a key that does not exist names the nearest one that does. The classes
themselves stand beside the entry that reads them (`smbfast.settings` for a training run).
"""

import difflib
import json
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error, not a silence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


def command_line(
    model: type[T], argv: list[str] | None = None, *, prog: str, epilog: str = ""
) -> T:
    """Settings of `model` from arguments `--a.b=c` or `a.b=c`.

    Prints help and exits 0 on `--help`; prints one clear line and exits 2 on a bad argument.
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
    """Validate `values` (as read from TOML) with `overrides` (`a.b=c`) laid over them.

    Raises:
        ValueError: an unknown key (naming the nearest), a wrong type or a value out of range.
    """
    for text in overrides:
        name, separator, value = text.removeprefix("--").partition("=")
        field = model.model_fields.get(name.replace("-", "_"))
        if not separator and field is not None and field.annotation is bool:
            separator, value = "=", "true"  # a switch
        if not separator:
            hint = _nearest(name, known_keys(model))
            raise ValueError(f"argument `{text}` must have the form --key=value{hint}")
        values = _placed(model, values, name.replace("-", "_"), value)
    _check_keys(model, values, "")
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_told(e) for e in error.errors())) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: the file is missing or is not TOML (with the line).
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
    """The resolved settings as TOML that reads back to the same settings; `None` is left out."""
    lines: list[str] = []
    _write_table(settings.model_dump(mode="json"), "", lines)
    return "\n".join(lines).strip() + "\n"


def known_keys(model: type[Settings], prefix: str = "") -> list[str]:
    """All dotted keys of `model`."""
    keys = []
    for name, field in model.model_fields.items():
        inner = _settings_class(field.annotation)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def help_text(model: type[Settings], prog: str, epilog: str = "") -> str:
    """The class docstring and each key with its type, default and meaning."""
    lines = [f"usage: {prog} [--key=value ...]", "", (model.__doc__ or "").strip(), ""]
    _describe(model, "", lines)
    return "\n".join([*lines, "", epilog]).rstrip()


def _describe(model: type[Settings], prefix: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        inner = _settings_class(field.annotation)
        if inner:
            lines += ["", f"[{prefix}{name}]  {(inner.__doc__ or '').strip().splitlines()[0]}"]
            _describe(inner, f"{prefix}{name}.", lines)
            continue
        required = field.is_required()
        default = (
            "required"
            if required
            else f"default {_shown(field.get_default(call_default_factory=True))}"
        )
        lines.append(f"  --{prefix}{name}=  ({default})")
        lines.append(f"      {field.description or ''}")


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(v) for v in value) or "none"
    if isinstance(value, Settings):
        return value.__class__.__name__
    return "none" if value is None else str(value)


def _settings_class(annotation: Any) -> type[Settings] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Settings):
            return None if typing.get_origin(annotation) in (list, tuple) else option
    return None


def _placed(model: type[Settings], values: dict, name: str, value: str) -> dict:
    """`values` with dotted `name` set to the parsed `value`."""
    keys = known_keys(model)
    root = name.split(".")[0]
    if name not in keys and not (root in model.model_fields and _is_table(model, root)):
        raise ValueError(f"unknown key `{name}`{_nearest(name, keys)}")
    head, *rest = name.split(".")
    values = dict(values)
    if not rest:
        values[head] = _parsed(value, model.model_fields[head].annotation)
        return values
    if _is_table(model, head):
        return _placed_in_list(values, head, rest, value)
    inner = values.get(head, {})
    if isinstance(inner, dict):  # else validation names it
        kind = _settings_class(model.model_fields[head].annotation)
        values[head] = _placed(kind, inner, ".".join(rest), value)
    return values


def _is_table(model: type[Settings], root: str) -> bool:
    """Whether `root` is a list of tables, whose items are reached as `phases.0.steps`."""
    return any(
        isinstance(o, type) and issubclass(o, Settings)
        for o in typing.get_args(model.model_fields[root].annotation)
    )


def _placed_in_list(values: dict, head: str, rest: list[str], value: str) -> dict:
    items = values.get(head, [])
    if not isinstance(items, list) or not all(isinstance(v, dict) for v in items):
        return values  # validation names it
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
    except tomllib.TOMLDecodeError:
        return value


def _check_keys(model: type[Settings], values: dict, prefix: str) -> None:
    for key, value in values.items():
        if key not in model.model_fields:
            hint = _nearest(f"{prefix}{key}", [f"{prefix}{k}" for k in model.model_fields])
            raise ValueError(f"unknown key `{prefix}{key}`{hint}")
        annotation = model.model_fields[key].annotation
        inner = _settings_class(annotation)
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for option in typing.get_args(annotation):
                if isinstance(option, type) and issubclass(option, Settings):
                    for i, item in enumerate(value):
                        if isinstance(item, dict):
                            _check_keys(option, item, f"{prefix}{key}.{i}.")


def _nearest(name: str, keys: list[str]) -> str:
    found = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    if not found:
        leaf = {k.split(".")[-1]: k for k in keys}
        found = [leaf[m] for m in difflib.get_close_matches(name.split(".")[-1], leaf, n=1)]
    return f"; did you mean `{found[0]}`?" if found else ""


def _told(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"]) or "settings"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"`{where}` is required"
    shown = error.get("input")
    got = f", got {shown!r}" if isinstance(shown, (str, int, float, bool)) else ""
    return f"`{where}`: {message[0].lower()}{message[1:]}{got}"


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
