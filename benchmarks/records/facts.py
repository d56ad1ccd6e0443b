"""What has to agree before two records may be compared, and what else differs between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .record import Record, WorkloadFacts

# Names by which people call a workload and a model; what they stand for is compared in place of them.
_NAMES = frozenset({"id", "tier", "model.name", "model.random_weights"})
MODEL = "model"
# Facts of the environment that make it another machine. Names as in ``harness.environment``.
_MACHINE = ("cpu", "architecture", "cores", "threads", "cgroup_processors", "memory_bytes")
_SURROUNDINGS = ("system", "python", "governor", "turbo", "virtual", "container", "variables")


def fixed_facts(workload: WorkloadFacts) -> dict[str, Any]:
    """Everything that changes the picture or the time, by dotted names."""
    found = dict(_flat(workload, ""))
    return {name: value for name, value in found.items() if name not in _NAMES}


def workload_key(workload: WorkloadFacts) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``fixed_facts``: equal for what may be compared."""
    text = json.dumps(fixed_facts(workload), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing_facts(a: WorkloadFacts, b: WorkloadFacts, *, across_models: bool = False) -> list[str]:
    """Fixed facts that differ, in words; ``across_models`` leaves out which model and adapters it is."""
    one, other = fixed_facts(a), fixed_facts(b)
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    if across_models:
        names = [name for name in names if name.split(".")[0].split("[")[0] not in (MODEL, "adapters")]
    return [f"{name}: {_shown(one.get(name))} and {_shown(other.get(name))}" for name in names]


def differing_machine(a: Record, b: Record) -> list[str]:
    """Facts that make it two machines, in words; empty for one and the same."""
    one, other = _machine(a.environment), _machine(b.environment)
    return [
        f"{name}: {_shown(one[name])} and {_shown(other[name])}" for name in one if one[name] != other[name]
    ]


def other_differences(a: Record, b: Record) -> list[str]:
    """What differs and may: surroundings, versions, what was asked for and what was in force."""
    one, other = _soft(a), _soft(b)
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return [f"{name}: {_shown(one.get(name))} and {_shown(other.get(name))}" for name in names]


def _flat(value: Any, at: str) -> list[tuple[str, Any]]:
    if is_dataclass(value):
        named = [(f"{at}.{f.name}" if at else f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        named = [(f"{at}.{name}", item) for name, item in sorted(value.items())]
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        named = [(f"{at}[{index}]", item) for index, item in enumerate(value)]
    else:
        return [(at, list(value) if isinstance(value, tuple) else value)]
    return [row for name, item in named for row in _flat(item, name)]


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    gpus = [gpu.get("name") if isinstance(gpu, Mapping) else gpu for gpu in environment.get("gpus") or ()]
    return {name: environment.get(name) for name in _MACHINE} | {"gpus": gpus}


def _soft(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {"kiln": record.tool.version, "commit": record.tool.commit}
    found |= {name: record.environment.get(name) for name in _SURROUNDINGS}
    packages = record.environment.get("packages") or {}
    found |= {f"package {name}": version for name, version in packages.items()}
    asked = record.requested
    found |= {"requested name": asked.name, "requested device": asked.device}
    found |= {"requested precision": asked.precision, "requested threads": asked.threads}
    found |= {f"option {name}": value for name, value in asked.options.items()}
    for component, row in record.effective.items():
        for name in ("backend", "version", "provider", "device", "precision", "threads"):
            found[f"{component} {name}"] = getattr(row, name)
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > 48:
        text = f"{text[:45]}..."
    return text or "nothing"
