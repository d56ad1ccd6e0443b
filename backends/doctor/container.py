"""Whether this is a container or WSL, where devices come from outside."""

from __future__ import annotations

import re

from .finding import Finding, absent, ok, warning
from .system import System

DXG = "/dev/dxg"
_WSL_CUDA = "/usr/lib/wsl/lib/libcuda.so.1"


def container_kind(system: System) -> str:
    """What says that this is a container, empty if nothing does."""
    for marker in ("/.dockerenv", "/run/.containerenv"):
        if system.exists(marker):
            return f"{marker} exists"
    found = re.search(r"docker|kubepods|libpod|containerd|lxc", system.read("/proc/1/cgroup"))
    if found:
        return f"/proc/1/cgroup names {found.group()}"
    kind = system.environment.get("container", "")
    return f"container={kind}" if kind else ""


def is_wsl(system: System) -> bool:
    """Whether this is Linux under Windows."""
    return "microsoft" in system.read("/proc/version").lower() or system.node(DXG) is not None


def check_container(system: System) -> list[Finding]:
    """D-CONTAINER: container or not."""
    kind = container_kind(system)
    return (
        [ok("D-CONTAINER", "this is a container", kind)] if kind else [absent("D-CONTAINER", "no container")]
    )


def check_wsl(system: System) -> list[Finding]:
    """D-WSL: under Windows the GPU is reached through /dev/dxg, and AMD's and Intel's checks see nothing."""
    if not is_wsl(system):
        return [absent("D-WSL", "this is not WSL")]
    if system.node(DXG) is None:
        text = "WSL without a GPU: version 1, or an old kernel"
        return [warning("D-WSL", text, [f"{DXG} is missing"], ["wsl.exe --update", "wsl.exe --shutdown"])]
    if system.exists(_WSL_CUDA):
        return [ok("D-WSL", "WSL with an NVIDIA GPU of Windows", f"{DXG} is there", f"{_WSL_CUDA} is there")]
    text = "WSL with a GPU, but no CUDA library of a Windows driver"
    fix = [
        "NVIDIA: install the current driver on Windows, none inside WSL, then: wsl.exe --shutdown.",
        "AMD: Kiln has not been tried under WSL; AMD has its own pages on ROCm for WSL.",
    ]
    return [warning("D-WSL", text, [f"{DXG} is there", f"{_WSL_CUDA} is missing"], fix)]
