"""Records as JSON holds them, and back: every field has to be there, of its type, and known.

``record.schema.json`` says the same to others. It is made from the same dataclasses and ``RULES`` (see
``schema.py``); a test holds both against the same records.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from ...errors import UsageError
from . import record as values
from .record import SCHEMA, Record

T = TypeVar("T")
SHA256 = "^[0-9a-f]{64}$"
# What a type does not say, by class and field, in the words of JSON Schema.
RULES: dict[tuple[str, str], dict[str, Any]] = {
    ("AdapterFacts", "sha256"): {"pattern": SHA256},
    ("WorkloadFacts", "prompts_digest"): {"pattern": SHA256},
    ("WorkloadFacts", "latents_digest"): {"pattern": SHA256},
    ("WorkloadFacts", "prompts"): {"minItems": 1},
    ("WorkloadFacts", "steps"): {"minimum": 1},
    ("WorkloadFacts", "width"): {"minimum": 1},
    ("WorkloadFacts", "height"): {"minimum": 1},
    ("WorkloadFacts", "batch"): {"minimum": 1},
    ("Requested", "threads"): {"minimum": 0},
    ("Sample", "index"): {"minimum": 0},
    ("Sample", "prompt"): {"minimum": 0},
    ("Sample", "seconds"): {"exclusiveMinimum": 0},
    ("Stats", "count"): {"minimum": 1},
    ("Bytes", "value"): {"minimum": 0},
    ("ImageFacts", "prompt"): {"minimum": 0},
    # No way out of the results folder: no leading slash, no "..", no backslash.
    ("ImageFacts", "file"): {"pattern": r"^images/[0-9a-f]{16}\.png$"},
    ("ImageFacts", "sha256"): {"pattern": SHA256},
    ("ImageFacts", "pixels"): {"pattern": SHA256},
    ("Record", "id"): {"minLength": 1},
    ("Record", "key"): {"pattern": "^[0-9a-f]{16}$"},
    ("Record", "created"): {"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"},
    ("Record", "schema"): {"const": SCHEMA},
}
# How a record of an older schema becomes one of the next. A change that only adds a field with a default
# needs no new schema, and so no row here.
UPGRADES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
# What stood among the reasons and judged nothing, before remarks had a place of their own.
_REMARKS = re.compile(
    "compile_cold: the system's page cache|took turns in group |(parity|pictures) not judged: |"
    r"not explained: |LPIPS and CLIP score not told: |parity not checked: \S+ starts from noise of its own$|"
    r"[\d.]+% of the time is outside of all components$"
)


class RecordError(UsageError):
    """A text that is no record; the message names the place in it."""

    exit_code = 1


def to_dict(record: Record) -> dict[str, Any]:
    """A record as plain dicts, lists, texts and numbers, in the order of its fields.

    Raises:
        RecordError: a value is NaN or infinite, or of no type that JSON has.
    """
    found = _plain(record, "record")
    assert isinstance(found, dict)
    return found


def to_json(record: Record) -> str:
    """One line, without a line break at its end. Floats are written so that they come back bit by bit.

    Raises:
        RecordError: a value is NaN or infinite, or of no type that JSON has.
    """
    return json.dumps(to_dict(record), ensure_ascii=False, allow_nan=False)


def from_json(line: str | bytes) -> Record:
    """The record of one line.

    Raises:
        RecordError: it is not JSON, or no record; the text says where and what was expected.
    """
    try:
        raw = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_unique)
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from None
    return from_dict(raw)


def from_dict(raw: Any) -> Record:
    """The record of its plain form; older schemas are upgraded, fields with a default may be missing.

    Raises:
        RecordError: another schema, a field that is missing or not known, a value of another type or
            outside of what is allowed; the text says where.
    """
    if not isinstance(raw, Mapping):
        raise RecordError(f"a record is an object, got {type(raw).__name__}")
    raw = dict(raw)
    while str(raw.get("schema")) in UPGRADES:
        raw = UPGRADES[str(raw["schema"])](raw)
    if raw.get("schema") != SCHEMA:
        known = ", ".join([*UPGRADES, SCHEMA])
        raise RecordError(
            f"the schema is {raw.get('schema')!r}, expected {known}; a newer Kiln may have written it"
        )
    return _object(Record, raw if "remarks" in raw else _with_remarks(raw), "record")


def _with_remarks(raw: dict[str, Any]) -> dict[str, Any]:
    """The record of a Kiln that kept remarks among the reasons, with both told apart."""
    said = raw.get("reasons")
    if not isinstance(said, (list, tuple)) or not all(isinstance(text, str) for text in said):
        return raw  # what is no list of texts is refused where its type is looked at
    remarks = [text for text in said if _REMARKS.match(text)]
    return {**raw, "reasons": [text for text in said if text not in remarks], "remarks": remarks}


@cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, resolved."""
    return typing.get_type_hints(kind, vars(values))


def _plain(value: Any, at: str) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), f"{at}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{at}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(
                f"{at} is {value}; JSON has no word for it, a record holds finite numbers or null"
            )
        return float(value)  # numpy's float64 is a float and would stay one
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise RecordError(f"{at} is a {type(value).__name__}; a record holds texts, numbers, lists and mappings")


def _object(kind: type[T], raw: Any, at: str) -> T:
    if not isinstance(raw, Mapping):
        raise RecordError(f"{at} is {_shown(raw)}, expected an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(map(str, raw.keys() - fields.keys()))
    if unknown:
        raise RecordError(f"{at}.{unknown[0]} is not known; expected {', '.join(fields)}")
    needed = [name for name, f in fields.items() if is_required(f)]
    missing = [name for name in needed if name not in raw]
    if missing:
        raise RecordError(f"{at}.{missing[0]} is missing")
    types_of = hints(typing.cast(type, kind))
    made = {}
    for name, value in raw.items():
        made[name] = _value(types_of[name], value, f"{at}.{name}")
        if made[name] is not None:
            _rules(RULES.get((kind.__name__, name), {}), value, f"{at}.{name}")
    return kind(**made)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a record has to have the field on paper."""
    # The schema has one, so that values made in Python need not name it; on paper it has to be there.
    absent = dataclasses.MISSING
    return (field.default is absent and field.default_factory is absent) or field.name == "schema"


def _value(kind: Any, raw: Any, at: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return None if raw is None else _value(inner, raw, at)
    if origin is typing.Literal:
        if raw not in args:
            raise RecordError(f"{at} is {_shown(raw)}, expected one of {', '.join(map(str, args))}")
        return raw
    if origin is tuple:
        return _array(args, raw, at)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            raise RecordError(f"{at} is {_shown(raw)}, expected an object")
        return {str(key): _value(args[1], item, f"{at}.{key}") for key, item in raw.items()}
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type[Any], kind), raw, at)
    return raw if kind is Any else _scalar(kind, raw, at)


def _array(args: tuple[Any, ...], raw: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise RecordError(f"{at} is {_shown(raw)}, expected a list")
    if args[-1] is not Ellipsis and len(raw) != len(args):
        raise RecordError(f"{at} has {len(raw)} values, expected {len(args)}")
    return tuple(_value(args[0], item, f"{at}[{index}]") for index, item in enumerate(raw))


def _scalar(kind: type, raw: Any, at: str) -> Any:
    """A text, a number or a truth value; a whole number is a float too, a truth value is no number."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if kind is int and isinstance(raw, float) and raw.is_integer():
        return int(raw)  # JSON knows one kind of number
    accepted = (int, float) if kind is float else kind
    if not isinstance(raw, accepted) or (isinstance(raw, bool) and kind is not bool):
        raise RecordError(f"{at} is {_shown(raw)}, expected {names[kind]}")
    if isinstance(raw, float) and not math.isfinite(raw):
        raise RecordError(f"{at} is {raw}, expected a finite number")
    return raw  # 7 stays 7 where a float is expected, so that a record is written as it was read


def _rules(rules: Mapping[str, Any], raw: Any, at: str) -> None:
    checks: dict[str, Callable[[Any], bool]] = {
        # \Z for JSON Schema's $, which in Python also matches before a line break at the end
        "pattern": lambda want: re.search(want.replace("$", r"\Z"), raw) is not None,
        "minimum": lambda want: raw >= want,
        "exclusiveMinimum": lambda want: raw > want,
        "minItems": lambda want: len(raw) >= want,
        "minLength": lambda want: len(raw) >= want,
        "const": lambda want: raw == want,
    }
    for name, want in rules.items():
        if not checks[name](want):
            raise RecordError(f"{at} is {_shown(raw)}, expected {name} {want}")


def _shown(raw: Any) -> str:
    text = json.dumps(raw, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found
