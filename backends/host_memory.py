"""How much memory this process may still take, by the kernel and by its control groups."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, None where nothing says.

    The least of ``MemAvailable`` and of what each enclosing control group of version 2 has left, where pages
    of files that can be dropped count as free. Source: Linux Documentation/admin-guide/cgroup-v2.rst.

    Args:
        root: where ``proc`` and ``sys`` lie; another folder for tests.
    """
    known = [_meminfo(root), *(_left(folder) for folder in _groups(root))]
    return min((value for value in known if value is not None), default=None)


def _meminfo(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[Path]:
    """The folder of this process's group of version 2, and of those around it."""
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            top = root / "sys/fs/cgroup"
            folder = top / line[3:].lstrip("/")
            return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return []


def _left(folder: Path) -> int | None:
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or limit[0] == "max":
        return None
    cached = [
        int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")
    ]
    return max(0, int(limit[0]) - int(used[0]) + sum(cached))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
