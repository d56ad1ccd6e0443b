"""What a component computes in on torch: type, exactness of fp32, memory layout; and reading it back.

Sources: docs of ``torch.backends`` (fp32_precision), diffusers' StableDiffusionXLPipeline.upcast_vae,
pytorch#170947 (channels-last on ROCm pays on MI cards only).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import SessionError
from .base import GraphSource, PrepareOptions
from .torch_devices import TorchDevice

PRECISIONS = ("fp32", "bf16", "fp16")
# What ``PrepareOptions.extra`` may hold, with the types of the values.
EXTRA: dict[str, tuple[type, ...]] = {
    "compile": (bool, str),
    "channels_last": (bool,),
    "tf32": (bool,),
    "force_precision": (bool,),
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

_SD1_SCALING = 0.18215  # the VAE of SD1 and SD2, also diffusers' default
_CHANNELS_LAST_AMD = ("gfx90a", "gfx94", "gfx95")
# Variables that change what torch computes with, or how fast, behind the options.
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "MIOPEN_FIND_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_MIOPEN_SUGGEST_NHWC",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
)


@dataclass(frozen=True)
class Numerics:
    """How one component is computed.

    ``tf32``: whether GPUs may round products of fp32; ``compile_mode``: of torch.compile, empty for eager;
    ``why_wider``: why the precision is another than the one asked for, empty if it is not.
    """

    precision: str
    channels_last: bool
    tf32: bool
    compile_mode: str
    why_wider: str = ""


def choose_numerics(source: GraphSource, device: TorchDevice, options: PrepareOptions) -> Numerics:
    """Decide from what was asked, the device and the network.

    ``auto`` is fp32 on a processor and fp16 on a GPU. A VAE whose activations exceed fp16 (SDXL's) is
    computed in fp32 there, as diffusers does it, also when fp16 is asked for; ``extra["force_precision"]``
    overrules that, and allows fp16 on processors without it. fp32 is exact unless ``extra["tf32"]`` is set.

    Raises:
        SessionError: unknown precision or option, a precision that the device lacks, or torch.compile
            without all input shapes fixed.
    """
    extra = options.extra
    _check_extra(extra)
    if options.precision not in ("auto", *PRECISIONS):
        raise SessionError(
            f"the torch backend computes in auto, {', '.join(PRECISIONS)}; got {options.precision}"
        )
    precision = options.precision
    if precision == "auto":
        precision = "fp16" if device.is_gpu else "fp32"
    force = bool(extra.get("force_precision", False))
    if precision not in device.precisions and not force:
        slow = " (torch would take some two hundred times as long as in fp32)" if precision == "fp16" else ""
        raise SessionError(
            f"{device.id} ({device.name}) does not compute in {precision}{slow}; "
            f"use auto or one of {', '.join(device.precisions)}"
        )
    why = ""
    if precision == "fp16" and not force and overflows_fp16(source):
        precision, why = "fp32", "the activations of this VAE exceed fp16 (force_upcast in its config)"
    mode = _compile_mode(extra.get("compile", False))
    layout = bool(extra.get("channels_last", _suits_channels_last(source, device, precision)))
    return Numerics(precision, layout, bool(extra.get("tf32", False)), mode, why)


def overflows_fp16(source: GraphSource) -> bool:
    """Whether a VAE needs more range than fp16 has.

    ``force_upcast`` says so, but its default of true also stands for the VAEs of SD1 and SD2, which run in
    fp16 everywhere: these are told by their scaling factor.
    """
    config = source.config
    if not source.component.startswith("vae") or config.get("_class_name") != "AutoencoderKL":
        return False
    scaling = float(config.get("scaling_factor") or _SD1_SCALING)  # type: ignore[arg-type]
    return bool(config.get("force_upcast", True)) and abs(scaling - _SD1_SCALING) > 1e-6


@dataclass(frozen=True)
class _Switches:
    """How torch computes fp32: two older settings, and ``fp32_precision`` of ``_places``.

    An older setting is None where it contradicts the newer ones: torch refuses to tell it then.
    """

    cudnn_tf32: bool | None
    matmul: str | None
    precisions: tuple[str, ...]


_EXACT = _Switches(False, "highest", ("ieee",) * 5)
_TF32 = _Switches(True, "high", ("tf32",) * 4 + ("ieee",))


_lock = threading.Lock()
_users = 0
_saved: _Switches | None = None


@contextmanager
def exact_fp32(torch: Any, tf32: bool) -> Iterator[None]:
    """Compute fp32 in fp32 while inside, whatever the process has set, and give its settings back after.

    cuDNN's convolutions are TF32 by default, and ``torch.set_float32_matmul_precision`` reaches oneDNN too.
    The switches belong to the process: sessions that run at once in several threads share one change, so
    TF32 asked for by one of them waits until it is alone.
    """
    global _users, _saved
    with _lock:
        if not _users:
            _saved = _read(torch)
            _write(torch, _TF32 if tf32 else _EXACT)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _saved:
                _write(torch, _saved)


def read_back(torch: Any, module: Any, device: TorchDevice, numerics: Numerics) -> dict[str, object]:
    """What torch and the module say of themselves, for ``InForce.settings``; within ``exact_fp32``."""
    kernels = torch.backends.cuda
    found: dict[str, object] = {
        "device_name": device.name,
        "channels_last": _is_channels_last(torch, module),
        "attention": _attention(module),
        "compile": numerics.compile_mode or False,
        "mkldnn.matmul.fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,
        "mkldnn.conv.fp32_precision": torch.backends.mkldnn.conv.fp32_precision,
        "sdpa_math_in_reduced_precision": kernels.fp16_bf16_reduction_math_sdp_allowed(),
    }
    if device.is_gpu:
        found |= {
            "arch": device.arch,
            "toolkit": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
            "cuda.matmul.fp32_precision": kernels.matmul.fp32_precision,
            "cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "sdpa": ",".join(
                name
                for name in ("cudnn", "flash", "mem_efficient", "math")
                if getattr(kernels, f"{name}_sdp_enabled")()
            ),
        }
    if numerics.why_wider:
        found["fp32_because"] = numerics.why_wider
    return found | {f"env.{name}": os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def _places(torch: Any) -> tuple[Any, ...]:
    """The three of the GPU, then the two of oneDNN."""
    backends = torch.backends
    cudnn = backends.cudnn
    return backends.cuda.matmul, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv


def _read(torch: Any) -> _Switches:
    def older(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RuntimeError:  # somebody set the newer ones alone
            return None

    return _Switches(
        older(lambda: torch.backends.cudnn.allow_tf32),
        older(torch.get_float32_matmul_precision),
        tuple(place.fp32_precision for place in _places(torch)),
    )


def _write(torch: Any, wanted: _Switches) -> None:
    # The older ones first, because they set the newer ones along; left alone they would contradict these, and
    # whoever reads them then (torch's own compiler does) gets an exception.
    if wanted.cudnn_tf32 is not None:
        torch.backends.cudnn.allow_tf32 = wanted.cudnn_tf32
    if wanted.matmul is not None:
        torch.set_float32_matmul_precision(wanted.matmul)
    for place, precision in zip(_places(torch), wanted.precisions, strict=True):
        if place.fp32_precision != precision:
            place.fp32_precision = precision


def _check_extra(extra: Mapping[str, object]) -> None:
    for name, value in extra.items():
        if name not in EXTRA:
            raise SessionError(f"the torch backend has no option {name!r}; it has {', '.join(EXTRA)}")
        if not isinstance(value, EXTRA[name]):
            types = " or ".join(kind.__name__ for kind in EXTRA[name])
            raise SessionError(f"the option {name} of the torch backend takes {types}, got {value!r}")


def _compile_mode(asked: object) -> str:
    if isinstance(asked, bool):
        return "default" if asked else ""
    if asked not in COMPILE_MODES:
        raise SessionError(
            f"torch.compile has the modes {', '.join(COMPILE_MODES)} (or true and false), got {asked!r}"
        )
    return str(asked)


def _suits_channels_last(source: GraphSource, device: TorchDevice, precision: str) -> bool:
    """Tensor cores and oneDNN's bf16 convolve channels-last; fp32 stays as the reference is."""
    if source.component.startswith("text_encoder") or precision == "fp32":
        return False
    return device.kind != "rocm" or device.arch.startswith(_CHANNELS_LAST_AMD)


def _is_channels_last(torch: Any, module: Any) -> bool:
    """Of the first convolution that is wide enough for the two layouts to differ."""
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1 and parameter.shape[2:].numel() > 1:
            return bool(parameter.is_contiguous(memory_format=torch.channels_last))
    return False


def _attention(module: Any) -> str:
    """The classes that compute attention (diffusers), or the name transformers has for it."""
    if hasattr(module, "attn_processors"):
        kinds = {type(one).__name__ for one in module.attn_processors.values()}
        return ",".join(sorted(kinds)) or "none"
    return str(getattr(module.config, "_attn_implementation", "none"))
