"""Run components with ONNX Runtime's WebGPU provider: any GPU that has a Vulkan driver.

The provider ignores options that it does not know and reports none of them back (onnxruntime-webgpu 1.27), so
names are checked here, and which GPU it takes is the Vulkan driver's choice.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

from ..errors import BackendError, BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .errors_map import engine_errors
from .feeds import check_options
from .onnxruntime_readback import INDEX_OPERATORS, check_provider
from .onnxruntime_session import FATAL_ONLY, OrtSession, Plan, open_session, quiet, require_fixed_shapes
from .onnxruntime_wheel import Needs

NAME = "onnxruntime-webgpu"
PROVIDER = "WebGpuExecutionProvider"
DEVICE = "gpu"
NEEDS = Needs(
    PROVIDER,
    "onnxruntime-webgpu",
    "webgpu",
    drivers=(("libvulkan.so.1", "install the Vulkan loader and a driver (libvulkan1, mesa-vulkan-drivers)"),),
)
_PLAIN = ("static", "opset17")
_LOWERINGS = {"fp32": _PLAIN, "fp16": (*_PLAIN, "fp16")}
# Of webgpu_provider_options.h, without those that take pointers and those for debugging and graph capture.
_OPTIONS = """
dawnBackendType defaultBufferCacheMode enableInt64 maxStorageBufferBindingSize powerPreference preferredLayout
queryResolveBufferCacheMode storageBufferCacheMode uniformBufferCacheMode validationMode
"""
OPTIONS = frozenset(_OPTIONS.split())


class WebGPUBackend:
    """ONNX Runtime on any GPU with Vulkan."""

    name = NAME

    def probe(self) -> Availability:
        """Whether onnxruntime-webgpu and a Vulkan loader are here, and what the last try to start it said."""
        found = NEEDS.probe()
        if found.available and _tried and _tried[-1]:
            return Availability(False, _tried[-1], found.version)
        return found

    def devices(self) -> tuple[Device, ...]:
        """One, ``gpu``: the adapter that Dawn picks. Starts it: nothing else says whether there is one."""
        try:
            if not self.probe().available:
                return ()
            _start(NEEDS.engine.load(), "float32")
        except BackendError as error:
            _tried.append(str(error))
            return ()
        return (Device(DEVICE, "the GPU that WebGPU picks", _precisions()),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> OrtSession:
        """Load one component onto the GPU, with its shapes fixed.

        ``options.extra`` holds provider options by name, of ``OPTIONS``.

        Raises:
            BackendUnavailable: wheel, Vulkan or a GPU are not there.
            SessionError: a shape is left free, the graph or an option is refused, or operators that compute
                would run on the processor.
        """
        check_options(source.component, options)
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        if options.device.lower() not in ("auto", DEVICE):
            raise BackendUnavailable(f"the {NAME} backend has one device, {DEVICE!r}, got {options.device!r}")
        unknown = sorted(set(options.extra) - OPTIONS)
        if unknown:
            raise SessionError(
                f"WebGPU has no option {', '.join(unknown)}; it has {', '.join(sorted(OPTIONS))}"
            )
        module = NEEDS.engine.load()
        _start(module, "float32")
        precision = "fp32" if options.precision == "auto" else options.precision
        if precision not in _precisions():
            raise SessionError(
                f"WebGPU computes in {' and '.join(_precisions())} here, got {options.precision}"
            )
        require_fixed_shapes(NAME, source, options)
        plan = Plan(
            NAME,
            PROVIDER,
            DEVICE,
            precision,
            {name: str(value) for name, value in options.extra.items()},
            lowerings=_LOWERINGS[precision],
            elsewhere=INDEX_OPERATORS,
            reports_options=False,
        )
        return OrtSession(source, open_session(module, source, options, plan))


# What the last try to start the adapter said, empty if it started.
_tried: list[str] = []


def _precisions() -> tuple[str, ...]:
    """fp16 too where the adapter has shaders for it (``shader-f16``), which only a try tells."""
    try:
        _start(NEEDS.engine.load(), "float16")
    except BackendError:
        return ("fp32",)
    return ("fp32", "fp16")


@cache
def _start(module: ModuleType, kind: str) -> None:
    """Run one operator.

    Raises:
        BackendUnavailable: the provider was left out.
        SessionError: Dawn found no adapter, or it does not compute in the type, or computes wrongly.
    """
    from onnx import helper

    values = np.arange(1, 5, dtype=kind)
    element = helper.np_dtype_to_tensor_dtype(values.dtype)
    ports = [helper.make_tensor_value_info(name, element, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Sqrt", ["x"], ["y"])], "start", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with engine_errors(NAME, "starting"), quiet():
        settings = module.SessionOptions()
        settings.log_severity_level = FATAL_ONLY
        native = module.InferenceSession(
            model.SerializeToString(), settings, providers=[PROVIDER], enable_fallback=0
        )
        native.disable_fallback()
        check_provider(native, PROVIDER, lambda: "kiln doctor says more")
        [result] = native.run(["y"], {"x": values})
    if not np.allclose(result, np.sqrt(values), rtol=1e-2):
        raise SessionError(f"WebGPU's adapter computes wrongly: square roots of 1, 2, 3, 4 as {result}")
