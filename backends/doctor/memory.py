"""Memory for running a model, with the limits of cgroups counted in."""

from __future__ import annotations

from .finding import Finding, absent, failure, ok, warning
from .system import System, gib

# An estimate for SD1.5 at 512x512 on a processor, on the safe side; and for the bundled model. The
# UNet alone has 860 million parameters, 1.7 GB in bf16 and 3.4 GB in fp32, and engines copy while compiling.
SD15_NEED = 6 * 2**30
BUNDLED_NEED = 2**30
_UNLIMITED = 2**60  # version 1 says "no limit" by a huge number


def check_memory(system: System) -> list[Finding]:
    """D-MEM: enough memory is free for Stable Diffusion 1.5."""
    fields = system.fields("/proc/meminfo", ":")
    total, free = (_kib(fields.get(name, "")) for name in ("MemTotal", "MemAvailable"))
    if total is None:
        return [absent("D-MEM", "/proc/meminfo does not say how much memory there is")]
    free = total if free is None else free
    evidence = [f"/proc/meminfo: {gib(free)} available of {gib(total)}"]
    limit = memory_limit(system)
    if limit is not None and limit[0] < total:
        size, used, source = limit
        total, free = size, min(free, max(0, size - used))
        evidence.append(f"{source}: limit {gib(size)}, {gib(used)} in use")
    if free < BUNDLED_NEED:
        text = f"{gib(free)} of memory available: not even the bundled model fits"
        return [failure("D-MEM", text, evidence, _more(limit))]
    if free < SD15_NEED:
        text = f"{gib(free)} of memory available; Stable Diffusion 1.5 wants up to {gib(SD15_NEED)}"
        fix = ["kiln export MODEL -o BUNDLE --precision fp16", *_more(limit)]
        return [warning("D-MEM", text, evidence, fix)]
    return [ok("D-MEM", f"{gib(free)} of memory available", *evidence)]


def _more(limit: tuple[int, int, str] | None) -> list[str]:
    if limit is not None:
        return ["docker update --memory 8g --memory-swap 8g CONTAINER"]
    return ["Close other programs, or add swap: sudo fallocate -l 8G /swapfile."]


def memory_limit(system: System) -> tuple[int, int, str] | None:
    """The tightest memory limit of this process's cgroups: limit and use in bytes, and where it says so.

    Version 2: ``memory.max`` and ``memory.current``; version 1: ``memory.limit_in_bytes`` and
    ``memory.usage_in_bytes``. The use includes cache that the kernel would give back.
    """
    found = []
    for folder in _folders(system):
        for limit_name, use_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, use = (system.read(f"{folder}/{name}") for name in (limit_name, use_name))
            if limit.isdigit() and int(limit) < _UNLIMITED:
                cache = system.fields(f"{folder}/memory.stat")
                given_back = int(cache.get("inactive_file", cache.get("total_inactive_file", "0")) or 0)
                used = max(0, int(use) - given_back) if use.isdigit() else 0
                found.append((int(limit), used, f"{folder}/{limit_name}"))
    return min(found, default=None)


def _folders(system: System) -> list[str]:
    """The memory cgroups of this process, each with all groups around it."""
    found = []
    for line in system.read("/proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = "/sys/fs/cgroup" + ("/memory" if controllers else "")
        parts = [part for part in path.split("/") if part]
        found += ["/".join((top, *parts[:count])) for count in range(len(parts), -1, -1)]
    return found


def _kib(text: str) -> int | None:
    first = text.split(" ")[0]
    return int(first) * 1024 if first.isdigit() else None
