"""Run components with OpenVINO as a plug-in of ONNX Runtime, on Intel's processors, GPUs and NPUs.

The plug-in (onnxruntime-ep-openvino) works with any onnxruntime and brings an OpenVINO of its own. It offers
the hardware of Intel only: on other processors it lists no device, and Kiln's ``openvino`` backend runs.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from types import ModuleType
from typing import Any

from ..errors import BackendError, BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .engine import Engine
from .errors_map import engine_errors
from .feeds import check_options
from .onnxruntime_readback import INDEX_OPERATORS
from .onnxruntime_session import OrtSession, Plan, open_session
from .onnxruntime_wheel import ENGINE

NAME = "onnxruntime-openvino"
PROVIDER = "OpenVINOExecutionProvider"
PLUGIN = Engine("onnxruntime_ep_openvino", ("onnxruntime-ep-openvino",), (1, 8), "cpu")
_ADVICE = "pip install onnxruntime-ep-openvino"
# OpenVINO's names of precisions, set for the device by ``load_config``.
_HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_PRECISIONS = {"CPU": ("fp32", "bf16"), "GPU": ("fp16", "fp32"), "NPU": ("fp16",)}
# Options of the plug-in that Kiln passes on, none of them a cache: its key knows no weights.
OPTIONS = frozenset(
    [
        "disable_dynamic_shapes",
        "enable_opencl_throttling",
        "enable_qdq_optimizer",
        "model_priority",
        "num_streams",
    ]
)


class OpenVINOPluginBackend:
    """OpenVINO inside ONNX Runtime."""

    name = NAME

    def probe(self) -> Availability:
        """Whether onnxruntime and the plug-in are installed; neither is imported."""
        core = ENGINE.probe()
        if not core.available:
            return core
        if importlib.util.find_spec(PLUGIN.module) is None:
            return Availability(False, f"the plug-in is not installed: {_ADVICE}", core.version)
        found = PLUGIN.probe()
        reason = found.reason or (_tried[-1] if _tried else "")
        return Availability(not reason, reason, core.version)

    def devices(self) -> tuple[Device, ...]:
        """What the plug-in lists: ``CPU``, ``GPU``, ``GPU.1``, ``NPU``."""
        try:
            if not self.probe().available:
                return ()
            found = _plugin_devices(ENGINE.load())
        except BackendError as error:
            _tried.append(str(error))
            return ()
        return tuple(Device(id, _name(device), _PRECISIONS[_kind(device)]) for id, device in found.items())

    def prepare(self, source: GraphSource, options: PrepareOptions) -> OrtSession:
        """Load one component.

        ``options.extra`` holds options of the plug-in by name, of ``OPTIONS``.

        Raises:
            BackendUnavailable: onnxruntime, the plug-in or the device asked for are not there.
            SessionError: the graph or an option is refused, or operators that compute would run elsewhere.
        """
        check_options(source.component, options)
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        module = ENGINE.load()
        there = _plugin_devices(module)
        id = next(iter(there)) if options.device == "auto" else options.device.upper()
        if id not in there:
            raise BackendUnavailable(
                f"the plug-in has no device {options.device!r}; it has: {', '.join(there)}"
            )
        unknown = sorted(set(options.extra) - OPTIONS)
        if unknown:
            raise SessionError(f"{NAME} passes on {', '.join(sorted(OPTIONS))}, not {', '.join(unknown)}")
        kind = _kind(there[id])
        precision = _PRECISIONS[kind][0] if options.precision == "auto" else options.precision
        if precision not in _PRECISIONS[kind]:
            raise SessionError(f"{kind} computes in {', '.join(_PRECISIONS[kind])}, got {options.precision}")
        given = {"load_config": json.dumps({kind: _config(precision, options)})}
        plan = Plan(
            NAME,
            PROVIDER,
            id,
            precision,
            given | {name: str(value) for name, value in options.extra.items()},
            elsewhere=INDEX_OPERATORS,
            reports_options=False,
            plugin_devices=(there[id],),
            why_missing=lambda: _ADVICE,
        )
        return OrtSession(source, open_session(module, source, options, plan))


# What the last try to load the plug-in said.
_tried: list[str] = []


def _config(precision: str, options: PrepareOptions) -> dict[str, str]:
    """OpenVINO's own properties, for one device."""
    threads = {"INFERENCE_NUM_THREADS": str(options.threads)} if options.threads else {}
    return {"INFERENCE_PRECISION_HINT": _HINT[precision], "PERFORMANCE_HINT": "LATENCY", **threads}


@cache
def _plugin_devices(module: ModuleType) -> dict[str, Any]:
    """The plug-in's devices by id, registered once in a process.

    Raises:
        BackendUnavailable: it does not load, or lists none.
    """
    plugin = PLUGIN.load()
    with engine_errors(NAME, "loading the plug-in"):
        try:
            module.register_execution_provider_library(PROVIDER, plugin.get_library_path())
        except Exception as error:
            if "already registered" not in str(error):
                raise
        listed = [device for device in module.get_ep_devices() if device.ep_name == PROVIDER]
    if not listed:
        raise BackendUnavailable(
            "the plug-in offers no device here: it takes Intel's processors, GPUs and NPUs only; "
            "use the openvino backend"
        )
    found: dict[str, Any] = {}
    for device in listed:
        same = sum(_kind(other) == _kind(device) for other in found.values())
        found[f"{_kind(device)}.{same}" if same else _kind(device)] = device
    return found


def _kind(device: Any) -> str:
    """``CPU``, ``GPU`` or ``NPU``."""
    return str(device.device.type.name)


def _name(device: Any) -> str:
    metadata = dict(device.device.metadata)
    return str(metadata.get("Description") or f"{device.device.vendor} {_kind(device)}")
