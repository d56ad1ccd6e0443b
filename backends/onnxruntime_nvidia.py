"""What the CUDA and the TensorRT adapter share: libraries, devices, precisions."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType

from ..errors import BackendUnavailable, SessionError
from .base import Device, GraphSource, PrepareOptions
from .onnxruntime_gpus import Gpu, choose, nvidia_gpus
from .onnxruntime_wheel import Needs, load_library

KIND = "cuda"
DRIVER = (("libcuda.so.1", "install NVIDIA's driver; in a container start it with --gpus all"),)
# Tensor cores for fp16 came with compute capability 7.0, for bf16 with 8.0.
_FP16_SINCE, _BF16_SINCE = (7, 0), (8, 0)
_PRECISIONS = ("fp32", "fp16", "bf16")


def list_devices(needs: Needs) -> tuple[Device, ...]:
    """The GPUs, or nothing when wheel or driver is missing."""
    try:
        needs.engine.load()
        gpus = nvidia_gpus() if needs.probe().available else ()
    except BackendUnavailable:
        return ()
    return tuple(Device(f"{KIND}:{gpu.index}", gpu.name, precisions(gpu)) for gpu in gpus)


def require(needs: Needs, asked: str) -> tuple[ModuleType, Gpu]:
    """ONNX Runtime with CUDA's libraries loaded, and the GPU asked for.

    Raises:
        BackendUnavailable: one of them is not there.
    """
    found = needs.probe()
    if not found.available:
        raise BackendUnavailable(found.reason)
    module = needs.engine.load()
    gpu = choose(needs.provider, KIND, nvidia_gpus(), asked)
    if hasattr(module, "preload_dlls"):  # those of the nvidia-* wheels, which no search path leads to
        with contextlib.redirect_stdout(io.StringIO()):
            module.preload_dlls()
    return module, gpu


def precisions(gpu: Gpu) -> tuple[str, ...]:
    """What a GPU computes in at a gain, best first."""
    fast = (("fp16", _FP16_SINCE), ("bf16", _BF16_SINCE))
    return (*(name for name, since in fast if gpu.capability >= since), "fp32")


def resolve(backend: str, source: GraphSource, options: PrepareOptions, gpu: Gpu) -> str:
    """The precision to compute in; ``auto`` is fp16 where the GPU is made for it, fp32 for a VAE.

    The VAE of SDXL overflows in fp16, and a VAE runs once for an image, so nothing is lost there.

    Raises:
        SessionError: the GPU has no such precision.
    """
    possible = precisions(gpu)
    if options.precision == "auto":
        return "fp32" if source.component.startswith("vae") else possible[0]
    if options.precision not in possible:
        raise SessionError(
            f"the {backend} backend does not compute in {options.precision} on {gpu.name}; use auto or one "
            f"of {', '.join(possible)}"
        )
    return options.precision


def missing_libraries(module: ModuleType, *more: str) -> str:
    """Which of CUDA's libraries do not load, for the message when the provider was left out."""
    major = str(getattr(module, "cuda_version", "")).partition(".")[0] or "13"
    names = (f"libcublas.so.{major}", f"libcudart.so.{major}", "libcurand.so.10", "libcudnn.so.9", *more)
    missing = [name for name in names if load_library(name)]
    if not missing:
        return f"its libraries load; does the driver know CUDA {major}? kiln doctor says more"
    return f"{', '.join(missing)} do not load: pip install 'onnxruntime-gpu[cuda,cudnn]'"


def load_tensorrt() -> str:
    """Load TensorRT 10 from its wheel, or from where the system has it; why it does not load."""
    spec = importlib.util.find_spec("tensorrt_libs")
    folders = [str(Path(place)) for place in spec.submodule_search_locations or ()] if spec else []
    for name in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        reason = load_library(name, folders)
        if reason:
            return (
                f"{name} does not load ({reason}). The provider needs TensorRT 10 and not 11: "
                "pip install tensorrt-cu13==10.16.1.11"
            )
    return ""
