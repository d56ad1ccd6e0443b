"""What is spent once: until the first image with nothing prepared, and with everything cached."""

from __future__ import annotations

from dataclasses import dataclass

from ..records.record import Phases
from .axis import Axis, fair, time_axis
from .grouping import Entry, Group
from .parts import Part
from .text import NONE, clean, seconds

NAMES = {
    "convert": "convert",
    "imports": "import",
    "open": "open",
    "compile_cold": "compile, cold",
    "load_cached": "load, cached",
    "first_image": "first image",
}
_COLD = ("convert", "imports", "open", "compile_cold", "first_image")
_CACHED = ("imports", "open", "load_cached", "first_image")


@dataclass(frozen=True)
class Start:
    """Two bars: everything anew, and from the cache; empty where a phase that it needs is missing."""

    entry: Entry
    cold: tuple[Part, ...]
    cold_total: str
    cold_cut: bool
    cached: tuple[Part, ...]
    cached_total: str
    cached_cut: bool
    cells: tuple[str, ...]
    components: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Starts:
    """The phases of a group."""

    axis: Axis
    rows: tuple[Start, ...]
    kinds: tuple[str, ...]
    has_components: bool


def starts(group: Group) -> Starts | None:
    """None where no phase was measured."""
    known = [e for e in group.entries if any(_value(e.record.phases, name) is not None for name in NAMES)]
    if not known:
        return None
    bars = [_bar(e.record.phases, kind) for e in known for kind in (_COLD, _CACHED)]
    ends = [sum(value for _, value in bar) for bar in bars if bar]
    axis = time_axis([0.0, *fair(ends)])
    rows = tuple(_start(e, axis) for e in known)
    kinds = {p.kind for row in rows for p in (*row.cold, *row.cached)}
    return Starts(axis, rows, tuple(n for n in NAMES if n in kinds), any(row.components for row in rows))


def _value(phases: Phases, name: str) -> float | None:
    value: float | None = getattr(phases, name)
    return value


def _bar(phases: Phases, kind: tuple[str, ...]) -> list[tuple[str, float]]:
    needed = "compile_cold" if kind is _COLD else "load_cached"
    if _value(phases, needed) is None:
        return []
    return [(name, value) for name in kind if (value := _value(phases, name)) is not None]


def _start(entry: Entry, axis: Axis) -> Start:
    phases = entry.record.phases
    cold, cached = _bar(phases, _COLD), _bar(phases, _CACHED)
    components = tuple(
        (clean(name, 40), seconds(row.get("compile_cold")), seconds(row.get("load_cached")))
        for name, row in phases.components.items()
    )
    return Start(
        entry=entry,
        cold=_parts(cold, axis),
        cold_total=_total(cold),
        cold_cut=axis.cuts(sum(value for _, value in cold)),
        cached=_parts(cached, axis),
        cached_total=_total(cached),
        cached_cut=axis.cuts(sum(value for _, value in cached)),
        cells=tuple(seconds(_value(phases, name)) for name in NAMES),
        components=components,
    )


def _total(bar: list[tuple[str, float]]) -> str:
    return seconds(sum(value for _, value in bar)) if bar else NONE


def _parts(bar: list[tuple[str, float]], axis: Axis) -> tuple[Part, ...]:
    found, start = [], 0.0
    for name, value in bar:
        at, end = axis.at(start), axis.at(start + value)
        found.append(Part(NAMES[name], name, at, round(end - at, 3), seconds(value), ""))
        start += value
    return tuple(found)
