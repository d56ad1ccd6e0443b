"""Memory of the process that measures: peaks by named method, and what the machine has left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..records.record import Bytes, Memory
from . import nvml

_ROWS = {"VmHWM": "rss", "RssAnon": "anonymous", "RssFile": "file_backed"}


class PeakWatch:
    """Keeps the highest of what the kernel says of a process whenever it is asked; see proc(5).

    ``VmHWM`` is the kernel's own peak. Of its parts, anonymous memory and mapped files such as weights,
    the kernel keeps none, so what is kept is the highest value seen.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self.peaks: dict[str, int] = {}

    def __call__(self, pid: int) -> None:
        """Look once."""
        found = _status(self._root / f"proc/{pid}/status")
        device = nvml.process_memory(pid)
        if device is not None:
            found["device"] = device
        for name, value in found.items():
            self.peaks[name] = max(self.peaks.get(name, 0), value)

    def memory(self, answer: Mapping[str, Any] | None = None) -> Memory:
        """The peaks, and those that the process itself told, whichever is higher."""
        methods = {
            "rss": "VmHWM",
            "anonymous": "RssAnon, highest seen",
            "file_backed": "RssFile, highest seen",
            "device": "nvml process, highest seen",
        }
        kept = {name: Bytes(value, methods[name]) for name, value in self.peaks.items() if value}
        for name, told in (answer or {}).items():
            if name in methods and (name not in kept or int(told["value"]) > kept[name].value):
                kept[name] = Bytes(int(told["value"]), str(told["method"]))
        return Memory(**kept)


def highest(first: Memory, second: Memory) -> Memory:
    """Figure by figure the higher: of a run and of what it was before an interruption."""
    pairs = {
        name: [b for b in (getattr(first, name), getattr(second, name)) if b is not None]
        for name in ("rss", "anonymous", "file_backed", "device")
    }
    return Memory(**{name: max(found, key=lambda b: b.value) for name, found in pairs.items() if found})


def available_bytes(root: Path = Path("/")) -> int | None:
    """What new processes may use without swapping: the kernel's estimate, capped by the cgroup's limit."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return free if limit == "max" else min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        return free


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Ask the kernel to forget what it holds of these files; whether it could be asked. Needs no rights.

    ``posix_fadvise(POSIX_FADV_DONTNEED)`` drops clean pages that no process maps, so it is done before
    any worker has the files open. Only files are named, never the machine's whole cache.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.fsync(handle)  # pages that are not written yet are kept
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(handle)
    return True


def _status(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in _ROWS and rest.split():
            found[_ROWS[name]] = int(rest.split()[0]) * 1024
    return found
