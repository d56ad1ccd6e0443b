"""The GPUs of NVIDIA and AMD as their drivers list them, without an engine.

ONNX Runtime itself does not say which GPUs there are: ``get_ep_devices`` of 1.31 lists the processor only,
and its providers report a missing device when a session is made. Sources: the CUDA driver API
(``cuDeviceGetName``, attributes 75 and 76 are the compute capability), and ``/sys/class/kfd`` as the kernel's
amdgpu driver writes it.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailable

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256
TOPOLOGY = "sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class Gpu:
    """One GPU: its index in the engine's numbering, a readable name, what it is and with which driver.

    ``arch`` is the compute capability (``9.0``) or the gfx name (``gfx1100``).
    """

    index: int
    name: str
    arch: str
    driver: str

    @property
    def capability(self) -> tuple[int, ...]:
        """NVIDIA's compute capability as numbers, empty for others."""
        parts = self.arch.split(".")
        return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def nvidia_gpus(library: str = "libcuda.so.1") -> tuple[Gpu, ...]:
    """What the CUDA driver lists, in the order that ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises:
        BackendUnavailable: the driver is not there, does not start or offers no GPU.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise BackendUnavailable(f"{library} does not load ({error}): install NVIDIA's driver") from None
    count, version = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise BackendUnavailable(
            f"NVIDIA's driver offers no GPU (CUDA error {status}): look at nvidia-smi, CUDA_VISIBLE_DEVICES, "
            "and in a container at --gpus"
        )
    driver.cuDriverGetVersion(ctypes.byref(version))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return tuple(_nvidia(driver, index, text) for index in range(count.value))


def _nvidia(driver: ctypes.CDLL, index: int, version: str) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    return Gpu(index, name.value.decode(errors="replace"), ".".join(numbers), version)


def amd_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """What the kernel's compute driver lists; processors are nodes there too and are left out.

    Args:
        root: where ``sys``, ``dev`` and ``opt`` lie; another folder for tests.

    Raises:
        BackendUnavailable: the driver is not loaded, this user may not use it, or it lists no GPU.
    """
    kfd = root / "dev/kfd"
    if not kfd.exists():
        raise BackendUnavailable(
            "there is no /dev/kfd: the amdgpu driver is not loaded, or a container was started without "
            "--device=/dev/kfd --device=/dev/dri; kiln doctor says more"
        )
    if not os.access(kfd, os.R_OK | os.W_OK):
        raise BackendUnavailable(
            "this user may not open /dev/kfd: sudo usermod -aG render,video $USER, then log in again"
        )
    version = _text(root / "opt/rocm/.info/version")
    found: list[Gpu] = []
    for node in sorted((root / TOPOLOGY).glob("*"), key=lambda path: (len(path.name), path.name)):
        lines = (line.split() for line in _text(node / "properties").splitlines())
        target = int(dict(line for line in lines if len(line) == 2).get("gfx_target_version", "0"))
        if target:
            gfx = f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"
            found.append(Gpu(len(found), f"AMD {gfx}", gfx, version))
    if not found:
        raise BackendUnavailable("the amdgpu driver lists no GPU that computes; kiln doctor says more")
    return tuple(found)


def choose(backend: str, kind: str, gpus: tuple[Gpu, ...], asked: str) -> Gpu:
    """The GPU of an id: ``auto`` and ``cuda`` are the first one, ``cuda:1`` the second.

    Raises:
        BackendUnavailable: there is no such GPU; the text lists those there are.
    """
    ids = {f"{kind}:{gpu.index}": gpu for gpu in gpus}
    wanted = asked.lower()
    if wanted in ("auto", kind):
        return gpus[0]
    if wanted not in ids:
        raise BackendUnavailable(f"the {backend} backend has no device {asked!r}; it has: {', '.join(ids)}")
    return ids[wanted]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
