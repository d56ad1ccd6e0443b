"""Run components with ONNX Runtime's TensorRT provider on an NVIDIA GPU, compiled for fixed shapes.

TensorRT 11 dropped weakly typed networks, so ``trt_fp16_enable`` and its like have no future: the graph is
typed. The provider of onnxruntime-gpu is linked to TensorRT 10 (libnvinfer.so.10).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .feeds import check_options
from .onnxruntime_binding import BoundSession
from .onnxruntime_engine_cache import key_facts, prepare_cached
from .onnxruntime_gpus import Gpu
from .onnxruntime_nvidia import (
    DRIVER,
    KIND,
    list_devices,
    load_tensorrt,
    missing_libraries,
    require,
    resolve,
)
from .onnxruntime_readback import INDEX_OPERATORS
from .onnxruntime_session import Plan, open_session, require_fixed_shapes
from .onnxruntime_wheel import Needs
from .session import CheckedSession

NAME = "onnxruntime-tensorrt"
PROVIDER = "TensorrtExecutionProvider"
NEEDS = Needs(PROVIDER, "onnxruntime-gpu", "tensorrt", "libonnxruntime_providers_tensorrt.so", DRIVER)

_PLAIN = ("static", "opset17")  # opset 17 has no convolution of bf16, so bf16 keeps the canonical operators
_LOWERINGS = {"fp32": _PLAIN, "fp16": (*_PLAIN, "fp16"), "bf16": ("static", "opset22", "bf16")}
# What makes a network weakly typed; TensorRT 11 has none of it, and the graph's own types say the same.
WEAK_TYPING = ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_layer_norm_fp32_fallback")


class TensorRTBackend:
    """ONNX Runtime with TensorRT."""

    name = NAME

    def probe(self) -> Availability:
        """Whether onnxruntime-gpu, NVIDIA's driver and TensorRT 10 are here; the engine is not imported."""
        found = NEEDS.probe()
        reason = found.reason or load_tensorrt()
        return Availability(not reason, reason, found.version)

    def devices(self) -> tuple[Device, ...]:
        """``cuda:0``, ``cuda:1``, ... as the driver lists them."""
        return list_devices(NEEDS) if self.probe().available else ()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> CheckedSession:
        """Compile one component, or load what was compiled before from ``options.cache_dir``.

        ``options.extra`` holds further provider options, e.g. ``{"trt_builder_optimization_level": 5}``.

        Raises:
            BackendUnavailable: wheel, TensorRT 10, driver or the GPU asked for are not there.
            SessionError: a shape is left free, the graph or an option is refused, an option is not in force,
                or operators that compute would run elsewhere.
        """
        check_options(source.component, options)
        _refuse_weak_typing(options)
        module, gpu = require(NEEDS, options.device)
        reason = load_tensorrt()
        if reason:
            raise BackendUnavailable(reason)
        precision = resolve(NAME, source, options, gpu)
        require_fixed_shapes(NAME, source, options)
        asked = provider_options(source, options, gpu.index, None)
        facts = key_facts(module, source, options, gpu, _LOWERINGS[precision], asked)

        def prepare(folder: Path | None) -> CheckedSession:
            plan = _plan(module, source, options, gpu, precision, folder)
            return BoundSession(module, source, open_session(module, source, options, plan), KIND, gpu.index)

        return prepare_cached(NAME, source, options, facts, prepare)


def _plan(
    module: ModuleType,
    source: GraphSource,
    options: PrepareOptions,
    gpu: Gpu,
    precision: str,
    folder: Path | None,
) -> Plan:
    return Plan(
        NAME,
        PROVIDER,
        f"{KIND}:{gpu.index}",
        precision,
        provider_options(source, options, gpu.index, folder),
        helpers=(("CUDAExecutionProvider", {"device_id": str(gpu.index), "use_tf32": "0"}),),
        lowerings=_LOWERINGS[precision],
        elsewhere=INDEX_OPERATORS,
        settings={"gpu": gpu.name, "compute_capability": gpu.arch, "driver": gpu.driver},
        why_missing=lambda: missing_libraries(module, "libnvinfer.so.10"),
    )


def provider_options(
    source: GraphSource, options: PrepareOptions, index: int, folder: Path | None
) -> dict[str, str]:
    """The options of the provider.

    ``trt_cuda_graph_enable`` is for what runs many times. Engine and timing cache share one folder, which
    belongs to this model alone; without a folder neither is kept. ``trt_builder_optimization_level`` 3 is
    TensorRT's own default, said so that the key of the cache holds it.
    """
    given: dict[str, Any] = {
        "device_id": index,
        "trt_cuda_graph_enable": int(source.component == "unet"),
        "trt_builder_optimization_level": 3,
        "trt_engine_cache_enable": int(folder is not None),
        "trt_timing_cache_enable": int(folder is not None),
    }
    if folder is not None:
        given |= {"trt_engine_cache_path": folder, "trt_timing_cache_path": folder}
    return {name: str(value) for name, value in (given | dict(options.extra)).items()}


def _refuse_weak_typing(options: PrepareOptions) -> None:
    named = [name for name in WEAK_TYPING if name in options.extra]
    if named:
        raise SessionError(
            f"{', '.join(named)} has gone with TensorRT 11: the graph is typed, so ask for a precision"
        )
