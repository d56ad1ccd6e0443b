"""What the processor is: its name, its instruction sets, and how many threads this process may use."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# The instruction sets that decide how fast a diffusion model runs, as Linux names them.
RELEVANT_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "asimddp",
    "bf16",
    "sve",
)


@dataclass(frozen=True)
class Cpu:
    """A processor.

    ``threads`` is how many this process may use by affinity and cgroup quota, ``cores`` the same with
    hyperthreads of one core counted once.
    """

    name: str
    flags: tuple[str, ...]
    threads: int
    cores: int


def describe_cpu(root: Path = Path("/")) -> Cpu:
    """Read the processor from ``/proc``; elsewhere than on Linux only name and count are known.

    Args:
        root: where ``proc`` and ``sys`` lie; another folder for tests.
    """
    fields = _cpuinfo(root / "proc/cpuinfo")
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        name,
        tuple(flag for flag in RELEVANT_FLAGS if flag in present),
        usable_threads(root),
        usable_cores(root),
    )


def usable_threads(root: Path = Path("/")) -> int:
    """How many threads can run at once: the CPUs allowed by affinity, capped by the cgroup's quota."""
    return _capped(len(_affinity()), root)


def usable_cores(root: Path = Path("/")) -> int:
    """Threads worth starting for arithmetic: as ``usable_threads``, with hyperthreads counted once."""
    cores = set()
    for cpu in _affinity():
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return _capped(len(cores), root)


def threads_are_limited(root: Path = Path("/")) -> bool:
    """Whether this process may use fewer threads than the machine has, which engines do not all notice."""
    return usable_threads(root) < (os.cpu_count() or 1)


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs the cgroup allows, None without a limit; the tightest of all enclosing groups.

    Version 2: ``cpu.max`` holds quota and period in microseconds, or ``max``. Version 1: the two files
    ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``. Source: Linux Documentation/admin-guide/cgroup-v2.rst
    and scheduler/sched-bwc.rst.
    """
    limits = []
    for folder in _cgroup_folders(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1") and int(period) > 0:
                limits.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _capped(count: int, root: Path) -> int:
    quota = cgroup_quota(root)
    return count if quota is None else max(1, min(count, int(quota + 0.5)))


def _cgroup_folders(root: Path) -> list[Path]:
    """The folders of this process's groups and of all groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in (line for line in lines if line.count(":") >= 2):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return folders


def _cpuinfo(path: Path) -> dict[str, str]:
    """The fields of the first processor."""
    try:
        first = path.read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
