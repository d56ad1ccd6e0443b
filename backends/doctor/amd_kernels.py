"""For which GPUs the installed ROCm libraries hold compiled kernels, read from file names.

rocBLAS keeps one file per GPU, ``TensileLibrary_lazy_gfx1030.dat``; whatever package brings rocBLAS, its
list of files says what the package was built for. (An error message of rocBLAS lists the same names when the
GPU's is missing.) Nothing is imported here; a torch that keeps its kernels elsewhere is asked in a child.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .system import System, version_tuple

_NAME = re.compile(r"gfx[0-9a-f]{3,5}(?=[^0-9a-f]|$)")
_SYSTEM_FOLDERS = ("/opt/rocm/lib/rocblas/library", "/opt/rocm/core/lib/rocblas/library")


@dataclass(frozen=True)
class Kernels:
    """One package with ROCm's libraries: its name, where they lie, and the gfx names it has code for."""

    package: str
    folder: str
    gfx: frozenset[str]


@dataclass(frozen=True)
class TorchBuild:
    """What ``torch/version.py`` says: version, and the ROCm or CUDA it was built for, empty for neither."""

    version: str
    hip: str
    cuda: str
    path: Path

    @property
    def kind(self) -> str:
        """``ROCm 7.2``, ``CUDA 13.0`` or ``CPU only``."""
        return f"ROCm {self.hip}" if self.hip else f"CUDA {self.cuda}" if self.cuda else "CPU only"


def torch_build(system: System) -> TorchBuild | None:
    """How the installed torch was built, without importing it; None if there is none."""
    found = system.distribution("torch")
    if found is None:
        return None
    path = found.folder / "torch/version.py"
    try:
        text = path.read_text(errors="replace")
    except OSError:
        text = ""
    hip, cuda = (_assigned(text, name) for name in ("hip", "cuda"))
    if not text:  # the version says it as well: 2.13.0+rocm7.2, 2.13.0+cu130
        local = found.version.partition("+")[2]
        hip = local.removeprefix("rocm") if local.startswith("rocm") else ""
        cuda = f"{local[2:-1]}.{local[-1]}" if re.fullmatch(r"cu\d{3}", local) else ""
    return TorchBuild(found.version, hip, cuda, path)


def _assigned(text: str, name: str) -> str:
    found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
    return found.group(1) if found else ""


def torch_kernels(system: System) -> Kernels | None:
    """What torch brings kernels for: in its own folder, or in the ROCm packages of AMD's wheels."""
    build = torch_build(system)
    if build is None or not build.hip:
        return None
    site = build.path.parent.parent
    folders = [site / "torch/lib/rocblas/library"]
    folders += sorted(site.glob("_rocm_sdk_*/lib/rocblas/library"))
    names: set[str] = set()
    for folder in folders:
        names |= _names(folder)
    # AMD's wheels for several GPUs come in parts, named after the GPU: amd-torch-device-gfx1100.
    names |= {n for d in system.distributions if d.folder == site for n in _NAME.findall(d.name)}
    where = str(folders[0])
    if not names and system.ask is not None:
        answer = system.ask(("torch-list",))
        kernels = answer.value.get("kernels")
        names = {str(n) for n in kernels if str(n).startswith("gfx")} if isinstance(kernels, list) else set()
        where = "torch's own list"
    return Kernels(f"torch {build.version}", where, frozenset(names)) if names else None


def system_kernels(system: System) -> Kernels | None:
    """What the ROCm of the system brings kernels for, which is what MIGraphX uses."""
    versioned = [f"{name}/lib/rocblas/library" for name in _rocm_folders(system)]
    for folder in (*_SYSTEM_FOLDERS, *reversed(versioned)):
        names = _names(system.path(folder))
        if names:
            return Kernels(f"ROCm {rocm_version(system)}".rstrip(), folder, frozenset(names))
    return None


def rocm_version(system: System) -> str:
    """The version of the ROCm below ``/opt``, empty if there is none."""
    for folder in (*_rocm_folders(system), "/opt/rocm/core"):
        text = system.read(f"{folder}/.info/version") or folder.partition("rocm-")[2]
        if version_tuple(text):
            return text.partition("-")[0]
    return ""


def _rocm_folders(system: System) -> list[str]:
    """``/opt/rocm``, which leads to the one in use, then those with a version in their names."""
    top = "/opt"
    return [f"{top}/{name}" for name in system.names(top) if re.fullmatch(r"rocm(-[\d.]+)?", name)]


def _names(folder: Path) -> set[str]:
    try:
        return {name for entry in folder.iterdir() for name in _NAME.findall(entry.name)}
    except OSError:
        return set()
