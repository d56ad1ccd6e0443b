"""Run components with OpenVINO on the processor, at fixed shapes, from a cache of compiled models.

OpenVINO computes in bf16 where the processor has it; that is said explicitly here, so that the same
options mean the same on every machine, and what is in force is read back from the compiled model.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .compiled_cache import CompiledCache, cache_key
from .cpu import describe_cpu, threads_are_limited, usable_cores
from .engine import Engine, parse_version
from .errors_map import engine_errors, one_line
from .feeds import Shape, check_options
from .openvino_timestep import COSINE, SINE, cut_timestep, timestep_feeds
from .session import CheckedSession, check_port_names

NAME = "openvino"
ENGINE = Engine("openvino", ("openvino", "openvino-nightly"), (2026, 2), "cpu")
DEVICE = "CPU"  # OpenVINO's other devices are not in the parity tests, so they are not offered

# 2026.2.1 and 2026.3.1 write such entries of an ONNX file too, but refuse to read them back.
WEIGHTLESS_SINCE = (2026, 4)

# Raised when this file changes what it asks of the engine, so that old entries are not used.
CACHE_VERSION = 2

_CONVERTER = "openvino.tools.ovc"
# OpenVINO's names for a precision: what the device can do, what is asked for, what is read back.
_CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
_HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_READ_BACK = {
    "f32": "fp32",
    "float32": "fp32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "f16": "fp16",
    "float16": "fp16",
}


class OpenVINOBackend:
    """OpenVINO's CPU plugin."""

    name = NAME

    def probe(self) -> Availability:
        """Whether a recent OpenVINO is installed; it is not imported."""
        return ENGINE.probe()

    def devices(self) -> tuple[Device, ...]:
        """The processor, or nothing when OpenVINO does not load."""
        try:
            core = _core()
            with engine_errors(NAME, "asking for the processor"):
                return (Device(DEVICE, core.get_property(DEVICE, "FULL_DEVICE_NAME"), _precisions(core)),)
        except (BackendUnavailable, SessionError):
            return ()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> OpenVINOSession:
        """Load one component, from ``options.cache_dir`` if it has been compiled before.

        ``options.extra`` holds further OpenVINO properties by name, e.g. ``{"ENABLE_CPU_PINNING": False}``.

        Raises:
            BackendUnavailable: OpenVINO is not there, or the device is another than the processor.
            SessionError: OpenVINO refuses the graph, a shape or a property, or the processor does not
                compute in the precision asked for.
        """
        check_options(source.component, options)
        core = _core()
        _check_device(core, options.device)
        properties = _properties(core, options)
        compiled, from_cache = _compiled(core, source, options, properties)
        in_force = _read_back(compiled, from_cache)
        if options.precision not in ("auto", in_force.precision):
            raise SessionError(
                f"{options.precision} was asked for, but OpenVINO computes in {in_force.precision}"
            )
        with engine_errors(NAME, f"reserving memory for {source.component}"):
            request = compiled.create_infer_request()
        return OpenVINOSession(source, in_force, compiled, request)


class OpenVINOSession(CheckedSession):
    """One compiled model and its one inference request."""

    def __init__(self, source: GraphSource, in_force: InForce, compiled: Any, request: Any) -> None:
        super().__init__(source, in_force, _input_shapes(source, compiled))
        self._compiled = compiled
        self._request = request
        self._config = source.config
        self._cut = any(SINE in port.get_names() for port in compiled.inputs)
        self._outputs = {port.any_name: index for index, port in enumerate(compiled.outputs)}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._cut:
            feeds = feeds | timestep_feeds(feeds["timestep"], len(feeds["sample"]), self._config)
        # Inputs are read in place; outputs are copied, because the request writes over its own next time.
        results = self._request.infer(feeds, share_inputs=True, share_outputs=False)
        return {name: np.asarray(results[index]) for name, index in self._outputs.items()}

    def _release(self) -> None:
        self._request = None
        self._compiled = None


@cache
def _core() -> Any:
    """The one Core of this process.

    Raises:
        BackendUnavailable: OpenVINO is missing, too old or broken.
    """
    with _without_converter():
        module = ENGINE.load()
    with engine_errors(NAME, "starting"):
        core = module.Core()
        core.set_property({"ENABLE_MMAP": True})
    return core


@contextmanager
def _without_converter() -> Iterator[None]:
    """Import OpenVINO without its model converter, which Kiln does not use.

    ``import openvino`` tries to import the converter and goes on without it. The converter takes more than
    half of the import time, and importing it reports to Intel's telemetry over the network. Whoever needs
    ``openvino.convert_model`` in the same process still gets it.
    """
    if _CONVERTER in sys.modules or "openvino" in sys.modules:
        yield
        return
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # makes the import raise ImportError
    try:
        yield
    finally:
        del sys.modules[_CONVERTER]
        module = sys.modules.get("openvino")
        if isinstance(module, ModuleType) and not hasattr(module, "convert_model"):
            module.convert_model = _convert_model  # type: ignore[attr-defined]


def _convert_model(*args: Any, **kwargs: Any) -> Any:
    """OpenVINO's converter, imported when somebody calls it."""
    return importlib.import_module(_CONVERTER).convert_model(*args, **kwargs)


def _check_device(core: Any, device: str) -> None:
    if device.upper() not in ("AUTO", DEVICE):
        seen = ", ".join(core.available_devices)
        raise BackendUnavailable(
            f"the openvino backend runs on {DEVICE} only, got {device!r} (OpenVINO itself sees: {seen})"
        )


def _precisions(core: Any) -> tuple[str, ...]:
    """What the processor computes in, best first."""
    capabilities = set(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
    return tuple(name for name in ("bf16", "fp32", "fp16") if _CAPABILITY[name] in capabilities)


def _properties(core: Any, options: PrepareOptions) -> dict[str, object]:
    """The properties to compile with; none is left to a default that differs between machines."""
    possible = _precisions(core)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in possible else "fp32"
    if precision not in possible:
        raise SessionError(
            f"OpenVINO does not compute in {options.precision} on this processor; "
            f"use auto or one of {', '.join(possible)}"
        )
    properties: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _HINT[precision],
    }
    if options.threads:
        properties["INFERENCE_NUM_THREADS"] = options.threads
    elif threads_are_limited():  # OpenVINO sees affinity masks but not the quota of a container
        properties["INFERENCE_NUM_THREADS"] = usable_cores()
    return properties | dict(options.extra)


def _compiled(
    core: Any, source: GraphSource, options: PrepareOptions, properties: dict[str, object]
) -> tuple[Any, bool]:
    """The compiled model, and whether it came from the cache."""
    properties = properties | _weightless(source)
    if options.cache_dir is None:
        return _compile(core, source, options, properties), False
    kept = CompiledCache(options.cache_dir / NAME)
    key = _key(core, source, options, properties)
    blob = kept.load(key)
    if blob is not None:
        try:
            return core.import_model(blob, DEVICE, properties), True
        except Exception as error:  # whatever the engine has against it, compiling again is right
            kept.remove(key, one_line(error))
    compiled = _compile(core, source, options, properties)
    with engine_errors(NAME, f"saving the compiled {source.component}"):
        exported = compiled.export_model()
    kept.store(key, exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported))
    return compiled, False


def _weightless(source: GraphSource) -> dict[str, object]:
    """Properties that keep weights out of the cache: the blob then points into ``weights.safetensors``.

    For Stable Diffusion 1.5 that is megabytes for each LoRA and size, in place of gigabytes.
    """
    if parse_version(_version()) < WEIGHTLESS_SINCE:
        return {}
    return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(source.weights_path)}


def _key(core: Any, source: GraphSource, options: PrepareOptions, properties: dict[str, object]) -> str:
    """Everything a compiled model depends on. Where the weights lie is no part of that, what they are is."""
    cpu = describe_cpu()
    return cache_key(
        {
            "cache": CACHE_VERSION,
            "component": source.component,
            "digest": source.digest,
            "shapes": {name: list(shape) for name, shape in options.shapes.items()},
            "properties": {name: value for name, value in properties.items() if name != "WEIGHTS_PATH"},
            "engine": _version(),
            # A virtual machine often calls different processors by one name; the flags tell them apart.
            "device": [core.get_property(DEVICE, "FULL_DEVICE_NAME"), cpu.name, cpu.flags, cpu.threads],
        }
    )


def _compile(core: Any, source: GraphSource, options: PrepareOptions, properties: dict[str, object]) -> Any:
    if not source.graph_path.is_file():
        raise SessionError(f"the graph {source.graph_path} is not there; export the bundle again")
    with engine_errors(NAME, f"reading {source.component}"):
        model = core.read_model(source.graph_path)
    check_port_names(
        source.component, [port.any_name for port in model.inputs], [port.any_name for port in model.outputs]
    )
    if options.shapes:
        with engine_errors(NAME, f"fixing the shapes of {source.component}"):
            model.reshape({name: list(shape) for name, shape in options.shapes.items()})
    if source.component == "unet" and properties["INFERENCE_PRECISION_HINT"] != _HINT["fp32"]:
        with engine_errors(NAME, f"lowering {source.component}"):
            cut_timestep(model)
    with engine_errors(NAME, f"compiling {source.component}"):
        return core.compile_model(model, DEVICE, properties)


def _input_shapes(source: GraphSource, compiled: Any) -> dict[str, Shape]:
    """The input shapes of the compiled model, None where an axis is dynamic."""
    return {
        port.any_name: tuple(axis.get_length() if axis.is_static else None for axis in port.partial_shape)
        for port in compiled.inputs
        if not port.get_names() & {SINE, COSINE}
    }


def _version() -> str:
    return str(ENGINE.load().get_version())


def _read_back(compiled: Any, from_cache: bool) -> InForce:
    with engine_errors(NAME, "reading back its settings"):
        hint = compiled.get_property("INFERENCE_PRECISION_HINT")
        name = hint if isinstance(hint, str) else hint.get_type_name()
        threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        devices = compiled.get_property("EXECUTION_DEVICES")
    return InForce(
        backend=NAME,
        version=_version(),
        provider="+".join(devices),
        device=DEVICE,
        precision=_READ_BACK.get(name, name),
        threads=threads,
        from_cache=from_cache,
    )
