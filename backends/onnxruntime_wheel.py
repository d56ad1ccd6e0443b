"""Which onnxruntime is installed, and whether it brings a provider, found out without importing it.

All classic distributions (onnxruntime, onnxruntime-gpu, onnxruntime-migraphx, ...) install the same folder,
so an environment holds one of them, and the name of the folder says nothing about what is in it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import Availability
from .engine import Engine

# The distributions that install the folder ``onnxruntime``, the one with the fewest providers last.
CLASSIC = (
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-webgpu",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-training",
    "onnxruntime",
)
# The floor of all providers: 1.24 is the first to run ``Attention`` and to say which node runs where.
FLOOR = (1, 24)
ENGINE = Engine("onnxruntime", CLASSIC, FLOOR, "cpu")


@dataclass(frozen=True)
class Needs:
    """What has to be here before a provider can be asked for.

    Args:
        provider: ONNX Runtime's name of the provider.
        distribution: the distribution that brings it.
        extra: Kiln's extra that installs that.
        library: its file in ``onnxruntime/capi``, empty where the provider is inside the core library.
        drivers: shared libraries that come with the system and not with a wheel, with what to do without;
            a name without its version (``libamdhip64.so``) gets the one that ``library`` was linked to.
        folders: where they may lie without being on the search path.
    """

    provider: str
    distribution: str
    extra: str
    library: str = ""
    drivers: tuple[tuple[str, str], ...] = ()
    folders: tuple[str, ...] = ()

    @property
    def engine(self) -> Engine:
        """The package, with this provider's extra in its advice."""
        return Engine("onnxruntime", CLASSIC, FLOOR, self.extra)

    def probe(self) -> Availability:
        """Whether wheel and drivers are here; imports nothing, and loads no more than a driver library."""
        found = self.engine.probe()
        if not found.available:
            return found
        reason = self._wrong_wheel() or self._no_driver()
        return Availability(not reason, reason, found.version)

    def _wrong_wheel(self) -> str:
        installed = wheels()
        library = capi() / self.library
        if library.is_file() if self.library else self.distribution in dict(installed):
            return ""
        have = " and ".join(f"{name} {version}" for name, version in installed) or "an unknown build"
        remove = " ".join(name for name, _ in installed) or "onnxruntime"
        verb = "are" if len(installed) > 1 else "is"
        return (
            f"{have} {verb} installed, without {self.provider}; it comes with {self.distribution}, and an "
            f"environment holds one onnxruntime only: pip uninstall -y {remove} && {self.engine.advice}"
        )

    def _no_driver(self) -> str:
        for stem, advice in self.drivers:
            name = linked_name(capi() / self.library, stem) if stem.endswith(".so") else stem
            error = load_library(name, self.folders)
            if error:
                return f"{name} does not load ({error}): {advice}"
        return ""


def wheels(path: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Name and version of the classic distributions that are installed; two overwrite each other's files."""
    there = importlib.metadata.distributions(path=list(sys.path if path is None else path))
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"] or "").lower(): d.version for d in there}
    return [(name, found[name]) for name in CLASSIC if name in found]


def capi() -> Path:
    """The folder of ONNX Runtime's libraries, whether or not it exists."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else "onnxruntime") / "capi"


def linked_name(library: Path, stem: str) -> str:
    """The name under which a library asks for another: ``libamdhip64.so`` becomes ``libamdhip64.so.7``."""
    try:
        found = re.search(re.escape(stem.encode()) + rb"\.\d+", library.read_bytes())
    except OSError:
        return stem
    return found.group().decode() if found else stem


def load_library(name: str, folders: Iterable[str] = ()) -> str:
    """Load a shared library by name, or from one of the folders; why it does not load, empty if it does."""
    reason = ""
    for candidate in (name, *(os.path.join(folder, name) for folder in folders)):
        if os.sep in candidate and not os.path.exists(candidate):
            continue
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            reason = reason or str(error)
        else:
            return ""
    return reason
