"""What a measurement was made on: processor, memory, kernel, versions, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..backends.cpu import describe_cpu

# Distributions whose version can change a figure.
PACKAGES = (
    "diffusers",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "optimum-intel",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Machine:
    """Facts about the machine; no host name, no user, no serial number.

    ``memory_bytes`` is None where the kernel does not say. ``versions`` are those of this Python,
    without packages that are not installed. ``commit`` is the checkout's, with ``+`` when it has changes.
    """

    cpu: str
    flags: tuple[str, ...]
    threads: int
    cores: int
    memory_bytes: int | None
    system: str
    python: str
    kiln: str
    versions: dict[str, str]
    commit: str | None


def describe_machine(root: Path = Path("/")) -> Machine:
    """Read the facts; ``root`` is where ``proc`` and ``sys`` lie, another folder for tests."""
    cpu = describe_cpu(root)
    return Machine(
        cpu=cpu.name,
        flags=cpu.flags,
        threads=cpu.threads,
        cores=cpu.cores,
        memory_bytes=_memory(root),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        kiln=__version__,
        versions=versions(),
        commit=_commit(),
    )


def load_average() -> float | None:
    """Runnable processes on average over the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Installed versions of ``PACKAGES`` in this Python."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _memory(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
