"""What runs in a child process: one question, answered as one line of JSON on stdout.

Engines abort, hang and write to stdout; nothing of that reaches the doctor from here. Only the standard
library is imported at the top, so that a question about a library costs milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "kiln-doctor-answer:"

Value = dict[str, object]


def dlopen(name: str) -> Value:
    """Load a shared library as the linker finds it."""
    ctypes.CDLL(name)
    return {}


def dlopen_provider(path: str) -> Value:
    """Load a provider of ONNX Runtime, after the library that it takes its host's functions from."""
    shared = Path(path).with_name("libonnxruntime_providers_shared.so")
    if not Path(path).exists():
        raise OSError(f"{path} is missing")
    if shared.exists():
        ctypes.CDLL(str(shared), ctypes.RTLD_GLOBAL)
    _preload("tensorrt" in path)
    ctypes.CDLL(path)
    return {}


def _preload(tensorrt: bool) -> None:
    """CUDA's libraries from pip's nvidia packages, as Kiln's own backends load them before a session."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        _quietly(onnxruntime.preload_dlls)
    if tensorrt:
        from ..onnxruntime_nvidia import load_tensorrt

        print(load_tensorrt(), file=sys.stderr)


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # the session or the loader will say what is missing
        print(error, file=sys.stderr)


def cuda_devices() -> Value:
    """Name and compute capability of each NVIDIA GPU, from the driver."""
    from ..onnxruntime_gpus import nvidia_gpus

    gpus = [gpu for gpu in nvidia_gpus() if len(gpu.capability) == 2]
    rows = [{"name": gpu.name, "major": gpu.capability[0], "minor": gpu.capability[1]} for gpu in gpus]
    return {"devices": rows}


def onnxruntime_list() -> Value:
    """The providers that are compiled in or come as plugins."""
    import onnxruntime

    providers = list(onnxruntime.get_available_providers())
    return {"version": onnxruntime.__version__, "providers": providers, "plugins": sorted(_plugins())}


def _plugins() -> dict[str, Any]:
    """The modules of plugin providers, ``onnxruntime_ep_*``, by the provider's name."""
    import importlib
    import pkgutil

    found = {}
    for info in pkgutil.iter_modules():
        if info.name.startswith("onnxruntime_ep_"):
            module = importlib.import_module(info.name)
            if hasattr(module, "get_library_path") and hasattr(module, "get_ep_name"):
                found[str(module.get_ep_name())] = module
    return found


def onnxruntime_run(provider: str, precision: str) -> Value:
    """Run the self-test on one provider and see from the profile where each node really ran."""
    import onnxruntime

    from . import selftest

    _preload(provider.startswith("Tensorrt"))
    half = precision == "half"
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        # Else constants folded on the processor and casts around the graph would be counted as its own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        arguments: dict[str, Any] = {"providers": [provider]}
        plugin = _plugins().get(provider)
        if plugin is not None and provider not in onnxruntime.get_available_providers():
            onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
            devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]
            if not devices:
                raise RuntimeError(f"the plugin of {provider} offers no device on this hardware")
            options.add_provider_for_devices(devices[:1], {})
            arguments = {}
        session = onnxruntime.InferenceSession(selftest.onnx_model(half), options, **arguments)
        in_force = session.get_providers()
        (result,) = session.run(None, {"sample": selftest.sample()})
        profile = Path(session.end_profiling()).read_text(encoding="utf-8")
    nodes = _nodes(profile)
    return {
        "version": onnxruntime.__version__,
        "providers": in_force,
        "nodes": nodes,
        "on_provider": provider in nodes,
        "comparison": selftest.compare(result).as_row(),
    }


def _nodes(profile: str) -> dict[str, int]:
    """How many nodes each provider ran, by ONNX Runtime's own profile."""
    rows = [row for row in json.loads(profile) if isinstance(row, dict) and row.get("cat") == "Node"]
    where = [row.get("args", {}).get("provider") for row in rows if row["name"].endswith("_kernel_time")]
    return dict(Counter(str(provider) for provider in where if provider))


def openvino_list() -> Value:
    """OpenVINO's devices, and the precision each computes in if nobody asks."""
    import openvino

    core = openvino.Core()
    devices = {}
    for name in core.available_devices:
        properties = {}
        for key in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES", "INFERENCE_PRECISION_HINT"):
            try:
                value = core.get_property(name, key)
                properties[key] = value if isinstance(value, str) else _text(value)
            except Exception as error:
                properties[key] = f"not known: {error}"
        devices[name] = properties
    return {"version": openvino.__version__, "devices": devices}


def _text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    name = getattr(value, "get_type_name", None)
    return name() if name else str(value)


def openvino_run(device: str, precision: str) -> Value:
    """Run the self-test on one device; ``half`` asks for nothing and takes the device's default."""
    import openvino

    from . import selftest

    core = openvino.Core()
    asked = {} if precision == "half" else {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(selftest.onnx_model()), device, asked)
    result = compiled(selftest.sample())[compiled.output(0)]
    ran_on = [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]
    return {
        "version": openvino.__version__,
        "providers": ran_on,
        "precision": _text(compiled.get_property("INFERENCE_PRECISION_HINT")),
        "on_provider": any(name == device or name.startswith(f"{device}.") for name in ran_on),
        "comparison": selftest.compare(result).as_row(),
    }


def torch_list() -> Value:
    """How torch was built, the GPUs it sees, and the GPUs it has kernels for."""
    import torch

    gpus: list[dict[str, object]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gfx = str(getattr(facts, "gcnArchName", "")).partition(":")[0]
            gpus.append({"name": torch.cuda.get_device_name(index), "gfx": gfx, "memory": facts.total_memory})
    # Not torch.cuda.get_arch_list(), which is empty when there is no GPU.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: "")() or ""
    return {
        "version": torch.__version__,
        "hip": torch.version.hip or "",
        "cuda": torch.version.cuda or "",
        "gpus": gpus,
        "kernels": flags.split(),
    }


def torch_run(device: str, precision: str) -> Value:
    """Run the self-test with torch's functions; ``half`` is fp16 on a GPU and bf16 on a processor."""
    import torch

    from . import selftest

    half = torch.bfloat16 if device == "cpu" else torch.float16
    dtype = half if precision == "half" else torch.float32
    result = selftest.torch_output(torch, device, dtype)
    return {
        "version": torch.__version__,
        "providers": [device],
        "precision": str(dtype).removeprefix("torch."),
        "on_provider": True,
        "comparison": selftest.compare(result).as_row(),
    }


def kiln_devices() -> Value:
    """What ``kiln devices`` lists."""
    from dataclasses import asdict

    from ..device_report import list_devices

    return {"rows": [asdict(row) for row in list_devices()]}


VERBS: dict[str, Callable[..., Value]] = {
    "dlopen": dlopen,
    "dlopen-provider": dlopen_provider,
    "cuda-devices": cuda_devices,
    "onnxruntime-list": onnxruntime_list,
    "onnxruntime-run": onnxruntime_run,
    "openvino-list": openvino_list,
    "openvino-run": openvino_run,
    "torch-list": torch_list,
    "torch-run": torch_run,
    "kiln-devices": kiln_devices,
}


def main(question: list[str]) -> None:
    """Answer; an exception of an engine is an answer too."""
    verb, *arguments = question
    try:
        answer: dict[str, object] = {"status": "ok", "text": "", "value": VERBS[verb](*arguments)}
    except Exception as error:  # engines raise anything
        line = " ".join(str(error).split()) or type(error).__name__
        answer = {"status": "error", "text": line, "value": {}}
    # A line of its own, whatever the engine wrote before; then out, before its destructors can crash.
    sys.stdout.write(f"\n{MARK}{json.dumps(answer, default=str)}\n")
    sys.stdout.flush()
