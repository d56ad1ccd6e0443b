"""How much memory is left, on machines made of files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kiln.backends.host_memory import available_bytes

GIB = 1 << 30


def machine(root: Path, **files: str) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_here() -> None:
    """Against psutil; both read a figure that changes all the time, and only we know of control groups."""
    found = available_bytes()
    if found is None:
        pytest.skip("this system does not say")
    assert 0 < found < psutil.virtual_memory().available * 1.5


def test_nothing_says(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    plain = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {16 << 20} kB\n"}
    assert available_bytes(machine(tmp_path / "plain", **plain)) == 16 * GIB
    group, outer = "sys/fs/cgroup/a/b", "sys/fs/cgroup/a"
    grouped = plain | {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "5\n",
        f"{outer}/memory.max": f"{8 * GIB}\n",
        f"{outer}/memory.current": f"{6 * GIB}\n",
        f"{outer}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert available_bytes(machine(tmp_path / "grouped", **grouped)) == 3 * GIB
    full = grouped | {f"{outer}/memory.current": f"{16 * GIB}\n"}
    assert available_bytes(machine(tmp_path / "full", **full)) == 0
