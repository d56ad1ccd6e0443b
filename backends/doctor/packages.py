"""The onnxruntime distributions: which there are, what each should bring, and whose files lie there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .system import Distribution, System, version_tuple

CPU = "CPUExecutionProvider"

# What each classic distribution brings. They all install into the same folder ``onnxruntime``.
EXPECTED: dict[str, tuple[str, ...]] = {
    "onnxruntime": (CPU,),
    "onnxruntime-gpu": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
    "onnxruntime-migraphx": ("MIGraphXExecutionProvider", CPU),
    "onnxruntime-rocm": ("ROCMExecutionProvider", CPU),
    "onnxruntime-openvino": ("OpenVINOExecutionProvider", CPU),
    "onnxruntime-webgpu": ("WebGpuExecutionProvider", CPU),
    "onnxruntime-directml": ("DmlExecutionProvider", CPU),
    "onnxruntime-qnn": ("QNNExecutionProvider", CPU),
    "onnxruntime-training": (CPU,),
}

# Kiln's backend for each provider.
BACKENDS = {
    CPU: "onnxruntime",
    "CUDAExecutionProvider": "onnxruntime-cuda",
    "TensorrtExecutionProvider": "onnxruntime-tensorrt",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "WebGpuExecutionProvider": "onnxruntime-webgpu",
}

# The library of each provider that is one, in onnxruntime/capi.
LIBRARIES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
    "MIGraphXExecutionProvider": "libonnxruntime_providers_migraphx.so",
    "ROCMExecutionProvider": "libonnxruntime_providers_rocm.so",
    "OpenVINOExecutionProvider": "libonnxruntime_providers_openvino.so",
}

# Names that are taken on the index but hold nothing, with the version that does; a later one may be real.
PLACEHOLDERS = {
    "migraphx": (0, 0, 1),
    "onnxruntime-ep-migraphx": (0, 0, 0),
    "onnxruntime-ep-amdgpu": (0, 0, 0),
}


@dataclass(frozen=True)
class Wheel:
    """One classic onnxruntime distribution and the folder its files are in."""

    distribution: Distribution

    @property
    def capi(self) -> Path:
        """Where its libraries are."""
        return self.distribution.folder / "onnxruntime/capi"

    @property
    def owner(self) -> str:
        """Whose files lie in the folder: of several distributions, the one installed last."""
        return self._info("package_name") or self.distribution.name

    @property
    def cuda_major(self) -> int:
        """The CUDA it was built for: what it says of itself, else by its version (13 since 1.27.0)."""
        said = version_tuple(self._info("cuda_version"))
        return said[0] if said else 13 if version_tuple(self.distribution.version) >= (1, 27) else 12

    def sonames(self, provider: str, library: str) -> list[str]:
        """Which version of a library a provider is linked to: ``["libnvinfer.so.10"]``, from its bytes."""
        return sorted(set(_strings(self.capi / LIBRARIES[provider], rf"{re.escape(library)}\.so\.\d+")))

    @property
    def rocm(self) -> str:
        """The ROCm a MIGraphX or ROCm wheel looks for first, from its search path (RUNPATH)."""
        for provider in ("MIGraphXExecutionProvider", "ROCMExecutionProvider"):
            for found in _strings(self.capi / LIBRARIES[provider], r"/opt/rocm-[\d.]+\d(?=/lib)"):
                return found.removeprefix("/opt/rocm-")
        return ""

    def _info(self, name: str) -> str:
        try:
            text = (self.capi / "build_and_package_info.py").read_text(errors="replace")
        except OSError:
            return ""
        found = re.search(rf"^{name}\s*=\s*['\"]([^'\"]*)", text, re.MULTILINE)
        return found.group(1) if found else ""


def wheels(system: System) -> list[Wheel]:
    """All classic onnxruntime distributions; more than one is a mistake."""
    return [Wheel(found) for found in system.distributions if found.name in EXPECTED]


def wheel(system: System, *names: str) -> Wheel | None:
    """The first of the named distributions that is installed."""
    found = system.distribution(*names)
    return Wheel(found) if found else None


def _strings(path: Path, pattern: str) -> list[str]:
    try:
        data = path.read_bytes() if path.stat().st_size < 2**26 else b""
    except OSError:
        return []
    return [found.group().decode() for found in re.finditer(pattern.encode(), data)]
