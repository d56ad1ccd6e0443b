"""What a record says about where it was made: ``machine.describe_machine`` and what else changes a time.

No host name, no user, no path, no serial number, no address.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...backends.cpu import cgroup_quota
from ..machine import describe_machine
from . import nvml

# Variables that change how engines compute or how many threads they start; their values are no secrets.
VARIABLES = (
    "KMP_AFFINITY",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "ORT_DISABLE_ALL_OPTIMIZATIONS",
    "OV_CPU_MAX_ISA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
)


def describe_environment(root: Path = Path("/")) -> dict[str, Any]:
    """The facts as JSON holds them; ``root`` is where ``proc`` and ``sys`` lie, another folder for tests."""
    machine = asdict(describe_machine(root))
    machine["packages"] = machine.pop("versions")
    machine["flags"] = list(machine["flags"])
    machine.pop("commit")  # the record's ``tool`` says it
    machine.pop("kiln")
    return machine | {
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "cgroup_processors": cgroup_quota(root),
        "cgroup_memory_bytes": _cgroup_memory(root),
        "governor": _line(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(root),
        "smt": _line(root / "sys/devices/system/cpu/smt/control"),
        "transparent_hugepages": _bracketed(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        "numa_nodes": len(list(root.glob("sys/devices/system/node/node[0-9]*"))) or None,
        "virtual": _virtual(root),
        "container": _container(root),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "gpus": nvml.describe(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _cgroup_memory(root: Path) -> int | None:
    text = _line(root / "sys/fs/cgroup/memory.max")
    return int(text) if text and text.isdigit() else None


def _turbo(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    without, boost = _line(cpu / "intel_pstate/no_turbo"), _line(cpu / "cpufreq/boost")
    if without is not None:
        return without == "0"
    return None if boost is None else boost == "1"


def _virtual(root: Path) -> bool | None:
    """Whether the processor says that a hypervisor is there."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return "hypervisor" in flags.split() if flags else None


def _container(root: Path) -> bool:
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return True
    try:
        return any(
            word in (root / "proc/1/cgroup").read_text()
            for word in ("docker", "kubepods", "containerd", "lxc")
        )
    except OSError:
        return False


def _bracketed(path: Path) -> str | None:
    """The choice in force of a list like ``always [madvise] never``."""
    text = _line(path)
    return text.split("[", 1)[1].split("]", 1)[0] if text and "[" in text else text


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None
