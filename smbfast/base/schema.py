"""The JSON schema of a group of settings, by which an editor completes and checks a TOML file."""

import json
from typing import Any

from pydantic import BaseModel

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema_text(model: type[BaseModel], more: dict[str, Any] | None = None) -> str:
    """Return the schema of what a TOML file of `model` may hold, as JSON.

    It has every key with type, limits, default and description. Rules that join several keys are
    checked by the command alone.

    Args:
        more: further keys of the top level, by name, with their schemas.
    """
    schema = model.model_json_schema()
    schema["properties"] |= more or {}
    return json.dumps({"$schema": DRAFT, **_without_titles(schema)}, indent=1, ensure_ascii=False)


def or_one_item(schema: dict[str, Any]) -> None:
    """Let the schema of a list allow one item in its place, as the validator of the key does."""
    names = [name for name in ("type", "items") if name in schema]
    options = schema.pop("anyOf", None) or [{name: schema.pop(name) for name in names}]
    items = [option["items"] for option in options if option.get("type") == "array"]
    schema["anyOf"] = [*options, *items]


def _without_titles(schema: Any) -> Any:
    """Return a schema without the titles that pydantic makes of names: they say nothing more."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_titles(inner) for name, inner in value.items()}
        if key in ("properties", "$defs")
        else _without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }
