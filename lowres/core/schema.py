"""The JSON schema of a recipe file, made from the parts that are there."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from lowres.core import registry
from lowres.core.recipe import KEYS, OPTIONAL, SCHEMA, SECTIONS


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, from the parts that are there;
    editors complete and check with it.
    """

    def fields(cls: type[Any], name: str | None = None) -> dict[str, Any]:
        schema = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
        schema.pop("title", None)
        schema["additionalProperties"] = False
        if name is not None:
            schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
            schema["required"] = ["name", *schema.get("required", [])]
            summary = registry.docstring(family, name).partition("\n")[0]
            schema["description"] = summary
        return schema

    properties: dict[str, Any] = {"schema": {"const": SCHEMA}}
    for key, cls in SECTIONS.items():
        properties[key] = fields(cls)
    for family in registry.FAMILIES:
        there = registry.names(family)
        choice = {"anyOf": [{"enum": there}] + [fields(registry.load(family, n), n) for n in there]}
        if family == "lever":
            properties["levers"] = {"type": "array", "items": choice}
        else:
            properties[family] = choice
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lowres recipe",
        "type": "object",
        "additionalProperties": False,
        "required": [k for k in KEYS if k not in OPTIONAL],
        "properties": {k: properties[k] for k in KEYS},
    }
