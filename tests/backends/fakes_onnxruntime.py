"""A stand-in for onnxruntime's builds with GPU providers, with the behaviour that was seen in the real ones.

It computes on the real processor provider. What it reproduces, and where that was seen:

* a provider whose libraries do not load is left out in silence (CUDA), or raises, which ``enable_fallback``
  turns into the processor with no more than a print (TensorRT, MIGraphX, WebGPU): 1.31.1, 1.27.1, 1.27.0;
* an unknown option raises ``Unknown provider option``, likewise turned into the processor; WebGPU ignores it
  and reports no options at all;
* operators that a provider lacks run on the processor, and only the assignment tells;
* the caches of TensorRT and MIGraphX know file name, names of values and shapes, and no weights;
* MIGraphX: environment variables override options; fp16 and bf16 together are both dropped; a shape that is
  not fixed is compiled at the run that brings it;
* a CUDA graph replays the addresses of its first runs, whatever is passed later.

As a plug-in of pytest (``-p fakes_onnxruntime``) it stands in for a whole run: test_onnxruntime_contract.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fake_ort_providers import CPU, Provider, default_providers
from fake_ort_session import FakeOptions, FakeSession, FakeValue


class FakeOnnxruntime:
    """What ``import onnxruntime`` gives; attributes that are not here are the real module's."""

    def __init__(self, real: Any, providers: dict[str, Provider] | None = None) -> None:
        self._real = real
        self.providers = providers or default_providers()
        self.plugged: list[str] = []
        self.compiled: list[str] = []  # one entry for each compilation: the key of the cache
        self.sessions: list[FakeSession] = []
        self.cuda_version = "13.0"
        self.OrtValue = FakeValue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return [*self.providers, CPU]

    def preload_dlls(self) -> None:
        print("libcublas.so.13 was not preloaded")  # the real one prints to standard output too

    def SessionOptions(self) -> FakeOptions:  # noqa: N802 - onnxruntime's name
        return FakeOptions(self._real.SessionOptions())

    def InferenceSession(self, *args: Any, **kwargs: Any) -> FakeSession:  # noqa: N802
        made = FakeSession(self, *args, **kwargs)
        self.sessions.append(made)
        return made

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if name in self.plugged:
            raise self._real.capi.onnxruntime_pybind11_state.Fail(
                f"EP library is already registered under {name}"
            )
        self.plugged.append(name)

    def get_ep_devices(self) -> list[Any]:
        intel = SimpleNamespace(type=SimpleNamespace(name="CPU"), vendor="Intel", metadata={})
        return [SimpleNamespace(ep_name=name, device=intel) for name in self.plugged]


def install(patch: Any, **known: Any) -> FakeOnnxruntime:
    """Put a stand-in and its wheel, drivers and GPUs in place of what is here.

    Args:
        patch: a ``pytest.MonkeyPatch``.
        known: of ``FakeOnnxruntime``.
    """
    from kiln.backends import onnxruntime_migraphx as migraphx
    from kiln.backends import onnxruntime_nvidia as nvidia
    from kiln.backends import onnxruntime_openvino as openvino
    from kiln.backends import onnxruntime_tensorrt as tensorrt
    from kiln.backends import onnxruntime_webgpu as webgpu
    from kiln.backends import onnxruntime_wheel as wheel
    from kiln.backends.onnxruntime_gpus import Gpu

    real = sys.modules.get("onnxruntime") or __import__("onnxruntime")
    fake = FakeOnnxruntime(getattr(real, "_real", real), **known)
    patch.setitem(sys.modules, "onnxruntime", fake)
    patch.setattr(wheel.Needs, "_wrong_wheel", lambda self: "")
    patch.setattr(wheel, "load_library", lambda name, folders=(): "")
    patch.setattr(
        nvidia, "nvidia_gpus", lambda: (Gpu(0, "Fake GPU", "9.0", "13.0"), Gpu(1, "Old", "6.1", "13.0"))
    )
    patch.setattr(tensorrt, "load_tensorrt", lambda: "")
    patch.setattr(migraphx, "amd_gpus", lambda: (Gpu(0, "AMD gfx1100", "gfx1100", "7.2.4"),))
    patch.setattr(webgpu, "_tried", [])
    patch.setattr(openvino, "_tried", [])
    plugin = SimpleNamespace(__spec__=object(), get_library_path=lambda: "libopenvino_plugin.so")
    patch.setitem(sys.modules, "onnxruntime_ep_openvino", plugin)
    patch.setattr(openvino.OpenVINOPluginBackend, "probe", lambda self: wheel.ENGINE.probe())
    patch.setattr(openvino.PLUGIN.__class__, "_version", _version(openvino.PLUGIN.__class__._version))
    for name in ("_plugin_devices", "_start"):
        for owner in (openvino, webgpu):
            getattr(getattr(owner, name, None), "cache_clear", lambda: None)()
    return fake


def _version(real: Any) -> Any:
    """The plug-in's version, whether or not it is installed."""
    return lambda self: "1.8.1" if self.module == "onnxruntime_ep_openvino" else real(self)


# Of the contract's own inputs: for backends that compile for fixed shapes, where it leaves them free.
SHAPES = {"sample": (2, 4, 8, 12), "timestep": (), "encoder_hidden_states": (2, 7, 32)}


def fill_shapes(prepare: Any) -> Any:
    """A ``prepare`` that fixes what the caller left free."""

    def filled(self: Any, source: Any, options: Any) -> Any:
        if source.component == "unet" and set(options.shapes) <= set(SHAPES):
            options = replace(options, shapes=SHAPES | dict(options.shapes))
        elif source.component == "vae_decoder":
            options = replace(options, shapes={"latent_sample": (2, 4, 8, 12)})
        return prepare(self, source, options)

    return filled


def pytest_configure(config: Any) -> None:
    """Stand in for a whole run of pytest."""
    import pytest

    from kiln.backends.onnxruntime_migraphx import MIGraphXBackend
    from kiln.backends.onnxruntime_tensorrt import TensorRTBackend
    from kiln.backends.onnxruntime_webgpu import WebGPUBackend

    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    install(patch)
    for backend in (MIGraphXBackend, TensorRTBackend, WebGPUBackend):
        patch.setattr(backend, "prepare", fill_shapes(backend.prepare))
