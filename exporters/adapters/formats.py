"""The registry of adapter formats: whose suffix ends a key, and whose module a set of parameters is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .base import AdapterFormat
from .lora import LORA
from .unsupported import DORA, OTHERS

# Tested in this order. DoRA is a scale on top of another format, so it goes before all of them.
FORMATS: tuple[AdapterFormat, ...] = (DORA, LORA, *OTHERS)

SUFFIXES: Mapping[str, str] = {
    suffix: name for form in reversed(FORMATS) for suffix, name in form.suffixes.items()
}
_LENGTHS = sorted({len(suffix) for suffix in SUFFIXES}, reverse=True)


@dataclass(frozen=True)
class SplitKey:
    """A key taken apart: the module's stem, the suffix as written, and the parameter it means."""

    stem: str
    suffix: str
    parameter: str


def split_key(key: str) -> SplitKey | None:
    """Split at the longest known suffix; None when the key ends in none of them."""
    for length in _LENGTHS:
        parameter = SUFFIXES.get(key[-length:]) if len(key) > length else None
        if parameter is not None:
            return SplitKey(key[:-length], key[-length:], parameter)
    return None


def format_of(parameters: Iterable[str]) -> AdapterFormat | None:
    """The format of a module with these parameters, or None when they belong to no format."""
    present = frozenset(parameters)
    return next((form for form in FORMATS if form.owns(present)), None)
