"""A session of onnxruntime's stand-in: the processor's, with what a provider does to it.

That is falling back, keeping engines by name, replaying a CUDA graph, and saying which node ran where.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from fake_ort_providers import CPU, Provider

if TYPE_CHECKING:
    from fakes_onnxruntime import FakeOnnxruntime

FALSE = ("0", "False", "")
CAPTURE_AFTER = 2  # runs before a CUDA graph is captured


class FakeOptions:
    """Settings that also hold the devices of a plug-in; the real ones refuse devices of a stand-in."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "devices", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        object.__setattr__(self, "devices", (devices[0].ep_name, options))


class FakeSession:
    """An InferenceSession: the processor's, that says it is another one's."""

    def __init__(
        self,
        module: FakeOnnxruntime,
        graph: str | bytes,
        settings: FakeOptions | None = None,
        providers: Any = None,
        enable_fallback: int = 1,
    ) -> None:
        self._module = module
        self._settings = settings or module.SessionOptions()
        named = [self._settings.devices] if self._settings.devices else list(providers or [])
        self._named = [(p, {}) if isinstance(p, str) else p for p in named]
        self.fallback = bool(enable_fallback)
        try:
            self._used = self._create()
        except RuntimeError as error:
            if not enable_fallback:
                raise
            print(f"EP Error {error} when using {providers}\nFalling back to ['{CPU}'] and retrying.")
            self._used = {}
        self._runs, self._captured = 0, None
        self._graph = graph
        self._native = self._load(graph)

    def _create(self) -> dict[str, dict[str, str]]:
        used = {}
        for name, options in self._named:
            provider = self._module.providers.get(name)
            if provider is None:
                if name != CPU:
                    warnings.warn(
                        f"Specified provider '{name}' is not in available provider names.", stacklevel=2
                    )
                continue
            if provider.missing and provider.leaves_silently:
                continue
            if provider.missing:
                raise RuntimeError(
                    f"/onnxruntime_src/bridge.cc:1988 [ONNXRuntimeError] : 1 : FAIL : {provider.missing}"
                )
            unknown = [key for key in options if key not in provider.options]
            if unknown and provider.strict:
                raise RuntimeError(
                    f"/onnxruntime_src/info.cc:63 void f() [ONNXRuntimeError] : 1 : FAIL : "
                    f'options_utils.h:182 Parse Unknown provider option: "{unknown[0]}".'
                )
            kept = {k: str(v) for k, v in options.items() if k not in provider.drops}
            used[name] = provider.options | kept
        return used

    def _effective(self, name: str) -> dict[str, str]:
        """Options as the provider really uses them: its variables override what was given and is reported."""
        options, provider = dict(self._used[name]), self._module.providers[name]
        if provider.prefix:
            for key in options:
                short = key.removeprefix("migraphx_").upper().replace("MODEL_CACHE_DIR", "MODEL_CACHE_PATH")
                options[key] = os.environ.get(provider.prefix + short) or options[key]
            if options["migraphx_fp16_enable"] not in FALSE and options["migraphx_bf16_enable"] not in FALSE:
                options |= {"migraphx_fp16_enable": "0", "migraphx_bf16_enable": "0"}
        return options

    def _load(self, graph: str | bytes) -> Any:
        real = self._module._real
        native = real.InferenceSession(graph, self._settings.real, providers=[CPU])
        name = next(iter(self._used), CPU)
        provider = self._module.providers.get(name)
        if provider is None or not provider.cache_option or name not in self._used:
            return native
        if any(isinstance(axis, str) for port in native.get_inputs() for axis in port.shape):
            self._shapes: set[str] = set()  # compiled at the run that brings a shape
            return native
        return self._compiled(native, provider, self._effective(name)[provider.cache_option])

    def _compiled(self, native: Any, provider: Provider, folder: str) -> Any:
        """From the cache if the name is there, which says nothing of weights; else compiled, and kept."""
        real = self._module._real
        key = self._key(native)
        kept = Path(folder) / f"{key}{provider.suffix}" if folder else None
        if kept and kept.exists():
            return real.InferenceSession(kept.read_bytes(), self._settings.real, providers=[CPU])
        self._module.compiled.append(key)
        if kept:
            kept.write_bytes(self._frozen())
        return native

    def _key(self, native: Any) -> str:
        ports = [*native.get_inputs(), *native.get_outputs()]
        file = "virtual_model.onnx" if isinstance(self._graph, bytes) else Path(self._graph).name
        text = repr((file, [(port.name, port.shape) for port in ports], sys.platform))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _frozen(self) -> bytes:
        """The graph with its weights inside: what an engine compiles into its file."""
        if isinstance(self._graph, str):
            return onnx.load(self._graph).SerializeToString()
        folder = self._settings.get_session_config_entry(
            "session.model_external_initializers_file_folder_path"
        )
        model = onnx.load_from_string(self._graph)
        onnx.load_external_data_for_model(model, folder)
        return model.SerializeToString()

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_providers(self) -> list[str]:
        return [*self._used, CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {CPU: {}}
        for name, options in self._used.items():
            provider = self._module.providers[name]
            shown = {k: v for k, v in options.items() if k not in provider.drops}
            found[name] = shown if provider.reports else {}
        return found

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = []
        for part in self._native.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                takes = [n for n in self._used if node.op_type not in self._module.providers[n].lacks]
                nodes = [SimpleNamespace(op_type=node.op_type, name=node.name, domain=node.domain)]
                parts.append(SimpleNamespace(ep_name=[*takes, CPU][0], get_nodes=lambda nodes=nodes: nodes))
        return parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def _graph_wanted(self) -> bool:
        options = [value for used in self._used.values() for value in used.items()]
        return any(k in ("enable_cuda_graph", "trt_cuda_graph_enable") and v not in FALSE for k, v in options)

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self._runs += 1
        if self._graph_wanted():
            if self._captured is not None:
                feeds = self._captured  # the copies that the first runs made on the device
            elif self._runs >= CAPTURE_AFTER:
                self._captured = {name: np.array(array) for name, array in feeds.items()}
        if hasattr(self, "_shapes"):
            shape = repr({name: array.shape for name, array in feeds.items()})
            if shape not in self._shapes:
                self._shapes.add(shape)
                self._module.compiled.append(shape)
        return self._quantised(self._native.run(names, feeds))

    def _quantised(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if "MIGraphXExecutionProvider" not in self._used:
            return arrays
        options = self._effective("MIGraphXExecutionProvider")
        if options["migraphx_fp16_enable"] in FALSE:
            return arrays
        return [array.astype(np.float16).astype(array.dtype) for array in arrays]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        self._runs += 1
        if self._graph_wanted() and self._captured is None and self._runs >= CAPTURE_AFTER:
            self._captured = (dict(binding.inputs), dict(binding.outputs))
        inputs, outputs = self._captured or (binding.inputs, binding.outputs)
        names = list(outputs)
        results = self._native.run(names, {name: value.array for name, value in inputs.items()})
        for name, result in zip(names, results, strict=True):
            if outputs[name] is None:
                binding.outputs[name] = FakeValue(result)
            else:
                outputs[name].array[...] = result


class FakeValue:
    """A tensor on the device: an array that nobody else sees."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, kind: Any, device: str, index: int) -> FakeValue:
        return cls(np.full(shape, 77, kind))

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, index: int) -> FakeValue:
        return cls(array.copy())

    def update_inplace(self, array: np.ndarray) -> None:
        self.array[...] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()


class FakeBinding:
    """An IOBinding."""

    def __init__(self, session: FakeSession) -> None:
        self.inputs: dict[str, FakeValue] = {}
        self.outputs: dict[str, FakeValue | None] = {}

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: FakeValue) -> None:
        self.outputs[name] = value

    def bind_output(self, name: str, device: str, index: int) -> None:
        self.outputs[name] = None

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [value.numpy() for value in self.outputs.values() if value is not None]

    def clear_binding_inputs(self) -> None:
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()
