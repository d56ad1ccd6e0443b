"""Find a backend by name without importing an engine.

A backend is registered as ``"module:class"``; the module is imported when somebody asks for the backend,
and even then imports its engine only in ``devices`` and ``prepare``.
"""

from __future__ import annotations

import importlib
import re
from functools import cache

from ..errors import BackendUnavailable, UsageError
from .base import Availability, Backend

AUTO = "auto"

# The order in which ``auto`` tries: fastest first. TensorRT is for those who ask for it: compiling takes
# minutes, even for one image. OpenVINO as a plug-in adds nothing to ``openvino``.
AUTO_ORDER = (
    "onnxruntime-cuda",
    "torch:cuda",
    "torch:rocm",
    "onnxruntime-migraphx",
    "openvino",
    "onnxruntime-webgpu",
    "onnxruntime",
    "torch",
)

_BACKENDS: dict[str, str] = {}


def register(name: str, target: str) -> None:
    """Make a backend known.

    Args:
        name: what the user types: lower-case letters, digits and hyphens.
        target: ``"module:class"``; a module that begins with a dot lies in this package.

    Raises:
        UsageError: the name is taken, reserved or misspelt, or the target is not of that form.
    """
    if name == AUTO or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UsageError(
            f"{name!r} cannot name a backend: lower-case letters, digits and hyphens, and not 'auto'"
        )
    if name in _BACKENDS:
        raise UsageError(f"the backend {name!r} is already registered as {_BACKENDS[name]}, not {target}")
    if not re.fullmatch(r"\.?\w+(\.\w+)*:\w+", target):
        raise UsageError(f"{target!r} is no backend: expected 'module:class'")
    _BACKENDS[name] = target


register("null", ".null:NullBackend")
register("torch", ".torch_backend:TorchBackend")
register("openvino", ".openvino_backend:OpenVINOBackend")
register("onnxruntime", ".onnxruntime_cpu:ONNXRuntimeBackend")
register("onnxruntime-cuda", ".onnxruntime_cuda:CUDABackend")
register("onnxruntime-tensorrt", ".onnxruntime_tensorrt:TensorRTBackend")
register("onnxruntime-migraphx", ".onnxruntime_migraphx:MIGraphXBackend")
register("onnxruntime-openvino", ".onnxruntime_openvino:OpenVINOPluginBackend")
register("onnxruntime-webgpu", ".onnxruntime_webgpu:WebGPUBackend")


def names() -> tuple[str, ...]:
    """All registered names, in the order of registration."""
    return tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend of a name, whether its engine is there or not.

    Raises:
        UsageError: no such backend.
    """
    if name not in _BACKENDS:
        raise UsageError(f"there is no backend {name!r}; known are {', '.join((AUTO, *sorted(_BACKENDS)))}")
    return _instance(_BACKENDS[name])


def probe_all() -> dict[str, Availability]:
    """For each backend, whether it can be used here. Imports no engine."""
    return {name: get_backend(name).probe() for name in _BACKENDS}


def parse_backend(text: str) -> tuple[str, str]:
    """Split ``openvino:CPU`` into backend and device; without a device that is ``auto``.

    Raises:
        UsageError: unknown backend, an empty device, or a device given for ``auto``.
    """
    name, colon, device = text.partition(":")
    if name != AUTO:
        get_backend(name)
    if colon and (not device or name == AUTO):
        raise UsageError(f"{text!r} names no device of a backend; write for example openvino:CPU")
    return name, device or AUTO


def require_usable(backend: Backend) -> None:
    """Check that a backend can be used; one that is named is never replaced by another. Loads its engine.

    Raises:
        BackendUnavailable: it is not there, and why.
    """
    reason = why_unusable(backend)
    if reason:
        raise BackendUnavailable(f"the backend {backend.name} cannot be used: {reason}")


def why_unusable(backend: Backend) -> str:
    """Why a backend cannot be used, empty if it can. Loads its engine, to see that it works."""
    found = backend.probe()
    if found.available and not backend.devices():
        found = backend.probe()  # knows by now why the engine did not load
        return found.reason or "the engine loads but reports no device"
    return "" if found.available else found.reason


@cache
def _instance(target: str) -> Backend:
    module, _, name = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module, __package__), name)()
    return backend
