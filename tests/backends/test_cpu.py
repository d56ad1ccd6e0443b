"""Reading the processor, from made-up ``/proc`` and ``/sys`` folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kiln.backends import cpu

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu sse avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile nonsense

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_name_and_flags(tmp_path: Path) -> None:
    found = cpu.describe_cpu(write(tmp_path, {"proc/cpuinfo": XEON}))
    assert found.name == "Intel(R) Xeon(R) Platinum 8481C"
    assert found.flags == ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def test_arm(tmp_path: Path) -> None:
    found = cpu.describe_cpu(
        write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd bf16 sve\n"})
    )
    assert found.flags == ("asimd", "bf16", "sve")
    assert found.name


def test_without_proc(tmp_path: Path) -> None:
    found = cpu.describe_cpu(tmp_path)
    assert found.name
    assert found.flags == ()
    assert found.threads >= 1


def test_this_machine() -> None:
    found = cpu.describe_cpu()
    assert found.name
    assert 1 <= found.cores <= found.threads <= (os.cpu_count() or 1)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 0.2, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 16, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "rubbish\n"}, None, 8),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            2,
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/y\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            4,
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            8,
        ),
    ],
    ids=["none", "max", "2.5", "0.2", "large", "rubbish", "parent", "v1", "v1 none"],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None, threads: int) -> None:
    root = write(tmp_path, files)
    assert cpu.cgroup_quota(root) == quota
    assert cpu.usable_threads(root) == threads


@pytest.mark.usefixtures("eight_cpus")
def test_hyperthreads_count_once(tmp_path: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n"
        for n in range(8)
    }
    root = write(tmp_path, siblings)
    assert (cpu.usable_threads(root), cpu.usable_cores(root)) == (8, 4)


def test_limited_by_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert cpu.threads_are_limited(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert not cpu.threads_are_limited(tmp_path)
