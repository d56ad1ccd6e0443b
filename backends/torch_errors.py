"""What CUDA and HIP say when they fail, with what to do about it.

Texts as torch prints them: ``HIP error: invalid device function`` (pytorch#164346), ``CUDA error: no kernel
image is available for execution on the device``, ``HIP out of memory. Tried to allocate ...`` (TheRock#1054).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError, BackendUnavailable, KilnError, SessionError
from .errors_map import engine_errors, one_line
from .torch_devices import TorchDevice, why_no_kernels

NAME = "torch"


@dataclass(frozen=True)
class Advice:
    """Marks in an engine's text (lower case), the error that stands for it, and what to do."""

    marks: tuple[str, ...]
    error: type[BackendError]
    text: str


_LOST = "the GPU's context is lost, so the process has to start again (a backend in a child process does)"
ADVICE = (
    Advice(
        ("out of memory", "alloc_failed", "hiperroroutofmemory"),
        SessionError,
        "use a smaller size or batch, --precision fp16, or close other programs that use the GPU",
    ),
    Advice(("invalid device function", "no kernel image", "invalid_isa"), BackendUnavailable, ""),
    Advice(
        ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address"),
        SessionError,
        _LOST,
    ),
    Advice(
        ("gpu hang", "launch timed out", "hsa_status_error", "ecc error"),
        SessionError,
        f"the GPU or its driver stopped; look into dmesg. {_LOST}",
    ),
    Advice(
        ("driver version is insufficient", "driver on your system is too old"),
        BackendUnavailable,
        "update the GPU's driver, or install a build of torch for an older toolkit",
    ),
    Advice(
        ("initialization error", "no hip gpus", "no cuda gpus", "invalid device ordinal"),
        BackendUnavailable,
        "look at kiln doctor: driver, permissions of /dev/kfd and /dev/dri, and *_VISIBLE_DEVICES",
    ),
    Advice(
        ("miopen",),
        SessionError,
        "MIOpen could not find or build a kernel; its cache (~/.cache/miopen) must be writable, "
        "and MIOPEN_FIND_MODE=2 makes it choose without measuring",
    ),
    Advice(
        ("c++ compiler", "invalidcxxcompiler"),
        SessionError,
        "torch.compile needs one (g++ or clang++) for a processor; install it or leave compile out",
    ),
    Advice(
        ("working triton", "triton installation"),
        SessionError,
        "torch.compile needs triton on a GPU; install it or leave compile out",
    ),
)


@contextmanager
def torch_errors(torch: Any, device: TorchDevice, action: str) -> Iterator[None]:
    """Map what torch raises inside, with advice where the text is known.

    Args:
        torch: the module, asked for the architectures it was built for.
        device: where it ran.
        action: what was being done, e.g. ``"running unet"``.

    Raises:
        BackendUnavailable: the device cannot run this build of torch.
        SessionError: everything else that torch raises.
    """
    with engine_errors(NAME, f"{action} on {device.id}"):
        try:
            yield
        except KilnError:
            raise
        except Exception as error:
            advice = advice_for(error) if device.is_gpu or _is_compiling(error) else None
            if advice is None:
                raise
            text = advice.text or _no_kernels(torch, device)
            raise advice.error(
                f"torch failed while {action} on {device.id} ({device.name}): {_first(error)}; {text}"
            ) from error


def advice_for(error: BaseException) -> Advice | None:
    """The entry for what an engine raised, None for a text that is not known."""
    text = str(error).lower()
    return next((advice for advice in ADVICE if any(mark in text for mark in advice.marks)), None)


def _is_compiling(error: BaseException) -> bool:
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))


def _first(error: BaseException) -> str:
    """What happened, without the pages that torch appends: for memory the sizes, else the first line."""
    text = one_line(error)
    for tail in (
        " Of the allocated memory",
        " CUDA kernel errors might",
        " HIP kernel errors might",
        " Search for",
    ):
        text = text.split(tail)[0]
    return text.rstrip(". ")


def _no_kernels(torch: Any, device: TorchDevice) -> str:
    built_for = torch.cuda.get_arch_list()
    known = why_no_kernels(device.arch, built_for)
    return known or (
        f"the GPU is {device.arch}, which this build of torch names among {', '.join(built_for)}; "
        "its libraries lack it all the same, so install another build, or unset HSA_OVERRIDE_GFX_VERSION"
    )
