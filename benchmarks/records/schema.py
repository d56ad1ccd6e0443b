"""The JSON Schema of a record, made from the dataclasses: ``python -m kiln.benchmarks.records.schema >
FILE``.

It is published as ``benchmarks/data/record.schema.json``; a test fails when the two differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from importlib import resources
from typing import Any

from .forms import RULES, hints, is_required
from .record import SCHEMA, Record

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def make_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12; unknown fields are refused everywhere but in free mappings."""
    definitions: dict[str, Any] = {}
    _object(Record, definitions)
    top = definitions.pop("Record")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA}
    return {**head, **top, "$defs": dict(sorted(definitions.items()))}


def schema_text() -> str:
    """The published file's text, as it should be."""
    return json.dumps(make_schema(), indent=1, ensure_ascii=False) + "\n"


def published_schema() -> dict[str, Any]:
    """The schema that ships."""
    path = resources.files("kiln") / "benchmarks/data/record.schema.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # its place, should it hold itself
        fields = dataclasses.fields(kind)
        properties = {f.name: _type(hints(kind)[f.name], definitions) for f in fields}
        for f in fields:
            rules = RULES.get((name, f.name))
            properties[f.name] |= rules or {}
        definitions[name] = {
            "description": " ".join((kind.__doc__ or "").split()),
            "type": "object",
            "properties": properties,
            "required": [f.name for f in fields if is_required(f)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def _type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return {"anyOf": [_type(inner, definitions), {"type": "null"}]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _type(args[0], definitions)}
    if origin is tuple:
        items = _type(args[0], definitions)
        return {"type": "array", "items": items, "minItems": len(args), "maxItems": len(args)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(args[1], definitions)}
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), definitions)
    return {} if kind is Any else {"type": _SCALARS[kind]}


if __name__ == "__main__":
    sys.stdout.write(schema_text())
