"""Which backends run in a child process when nobody says otherwise, and the seam to ask for it.

The seam: a caller that chose a backend and a device passes both through ``with_isolation`` and uses what
comes back like any other backend. It is meant for an option ``isolate`` with the values of ``ISOLATE``.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ...errors import UsageError
from ..base import Backend
from .backend import IsolatedBackend
from .target import target_of

ISOLATE = ("auto", "always", "never")

# HIP ends a process on a GPU hang (immich#28444, immich#30082), and what is lost then is the user's program.
_ALWAYS = ("onnxruntime-migraphx",)
_TORCH = "torch"


def isolated_by_default(backend_name: str, device: str = "auto", root: Path = Path("/")) -> bool:
    """Whether ``isolate="auto"`` runs a backend in a child process: MIGraphX, and torch on ROCm.

    Args:
        backend_name: as registered.
        device: as the user gave it; ``auto`` of a torch built for ROCm counts when there is a GPU driver.
        root: where ``dev`` lies; another folder for tests.
    """
    if backend_name in _ALWAYS:
        return True
    if backend_name != _TORCH:
        return False
    if device.lower().startswith("rocm"):
        return True
    return device.lower() == "auto" and (root / "dev/kfd").exists() and torch_is_built_for_rocm()


def with_isolation(backend: Backend, device: str = "auto", isolate: str = "auto") -> Backend:
    """The backend, in a child process if it should be.

    Args:
        backend: from the registry.
        device: as the user gave it.
        isolate: ``always``, ``never``, or ``auto`` for ``isolated_by_default``.

    Raises:
        UsageError: another value of ``isolate``.
    """
    if isolate not in ISOLATE:
        raise UsageError(f"isolate is one of {', '.join(ISOLATE)}; got {isolate!r}")
    wanted = isolate == "always" or (isolate == "auto" and isolated_by_default(backend.name, device))
    if not wanted or isinstance(backend, IsolatedBackend):
        return backend
    return IsolatedBackend(backend.name, target=target_of(backend))


def torch_is_built_for_rocm() -> bool:
    """Read it from torch's version file, because importing torch takes seconds and starts the driver."""
    try:
        found = importlib.util.find_spec(_TORCH)
    except (ImportError, ValueError):
        return False
    if found is None or not found.origin:
        return False
    try:
        text = Path(found.origin).with_name("version.py").read_text()
    except OSError:
        return False
    return re.search(r"^hip\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None
