"""Run components with ONNX Runtime's CUDA provider on an NVIDIA GPU.

Precision is a property of the graph: fp16 and bf16 are lowerings. What is left to the provider is said here,
so that the same options mean the same everywhere: TF32 off in fp32, because it keeps 10 bits of 23.
"""

from __future__ import annotations

from typing import Any

from ..errors import SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .feeds import check_options
from .onnxruntime_binding import BoundSession
from .onnxruntime_nvidia import (
    DRIVER,
    KIND,
    list_devices,
    missing_libraries,
    require,
    resolve,
)
from .onnxruntime_readback import INDEX_OPERATORS
from .onnxruntime_session import Plan, all_shapes_fixed, open_session, require_fixed_shapes
from .onnxruntime_wheel import Needs

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
NEEDS = Needs(PROVIDER, "onnxruntime-gpu", "cuda", "libonnxruntime_providers_cuda.so", DRIVER)

# The provider takes GroupNormalization and Gelu apart node by node; its own fused operators run instead. They
# have no bf16 form, which is why bf16 gets primitives.
_LOWERINGS = {
    "fp32": ("static", "ort_fused"),
    "fp16": ("static", "ort_fused", "fp16"),
    "bf16": ("static", "opset22", "bf16"),
}


class CUDABackend:
    """ONNX Runtime on NVIDIA."""

    name = NAME

    def probe(self) -> Availability:
        """Whether onnxruntime-gpu and NVIDIA's driver are here; the engine is not imported."""
        return NEEDS.probe()

    def devices(self) -> tuple[Device, ...]:
        """``cuda:0``, ``cuda:1``, ... as the driver lists them."""
        return list_devices(NEEDS)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> BoundSession:
        """Load one component onto the GPU.

        ``options.extra`` holds further provider options by name, e.g. ``{"gpu_mem_limit": 8 << 30}``.

        Raises:
            BackendUnavailable: wheel, libraries, driver or the GPU asked for are not there.
            SessionError: the graph or an option is refused, an option is not in force, or an operator that
                computes would run on the processor.
        """
        check_options(source.component, options)
        module, gpu = require(NEEDS, options.device)
        fixed = all_shapes_fixed(source, options)
        precision = (
            "fp32" if options.precision == "auto" and not fixed else resolve(NAME, source, options, gpu)
        )
        if precision != "fp32":  # only a graph of fixed shapes can be lowered
            require_fixed_shapes(NAME, source, options)
        plan = Plan(
            NAME,
            PROVIDER,
            f"{KIND}:{gpu.index}",
            precision,
            provider_options(source, options, gpu.index),
            lowerings=_LOWERINGS[precision] if fixed else (),
            elsewhere=INDEX_OPERATORS,
            settings={"gpu": gpu.name, "compute_capability": gpu.arch, "driver": gpu.driver},
            why_missing=lambda: missing_libraries(module),
        )
        opened = open_session(module, source, options, plan)
        if options.precision == "fp32" and opened.in_force.settings["use_tf32"] not in ("0", "false"):
            raise SessionError("fp32 was asked for, but use_tf32 is on, which computes in 19 bits")
        return BoundSession(module, source, opened, KIND, gpu.index)


def provider_options(source: GraphSource, options: PrepareOptions, index: int) -> dict[str, str]:
    """The options of the provider, none left to a default.

    * ``enable_cuda_graph``: the UNet runs many times with one shape, and a graph saves a launch for each of
      its some thousand kernels. It needs fixed shapes and buffers; the other components run once.
    * ``cudnn_conv_algo_search``: EXHAUSTIVE measures each convolution once for each shape, which only many
      runs pay back.
    * ``arena_extend_strategy``: the default doubles each block and reserves gigabytes that nobody uses.
    * ``prefer_nhwc``: the layout that tensor cores and the fused operators read.
    * ``enable_skip_layer_norm_strict_mode``: statistics in fp32, which the fused operator else sums in fp16.
    """
    repeated = source.component == "unet" and all_shapes_fixed(source, options)
    given: dict[str, Any] = {
        "device_id": index,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE" if repeated else "HEURISTIC",
        "cudnn_conv_use_max_workspace": 1,
        "do_copy_in_default_stream": 1,
        "enable_cuda_graph": int(repeated),
        "enable_skip_layer_norm_strict_mode": 1,
        "prefer_nhwc": 1,
        "use_tf32": 0,
    }
    return {name: str(value) for name, value in (given | dict(options.extra)).items()}
