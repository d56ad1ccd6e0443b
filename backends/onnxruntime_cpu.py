"""Run components with ONNX Runtime's CPU provider, in fp32; shapes may stay dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .cpu import describe_cpu, usable_cores
from .engine import Engine
from .errors_map import engine_errors
from .feeds import Shape, check_options
from .session import CheckedSession, check_port_names, refuse_extra

NAME = "onnxruntime"
PROVIDER = "CPUExecutionProvider"
ENGINE = Engine("onnxruntime", ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"), (1, 24), "cpu")

_ERRORS_ONLY = 3  # ONNX Runtime's severity levels: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal


class ONNXRuntimeBackend:
    """ONNX Runtime on the processor."""

    name = NAME

    def probe(self) -> Availability:
        """Whether a recent ONNX Runtime is installed; it is not imported."""
        return ENGINE.probe()

    def devices(self) -> tuple[Device, ...]:
        """The processor, or nothing when ONNX Runtime does not load."""
        try:
            ENGINE.load()
        except BackendUnavailable:
            return ()
        return (Device("cpu", describe_cpu().name, ("fp32",)),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> ONNXRuntimeSession:
        """Load one component.

        Raises:
            BackendUnavailable: ONNX Runtime is not there, or the device is another than ``cpu``.
            SessionError: ONNX Runtime refuses the graph or an option, or another precision than fp32 is
                asked for.
        """
        check_options(source.component, options)
        refuse_extra(self.name, options)
        if options.device.lower() not in ("auto", "cpu"):
            raise BackendUnavailable(f"the onnxruntime backend runs on cpu only, got {options.device!r}")
        if options.precision not in ("auto", "fp32"):
            raise SessionError(
                f"ONNX Runtime computes in fp32 on a processor, got {options.precision}; use auto or fp32, "
                "or the openvino backend for bf16"
            )
        if not source.graph_path.is_file():
            raise SessionError(f"the graph {source.graph_path} is not there; export the bundle again")
        module = ENGINE.load()
        with engine_errors(NAME, f"loading {source.component}"):
            settings = _settings(module, options)
            native = module.InferenceSession(str(source.graph_path), settings, providers=[PROVIDER])
            in_force = _read_back(module, native)
        return ONNXRuntimeSession(source, in_force, native, options)


class ONNXRuntimeSession(CheckedSession):
    """One InferenceSession."""

    def __init__(self, source: GraphSource, in_force: InForce, native: Any, options: PrepareOptions) -> None:
        check_port_names(
            source.component, [p.name for p in native.get_inputs()], [p.name for p in native.get_outputs()]
        )
        super().__init__(source, in_force, _input_shapes(native, options))
        self._native = native
        self._names = [port.name for port in self.contract.outputs]

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._native.run(self._names, feeds), strict=True))

    def _release(self) -> None:
        self._native = None


def _settings(module: Any, options: PrepareOptions) -> Any:
    module.disable_telemetry_events()
    settings = module.SessionOptions()
    settings.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.execution_mode = module.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _ERRORS_ONLY
    # Given always, because the number in force cannot be read back when ONNX Runtime chooses it. Its own
    # choice, one thread for each physical core, does not see the quota of a container.
    settings.intra_op_num_threads = options.threads or usable_cores()
    return settings


def _read_back(module: Any, native: Any) -> InForce:
    """What the session says of itself.

    Raises:
        SessionError: it runs on another provider than the processor's.
    """
    providers = native.get_providers()
    if providers != [PROVIDER]:
        raise SessionError(f"ONNX Runtime uses the providers {providers}, expected only {PROVIDER}")
    threads = native.get_session_options().intra_op_num_threads
    return InForce(NAME, module.__version__, providers[0], "cpu", "fp32", threads)


def _input_shapes(native: Any, options: PrepareOptions) -> dict[str, Shape]:
    """What the graph and the caller fix; ONNX Runtime keeps names for the free axes."""
    shapes: dict[str, Shape] = {}
    for port in native.get_inputs():
        graph = tuple(axis if isinstance(axis, int) else None for axis in port.shape)
        asked = options.shapes.get(port.name, graph)
        if len(asked) != len(graph) or any(g not in (None, a) for g, a in zip(graph, asked, strict=True)):
            raise SessionError(
                f"the shape {tuple(asked)} does not fit the graph's input {port.name} {port.shape}"
            )
        shapes[port.name] = tuple(asked)
    return shapes
