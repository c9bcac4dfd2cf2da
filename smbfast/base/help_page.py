"""What `--help` prints: every key of a pydantic model with its type, default and meaning."""

import inspect
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from smbfast.base.typed import as_typed

HELP_COLUMNS = 98  # width of the help text, for a terminal of 100 columns
MISSING = object()  # marks a key that nothing sets, as None is a value
_HOW_TO = (
    "Settings are given as --key=VALUE or --key VALUE. A list is written with commas, and "
    "`none` clears a setting that may be none. A key that does not exist is refused, with the "
    "nearest one that does."
)


@dataclass(frozen=True)
class DefaultsShown:
    """Values that help shows in place of the defaults of the classes, as nested TOML dicts."""

    source: str = ""  # what sets `values`, such as "preset lora"
    values: dict[str, Any] = field(default_factory=dict)
    overridden: dict[str, Any] = field(default_factory=dict)  # `values` with the command line's


def help_text(
    model: type[BaseModel], prog: str, epilog: str = "", shown: DefaultsShown | None = None
) -> str:
    """Return the class docstring, then each group and key with its type, default and meaning.

    Args:
        epilog: the end of the text if the class has no `epilog` of its own.
        shown: values to show as defaults; None shows those of the classes.
    """
    shown = shown or DefaultsShown()
    lines = [
        f"usage: {prog} [--key=VALUE ...]",
        "",
        *_paragraphs(inspect.cleandoc(model.__doc__ or "")),
    ]
    lines += ["", *_paragraphs(_HOW_TO)]
    if shown.source:
        lines += ["", *_paragraphs(f"The defaults below are those of {shown.source}.")]
    lines += ["", *_group_lines(model, "", shown)]
    return as_typed("\n".join([*lines, "", getattr(model, "epilog", "") or epilog]).rstrip())


def _group_lines(model: type[BaseModel], prefix: str, shown: DefaultsShown | None) -> list[str]:
    """List the keys of a group, then its inner groups; `shown` is None for the tables of a list."""
    own: list[str] = []
    inner: list[str] = []
    for name, info in model.model_fields.items():
        group, table = group_class(info.annotation), table_class(info.annotation)
        if group:
            inner += ["", *_heading(f"[{prefix}{name}]", group)]
            inner += _group_lines(group, f"{prefix}{name}.", shown)
        elif table:
            inner += ["", *_heading(f"[[{prefix}{name}]]", table)]
            inner += _table_values(f"{prefix}{name}", table, shown or DefaultsShown())
            inner += _group_lines(table, f"{prefix}{name}.0.", None)
        else:
            default = _default_phrase(f"{prefix}{name}", info, shown)
            head = f"--{prefix}{name}=VALUE  {type_phrase(info)}; {default}"
            own += _wrapped(head, "  ", "        ")
            own += _wrapped(info.description or "", "      ")
    return own + inner


def _heading(title: str, model: type[BaseModel]) -> list[str]:
    return [*_paragraphs(f"{title}  {inspect.cleandoc(model.__doc__ or '')}"), ""]


def _default_phrase(key: str, info: FieldInfo, shown: DefaultsShown | None) -> str:
    """Say which value a key has when it is not given, and what sets that value."""
    if shown is None and info.is_required():
        return "required in each table"
    own = None if info.is_required() else info.get_default(call_default_factory=True)
    own_text = "required" if info.is_required() else _value_text(own)
    if shown is None:
        return f"default {own_text}"
    preset = _looked_up(shown.values, key)
    preset_text = own_text if preset is MISSING else _value_text(preset)
    given = _looked_up(shown.overridden or shown.values, key)
    if given is not MISSING and _value_text(given) != preset_text:
        return f"given here: {_value_text(given)} ({shown.source} has {preset_text})"
    if preset_text != own_text:
        return f"default {preset_text}, set by {shown.source} ({own_text} without it)"
    return own_text if info.is_required() else f"default {own_text}"


def _looked_up(values: dict[str, Any], key: str) -> Any:
    inner: Any = values
    for name in key.split("."):
        if not isinstance(inner, dict) or name not in inner:
            return MISSING
        inner = inner[name]
    return inner


def _table_values(name: str, table: type[BaseModel], shown: DefaultsShown) -> list[str]:
    """List each table of the preset in one line, with the values of all its keys."""
    items = (shown.overridden or shown.values).get(name, [])
    if not isinstance(items, list):
        return []
    lines = [
        "  "
        + "  ".join(
            [f"{name}.{at}:"]
            + [
                f"{key}={_value_text(item.get(key, info.default))}"
                for key, info in table.model_fields.items()
                if item.get(key, info.default) is not None
            ]
        )
        for at, item in enumerate(items)
        if isinstance(item, dict)
    ]
    return [f"  The {name} of {shown.source}:", *lines, ""] if lines else []


def type_phrase(info: FieldInfo) -> str:
    """Return a key's type and limits in words, such as "a number from 0 to 1"."""
    origin, options = typing.get_origin(info.annotation), typing.get_args(info.annotation)
    if origin not in (typing.Union, types.UnionType):
        options = (info.annotation,)
    return ", or ".join(_option_phrase(option, _limits(info)) for option in options)


def _limits(info: FieldInfo) -> str:
    limits = {
        name: getattr(rule, name)
        for rule in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(rule, name, None) is not None
    }
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    text = " and ".join(f"{words[name]} {limit}" for name, limit in limits.items())
    return f" of {text}" if text.startswith("at") else f" {text}".rstrip()


def _option_phrase(option: Any, limits: str) -> str:
    origin, inner = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"{len(inner)} numbers with a comma between them"
    if origin is list:
        items = f" of {', '.join(typing.get_args(inner[0]))}" if typing.get_args(inner[0]) else ""
        return f"a list{items}"
    named = {int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    named |= {str: "text", type(None): "none"}
    return named[option] + (limits if option in (int, float) else "")


def default_text(info: FieldInfo) -> str:
    """Return the default of a key in the form that a command line takes."""
    return _value_text(info.get_default(call_default_factory=True))


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_value_text(v) for v in value) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def group_class(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a group of settings; None for a single setting or a list of tables."""
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def table_class(annotation: Any) -> type[BaseModel] | None:
    """Return the class of the items of a list of tables; None for any other setting."""
    if typing.get_origin(annotation) is not list:
        return None
    return group_class(typing.get_args(annotation)[0])


def _paragraphs(text: str) -> list[str]:
    """Wrap text paragraph by paragraph, with an empty line between two."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += ["", *_wrapped(paragraph, "")]
    return lines[1:]


def _wrapped(text: str, indent: str, later: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        HELP_COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        break_long_words=False,
        break_on_hyphens=False,
    )
