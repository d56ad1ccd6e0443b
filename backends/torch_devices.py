"""The devices torch sees, under the ids that users type: cpu, cuda, cuda:1, rocm, rocm:1.

CUDA and ROCm are one API in torch, called cuda; which of the two a build speaks is in ``torch.version.hip``.
A GPU that a build holds no kernels for is not offered: its first kernel would fail, or end the process.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendUnavailable
from .cpu import describe_cpu
from .doctor.amd_cards import card_of, gfx_of_override

log = logging.getLogger(__name__)

CPU = "cpu"


@dataclass(frozen=True)
class TorchDevice:
    """One device: Kiln's id, torch's own index, what it is, and why it cannot be used if so."""

    id: str
    kind: str
    index: int
    name: str
    arch: str
    precisions: tuple[str, ...]
    missing: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether it is reached through ``torch.cuda``."""
        return self.kind != CPU


def list_devices(torch: Any) -> tuple[TorchDevice, ...]:
    """All devices, the GPUs first and the processor last; GPUs without kernels carry the reason."""
    found: list[TorchDevice] = []
    if not why_no_gpu(torch):
        kind = gpu_kind(torch)
        found = [_gpu(torch, kind, index) for index in range(torch.cuda.device_count())]
    # Half precision on a processor: bf16 runs everywhere, fp16 only where oneDNN has it. Elsewhere torch
    # gives right numbers some two hundred times slower than fp32.
    half = ("bf16", "fp16") if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ("bf16",)
    return (*found, TorchDevice(CPU, CPU, 0, describe_cpu().name, "", ("fp32", *half)))


def choose_device(torch: Any, asked: str) -> tuple[TorchDevice, str]:
    """The device asked for, and what was passed over on the way to it.

    ``auto`` is the first GPU that this build of torch has kernels for, else the processor. Its choice is
    told by the second value, by a warning in the log, and by ``InForce.device``.

    Raises:
        BackendUnavailable: there is no such device, or this build of torch holds no kernels for it.
    """
    devices = list_devices(torch)
    if asked.lower() == "auto":
        usable = next(device for device in devices if not device.missing)
        passed_over = "; ".join(f"{device.id}: {device.missing}" for device in devices if device.missing)
        if passed_over:
            log.warning("torch runs on %s, because %s", usable.id, passed_over)
        return usable, passed_over
    wanted = re.sub(r":0$", "", asked.lower())
    for device in devices:
        if device.id == wanted:
            if device.missing:
                raise BackendUnavailable(f"torch cannot run on {device.id}: {device.missing}")
            return device, ""
    raise BackendUnavailable(_no_such_device(torch, asked, devices))


def native_device(torch: Any, device: TorchDevice) -> Any:
    """The ``torch.device`` of a device."""
    return torch.device("cuda", device.index) if device.is_gpu else torch.device(CPU)


def gpu_kind(torch: Any) -> str:
    """``rocm`` or ``cuda``: what this build calls a GPU, whether there is one or not."""
    return "rocm" if torch.version.hip else "cuda"


def why_no_gpu(torch: Any) -> str:
    """Why torch sees no GPU, empty if it does. An old driver is told by a warning only, so that is read."""
    if not (torch.version.hip or torch.version.cuda):
        return f"torch {torch.__version__} is built without CUDA and ROCm; install a build for the GPU"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available() and torch.cuda.device_count():
                return ""
        except RuntimeError as error:
            return " ".join(str(error).split())
    if caught:
        return " ".join(str(caught[-1].message).split())
    what = (
        "no AMD GPU (see /dev/kfd and the group render)" if torch.version.hip else "no NVIDIA GPU or driver"
    )
    return f"torch {torch.__version__} finds {what}"


def why_no_kernels(arch: str, built_for: Sequence[str]) -> str:
    """Why a build cannot run on an architecture, empty if it can.

    Args:
        arch: ``gfx1100`` or ``sm_86``.
        built_for: ``torch.cuda.get_arch_list()``; empty when a build does not say.
    """
    if not built_for or _covered(arch, built_for):
        return ""
    text = f"this build of torch has no kernels for {arch}, only for {', '.join(built_for)}"
    if not arch.startswith("gfx"):
        return f"{text}; install a build of torch for this GPU"
    if os.environ.get("HSA_OVERRIDE_GFX_VERSION"):
        return f"{text}; HSA_OVERRIDE_GFX_VERSION={os.environ['HSA_OVERRIDE_GFX_VERSION']} is set: unset it"
    card = card_of(arch)
    if card is not None and card.override and gfx_of_override(card.override) in built_for:
        return f"{text}; install a build for {arch}, or try HSA_OVERRIDE_GFX_VERSION={card.override}"
    return f"{text}; install a build of torch for {arch}"


def _covered(arch: str, built_for: Sequence[str]) -> bool:
    """AMD: the same name, features aside. NVIDIA: binaries run on later minor versions of their own
    major version, PTX (``compute_``) on everything later; a letter binds to one architecture, f to a family
    (CUDA C++ programming guide, section on compute capabilities).
    """
    if arch.startswith("gfx"):
        return arch in {name.split(":")[0] for name in built_for}
    major, minor = _capability(arch)
    for name in built_for:
        kind, _, digits = name.partition("_")
        have = _capability(name)
        if digits[-1:] == "a":
            fits = have == (major, minor)
        elif kind == "compute" and digits[-1:] != "f":
            fits = have <= (major, minor)
        else:
            fits = have[0] == major and have[1] <= minor
        if fits:
            return True
    return False


def _capability(arch: str) -> tuple[int, int]:
    digits = re.sub(r"\D", "", arch)
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def _gpu(torch: Any, kind: str, index: int) -> TorchDevice:
    facts = torch.cuda.get_device_properties(index)
    amd = kind == "rocm"
    arch = str(facts.gcnArchName).split(":")[0] if amd else f"sm_{facts.major}{facts.minor}"
    with torch.cuda.device(index):
        # Emulated bf16 is slower than fp32, and nobody who asks for bf16 wants that.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = ("fp16", "bf16", "fp32") if has_bf16 else ("fp16", "fp32")
    missing = why_no_kernels(arch, torch.cuda.get_arch_list())
    return TorchDevice(
        f"{kind}:{index}" if index else kind, kind, index, str(facts.name), arch, precisions, missing
    )


def _no_such_device(torch: Any, asked: str, devices: Sequence[TorchDevice]) -> str:
    seen = ", ".join(device.id for device in devices)
    text = f"the torch backend has no device {asked!r}; it has: {seen}"
    family = asked.lower().partition(":")[0]
    if family not in ("cuda", "rocm"):
        return text
    if why := why_no_gpu(torch):
        return f"{text} ({why})"
    if family != gpu_kind(torch):
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{text} (torch {torch.__version__} is built for {build})"
    return text
