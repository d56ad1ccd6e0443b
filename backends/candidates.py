"""What ``auto`` chooses among: a backend on a device, and whether it could be the faster one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import registry
from .base import Backend, Device
from .isolation.policy import with_isolation

_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
# Engines whose graphics device may be a part of the processor, and no faster than it.
_MAY_BE_INTEGRATED = ("openvino", "onnxruntime-openvino", "onnxruntime-webgpu")
# What the kernel shows where such a card is: cheaper to look at than to load an engine that takes seconds.
_NVIDIA, _AMD = ("dev/nvidiactl", "dev/dxg"), ("dev/kfd", "dev/dxg")
_NODES = {
    "torch:cuda": _NVIDIA,
    "torch:rocm": _AMD,
    "onnxruntime-cuda": _NVIDIA,
    "onnxruntime-tensorrt": _NVIDIA,
    "onnxruntime-migraphx": _AMD,
}
# Engines that compile for minutes, and again for each size: they are not measured unless asked to be.
_SLOW_TO_PREPARE = ("onnxruntime-tensorrt", "onnxruntime-migraphx")


@dataclass(frozen=True)
class Candidate:
    """A backend and a device of it, written like ``openvino`` or ``torch:cuda``; ``auto``: its own choice."""

    label: str
    name: str
    device: str
    isolate: str = "auto"

    @classmethod
    def parse(cls, label: str, isolate: str = "auto") -> Candidate:
        """The candidate of an entry of ``registry.AUTO_ORDER``, in a child process or not.

        Raises:
            UsageError: no such backend.
        """
        name, device = registry.parse_backend(label)
        return cls(label, name, device, isolate)

    @cached_property
    def backend(self) -> Backend:
        """The backend, whether its engine is there or not."""
        return with_isolation(registry.get_backend(self.name), self.device, self.isolate)

    @property
    def version(self) -> str:
        """The engine's version, empty when it is not there. Loads no engine."""
        found = self.backend.probe()
        return found.version if found.available else ""

    @property
    def device_found(self) -> Device | None:
        """The device it runs on: without one named, the first of the backend's. Loads the engine."""
        devices = self.backend.devices()
        if self.device == registry.AUTO:
            return devices[0] if devices else None
        wanted = self.device.lower()
        return next((d for d in devices if wanted in (d.id.lower(), d.id.lower().split(":")[0])), None)

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on a processor. Loads the engine."""
        device = self.device_found
        return device is None or _on_cpu(device)

    def why_unusable(self, root: Path = Path("/")) -> str:
        """Why it cannot be used, empty if it can. Loads the engine, unless there is no such card.

        Args:
            root: where ``dev`` lies; another folder for tests.
        """
        nodes = _NODES.get(self.label, _NODES.get(self.name, ()))
        if nodes and not any((root / node).exists() for node in nodes):
            return f"this machine has no such card: no {' and no '.join(f'/{node}' for node in nodes)}"
        reason = registry.why_unusable(self.backend)
        if not reason and self.device_found is None:
            seen = ", ".join(device.id for device in self.backend.devices())
            return f"it has no device {self.device}, only {seen}"
        return reason


def could_win(candidate: Candidate, first: Candidate, precision: str) -> bool:
    """Whether a candidate could be faster than the first of the documented order; loads both engines.

    It must run on the same kind of device, processor or other, unless the first one's card may be a part of
    the processor; and in the precision asked for or, where that is free, in a format no longer than the
    first one's: a processor with bf16 is several times faster in it than anything in fp32. An engine that
    compiles for minutes would have to win that back first.
    """
    if candidate.name in _SLOW_TO_PREPARE:
        return False
    device, leading = candidate.device_found, first.device_found
    if device is None or leading is None:
        return False
    same_kind = _on_cpu(device) == _on_cpu(leading) or first.name in _MAY_BE_INTEGRATED
    if precision != registry.AUTO:
        return same_kind and precision in device.precisions
    return same_kind and _bits(device) <= _bits(leading)


def _on_cpu(device: Device) -> bool:
    return device.id.lower().startswith("cpu")


def _bits(device: Device) -> int:
    """The length of the format a device computes in when it may choose, which is the first it names."""
    return _BITS.get(device.precisions[0], 32) if device.precisions else 32
