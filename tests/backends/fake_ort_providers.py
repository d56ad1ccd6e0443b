"""How the providers of onnxruntime behave: their options, what they report, and what they leave out."""

from __future__ import annotations

from dataclasses import dataclass, field

CPU = "CPUExecutionProvider"


@dataclass
class Provider:
    """How one provider behaves. ``missing`` is the text of the library that does not load."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    reports: bool = True
    strict: bool = True
    lacks: frozenset[str] = frozenset()
    missing: str = ""
    leaves_silently: bool = False
    drops: frozenset[str] = frozenset()
    cache_option: str = ""
    suffix: str = ""
    prefix: str = ""


def default_providers() -> dict[str, Provider]:
    cuda = {
        "device_id": "0",
        "gpu_mem_limit": "18446744073709551615",
        "arena_extend_strategy": "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "0",
        "enable_skip_layer_norm_strict_mode": "0",
        "prefer_nhwc": "0",
        "use_tf32": "1",
    }
    tensorrt = {
        "device_id": "0",
        "trt_fp16_enable": "0",
        "trt_cuda_graph_enable": "0",
        "trt_builder_optimization_level": "3",
        "trt_engine_cache_enable": "0",
        "trt_engine_cache_path": "",
        "trt_timing_cache_enable": "0",
        "trt_timing_cache_path": "",
    }
    migraphx = {
        "device_id": "0",
        "migraphx_fp16_enable": "0",
        "migraphx_bf16_enable": "0",
        "migraphx_fp8_enable": "0",
        "migraphx_int8_enable": "0",
        "migraphx_exhaustive_tune": "0",
        "migraphx_mem_limit": "0",
        "migraphx_arena_extend_strategy": "kNextPowerOfTwo",
        "migraphx_model_cache_dir": "",
    }
    found = [
        Provider("CUDAExecutionProvider", cuda, leaves_silently=True),
        Provider(
            "TensorrtExecutionProvider", tensorrt, cache_option="trt_engine_cache_path", suffix=".engine"
        ),
        Provider(
            "MIGraphXExecutionProvider",
            migraphx,
            cache_option="migraphx_model_cache_dir",
            suffix=".mxr",
            prefix="ORT_MIGRAPHX_",
        ),
        Provider("WebGpuExecutionProvider", reports=False, strict=False),
        Provider("OpenVINOExecutionProvider", reports=False, strict=False),
    ]
    return {provider.name: provider for provider in found}
