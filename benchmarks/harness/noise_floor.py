"""How far two runs of the same may differ on this machine, remembered for later comparisons."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cache import cache_root, private_folder

_KEPT = 5
# What a floor is: see ``noise.aa_floor``. Older rows are of the bare difference, which luck makes small.
_OF = "interval"


def machine_id(environment: Mapping[str, Any]) -> str:
    """The same for one machine with the same kernel; says nothing about whose it is."""
    gpus = [gpu.get("name") for gpu in environment.get("gpus", ())]
    facts = [environment.get(name) for name in ("cpu", "threads", "cores", "memory_bytes", "system")]
    return hashlib.sha256(json.dumps([facts, gpus], default=str).encode()).hexdigest()[:16]


def noise_floor(machine: str) -> float | None:
    """The largest floor of the last five A/A runs on a machine, None if there was none."""
    runs = _read().get(machine, [])
    floors = [
        row["floor"] for row in runs[-_KEPT:] if isinstance(row.get("floor"), float) and row.get("of") == _OF
    ]
    return max(floors, default=None)


def remember_floor(machine: str, workload: str, floor: float) -> None:
    """Add an A/A run; a folder that cannot be written costs the memory and nothing else."""
    known = _read()
    row = {
        "floor": floor,
        "of": _OF,
        "workload": workload,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    known[machine] = [*known.get(machine, []), row][-_KEPT:]
    path = _path()
    with contextlib.suppress(OSError):
        private_folder(path.parent)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def _path() -> Path:
    # Not one of ``cache.KINDS``: a few lines that nothing should prune.
    return cache_root() / "bench" / "noise-floor.json"


def _read() -> dict[str, list[dict[str, Any]]]:
    try:
        value = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {k: [r for r in v if isinstance(r, dict)] for k, v in value.items() if isinstance(v, list)}
