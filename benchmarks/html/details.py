"""The tables of facts: gates, what was asked for and what was in force, the machine, and the commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records.record import Effective, Gate, Record
from .grouping import Entry, Group
from .text import NONE, clean, digest, fact, number, setting, share

_METRICS = {
    "relative_l2": "relative L2",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "max_abs": "largest difference",
}
_FIRST = (
    "cpu", "cores", "threads", "processors", "cgroup_processors", "memory_bytes", "cgroup_memory_bytes",
    "gpus", "system", "python",
)  # fmt: skip


@dataclass(frozen=True)
class GateRow:
    """A gate in words; ``state`` is ``passed``, ``failed`` or ``reported``."""

    level: str
    where: str
    metric: str
    value: str
    limit: str
    state: str


@dataclass(frozen=True)
class GateTable:
    """The gates of one configuration and how many of each state."""

    entry: Entry
    rows: tuple[GateRow, ...]
    passed: int
    failed: int
    reported: int
    diverges: str
    reference: str


@dataclass(frozen=True)
class SettingsRow:
    """One component; a cell's second value says whether it differs from what was asked for."""

    component: str
    cells: tuple[tuple[str, bool], ...]
    settings: str


@dataclass(frozen=True)
class Settings:
    """What was asked of a configuration, and its components."""

    entry: Entry
    asked: tuple[str, ...]
    options: str
    rows: tuple[SettingsRow, ...]


@dataclass(frozen=True)
class NoiseRow:
    """How quiet the machine was while a configuration was measured."""

    entry: Entry
    verdict: str
    floor: str
    facts: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """Facts that some of the records share."""

    facts: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]
    flags: str
    entries: tuple[Entry, ...]


def gate_tables(group: Group) -> tuple[GateTable, ...]:
    """One for each configuration, also for those without gates."""
    from .drift import diverges

    tables = []
    for entry in group.entries:
        rows = tuple(_gate(gate) for gate in entry.record.parity.gates)
        states = [row.state for row in rows]
        counts = (states.count("passed"), states.count("failed"), states.count("reported"))
        tables.append(GateTable(entry, rows, *counts, diverges(entry), _reference(entry.record)))
    return tuple(tables)


def settings(group: Group) -> tuple[Settings, ...]:
    """Requested beside effective."""
    found = []
    for entry in group.entries:
        asked = entry.record.requested
        wanted = (asked.name, asked.device, asked.precision, str(asked.threads) if asked.threads else "auto")
        rows = tuple(
            _component(name, row, wanted, entry.peer) for name, row in entry.record.effective.items()
        )
        options = fact(asked.options) if asked.options else ""
        found.append(Settings(entry, tuple(clean(text, 60) for text in wanted), options, rows))
    return tuple(found)


def noise_rows(entries: Sequence[Entry]) -> tuple[NoiseRow, ...]:
    """One for each configuration."""
    return tuple(
        NoiseRow(
            entry=entry,
            verdict=entry.record.noise.verdict,
            floor=share(entry.record.noise.floor),
            facts="; ".join(
                f"{clean(k.replace('_', ' '), 40)} {_around(k, v)}"
                for k, v in entry.record.noise.facts.items()
                if v is not None and v != {"before": None, "after": None}
            ),
            reasons=tuple(clean(reason) for reason in entry.record.noise.reasons),
        )
        for entry in entries
    )


def machines(entries: Sequence[Entry]) -> tuple[Machine, ...]:
    """Different environments, each once, with the configurations that were measured there."""
    parts: dict[str, list[Entry]] = {}
    for entry in entries:
        parts.setdefault(json.dumps(entry.record.environment, sort_keys=True, default=str), []).append(entry)
    return tuple(_machine(part) for part in parts.values())


def machine_line(record: Record) -> str:
    """The processor and the graphics cards in a few words."""
    environment = record.environment
    gpus = environment.get("gpus")
    names = [g.get("name") for g in gpus if isinstance(g, Mapping)] if isinstance(gpus, list | tuple) else []
    parts = [environment.get("cpu"), *names]
    return clean(" · ".join(str(part) for part in parts if part) or "an unknown machine", 120)


def commands(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Each command once."""
    lines = (shlex.join(entry.record.command) for entry in entries if entry.record.command)
    return tuple(dict.fromkeys(clean(line, 2000) for line in lines))


def workload_facts(group: Group) -> tuple[tuple[str, str], ...]:
    """What every image of a group takes."""
    load = group.workload
    models = dict.fromkeys(
        f"{clean(m.name, 60)} ({clean(m.family, 30)}, {digest(m.digest)})"
        for m in (entry.record.workload.model for entry in group.entries)
    )
    adapters = dict.fromkeys(
        f"{clean(a.name, 60)} {setting(a.unet_strength)} / {setting(a.text_encoder_strength)}"
        for entry in group.entries
        for a in entry.record.workload.adapters
    )
    noises = dict.fromkeys(digest(entry.record.workload.latents_digest) for entry in group.entries)
    batches = sorted({entry.record.workload.batch for entry in group.entries})
    rows = [
        ("workload", clean(load.id, 80)),
        ("model", "; ".join(models)),
        ("sampler", f"{clean(load.sampler, 40)}, {clean(load.schedule, 40)} schedule, {load.steps} steps"),
        ("guidance", setting(load.cfg_scale)),
        ("size", f"{load.width} × {load.height} pixels"),
        ("images in a batch", ", ".join(map(str, batches))),
        ("prompts", f"{len(load.prompts)}, seed {load.seed} onwards"),
        ("prompts’ digest", digest(load.prompts_digest)),
        ("noise’s digest", ", ".join(noises)),
    ]  # fmt: skip
    if load.negative_prompt:
        rows.insert(7, ("negative prompt", clean(load.negative_prompt, 300)))
    if adapters:
        rows.insert(2, ("adapters, strength for UNet / text", "; ".join(adapters)))
    return tuple(rows)


def _gate(gate: Gate) -> GateRow:
    state = "reported" if gate.limit is None and gate.passed else "passed" if gate.passed else "failed"
    side = "≤" if gate.at_most else "≥"
    limit = NONE if gate.limit is None else f"{side} {setting(gate.limit)}"
    metric = _METRICS.get(gate.metric, clean(gate.metric.replace("_", " "), 60))
    return GateRow(clean(gate.level, 30), clean(gate.where, 80), metric, number(gate.value, 4), limit, state)


def _reference(record: Record) -> str:
    found = record.parity.reference
    asked = found.get("requested")
    if not found:
        return ""
    if not isinstance(asked, Mapping):
        return fact(found)
    words = [str(asked.get(key)) for key in ("name", "precision") if asked.get(key)]
    bundle = found.get("bundle")
    return clean(" ".join(words) + (f", bundle {bundle}" if bundle else ""), 200)


def _component(name: str, row: Effective, wanted: tuple[str, ...], peer: bool) -> SettingsRow:
    told = (row.backend, row.device, row.precision, str(row.threads))
    differs = [_differs(w, t) for w, t in zip(wanted, told, strict=True)]
    if peer:
        differs[0] = False  # a peer names its engine, not itself
    cells = [(clean(text, 60), odd) for text, odd in zip(told, differs, strict=True)]
    cells += [(clean(row.provider, 60), False), (clean(row.version, 20), False)]
    cells.append(("from cache" if row.from_cache else "compiled", False))
    return SettingsRow(clean(name, 40), tuple(cells), fact(row.settings) if row.settings else "")


def _differs(asked: str, told: str) -> bool:
    if asked in ("auto", told):
        return False
    # cuda is cuda:0, and GPU is GPU.0.
    return (
        not told.lower().startswith((f"{asked.lower()}:", f"{asked.lower()}."))
        and asked.lower() != told.lower()
    )


def _around(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and set(value) >= {"before", "after"}:
        return f"{_around(name, value['before'])} → {_around(name, value['after'])}"
    if isinstance(value, float):
        return share(value) if name.endswith("_share") else setting(value)
    return fact(value)


def _machine(part: Sequence[Entry]) -> Machine:
    environment = dict(part[0].record.environment)
    packages = environment.pop("packages", None)
    flags = environment.pop("flags", None)
    names = [name for name in _FIRST if name in environment]
    names += sorted(set(environment) - set(names))
    rows = tuple(
        (clean(n.removesuffix("_bytes").replace("_", " "), 60), _environment(n, environment[n]))
        for n in names
    )
    shown = packages if isinstance(packages, Mapping) else {}
    return Machine(
        facts=rows,
        packages=tuple((clean(name, 60), clean(version, 60)) for name, version in sorted(shown.items())),
        flags=fact(flags) if flags else "",
        entries=tuple(part),
    )


def _environment(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{number(value / 1e9, 4)} GB"
    if name == "gpus" and isinstance(value, list | tuple):
        return "; ".join(fact(gpu) for gpu in value) or "none"
    return fact(value)
