"""Memory and energy: figures with the method that gave each."""

from __future__ import annotations

from dataclasses import dataclass

from ..records.record import Memory
from .axis import Axis, linear_axis
from .grouping import Entry, Group
from .text import NONE, clean, number, size

KINDS = {
    "rss": "resident, peak",
    "anonymous": "anonymous",
    "file_backed": "file-backed",
    "device": "on the device",
}


@dataclass(frozen=True)
class Amount:
    """A bar, or none where there is no method."""

    kind: str
    name: str
    bar: float | None
    text: str
    method: str


@dataclass(frozen=True)
class MemoryRow:
    """The amounts of a configuration; they are peaks each by itself and do not add up."""

    entry: Entry
    amounts: tuple[Amount, ...]


@dataclass(frozen=True)
class MemoryTable:
    """The amounts of a group on one axis, in gigabytes of 1e9 bytes."""

    axis: Axis
    rows: tuple[MemoryRow, ...]
    kinds: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EnergyRow:
    """Joules of a configuration."""

    entry: Entry
    bar: float | None
    joules: str
    net: str
    idle: str
    method: str


@dataclass(frozen=True)
class EnergyTable:
    """Joules per image of a group; ``rows`` empty where no configuration had a counter."""

    axis: Axis
    rows: tuple[EnergyRow, ...]


def memory_table(group: Group) -> MemoryTable | None:
    """None where nothing was measured."""
    known = [e for e in group.entries if _amounts(e.record.memory)]
    if not known:
        return None
    unit, factor = _unit(max(value for e in known for _, value, _ in _amounts(e.record.memory)))
    every = [value / factor for e in known for _, value, _ in _amounts(e.record.memory)]
    axis = linear_axis([0.0, *every], unit=unit)
    seen = {kind for e in known for kind, _, _ in _amounts(e.record.memory)}
    rows = tuple(MemoryRow(e, _bars(e.record.memory, axis, factor, seen)) for e in known)
    return MemoryTable(axis, rows, tuple((k, name) for k, name in KINDS.items() if k in seen))


def energy_table(group: Group) -> EnergyTable:
    """Rows of all configurations as soon as one has joules."""
    joules = [e.record.energy.joules_per_image for e in group.entries]
    axis = linear_axis([0.0, *(j for j in joules if j is not None)], unit="joules per image")
    if not any(j is not None for j in joules):
        return EnergyTable(axis, ())
    return EnergyTable(axis, tuple(_energy(e, axis) for e in group.entries))


def _energy(entry: Entry, axis: Axis) -> EnergyRow:
    energy = entry.record.energy
    return EnergyRow(
        entry=entry,
        bar=None if energy.joules_per_image is None else axis.at(energy.joules_per_image),
        joules=_with(energy.joules_per_image, "J"),
        net=_with(energy.net_joules_per_image, "J"),
        idle=_with(energy.idle_watts, "W"),
        method=clean(energy.method, 60),
    )


def _with(value: float | None, unit: str) -> str:
    return NONE if value is None else f"{number(value)} {unit}"


def _unit(highest: float) -> tuple[str, float]:
    return ("gigabytes", 1e9) if highest >= 1e9 else ("megabytes", 1e6)


def _amounts(memory: Memory) -> list[tuple[str, int, str]]:
    found = []
    for kind in KINDS:
        amount = getattr(memory, kind)
        if amount is not None:
            found.append((kind, amount.value, amount.method))
    return found


def _bars(memory: Memory, axis: Axis, factor: float, seen: set[str]) -> tuple[Amount, ...]:
    known = {kind: (value, method) for kind, value, method in _amounts(memory)}
    rows = []
    for kind, name in KINDS.items():
        if kind in known:
            value, method = known[kind]
            rows.append(Amount(kind, name, axis.at(value / factor), size(value), clean(method, 60)))
        elif kind in seen:
            rows.append(Amount(kind, name, None, NONE, ""))
    return tuple(rows)
