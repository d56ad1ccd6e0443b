"""Run a graph that is no component: with outputs or inputs of its own, to look inside a network.

The backends check every graph against the contract of its component, and so cannot run these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendUnavailable

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def open_graph(
    graph: onnx.ModelProto, path: Path, shapes: Shapes, *, threads: int = 0, engine: str = "auto"
) -> Run:
    """Write a graph beside the weights it points into and open it in fp32, at fixed shapes.

    Args:
        graph: its weights are external.
        path: where the file goes, in the folder of the weights; the caller removes it.
        shapes: of every input.
        threads: 0 lets the engine choose.
        engine: ``openvino``, ``onnxruntime``, or ``auto`` for the first of the two that is installed.

    Returns:
        What runs it: arrays by name in, arrays by name out.

    Raises:
        BackendUnavailable: neither engine is installed.
    """
    from ...backends.registry import get_backend

    path.write_bytes(graph.SerializeToString())
    outputs = [port.name for port in graph.graph.output]
    for name, opened in (("openvino", _openvino), ("onnxruntime", _onnxruntime)):
        if engine in ("auto", name) and get_backend(name).probe().available:
            return opened(path, shapes, outputs, threads)
    raise BackendUnavailable(
        "calibrating int8 runs the network, which needs an engine: pip install 'kiln-diffusion[cpu]'"
    )


def _openvino(path: Path, shapes: Shapes, outputs: list[str], threads: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Without this a layer with int8 weights rounds its activations to int8 as well, by groups, unasked.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", properties).create_infer_request()

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        request.infer(dict(feeds), share_inputs=True)
        return {name: np.array(request.get_tensor(name).data) for name in outputs}

    return run


def _onnxruntime(path: Path, shapes: Shapes, outputs: list[str], threads: int) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # The same here: 4, the default, computes a MatMul with int8 weights in int8; 1 is fp32.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    settings.intra_op_num_threads = threads
    native = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, native.run(outputs, dict(feeds)), strict=True))

    return run
