"""OpenVINO's lowerings of int8 graphs against ONNX's own reference, and what they are computed in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_gated, openvino_symmetric, openvino_upsample
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]
RNG = np.random.default_rng(0)
CHANNELS, OUT, SIDE = 8, 16, 4


def constants(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """An int8 weight with its scales and a bias, and one range of uint8 for activations."""
    return {
        "w": RNG.integers(-127, 128, shape).astype(np.int8),
        "w.scale": (0.01 + RNG.random(shape[0]) / 100).astype(np.float32),
        "b": RNG.standard_normal(shape[0]).astype(np.float32),
        "x_scale": np.array(0.03, np.float32),
        "x_zero": np.array(120, np.uint8),
    }


def graph_of(
    rows: list[tuple[str, list[str], list[str], dict[str, Any]]], given: Any, shape: list[int]
) -> Any:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, **facts) for op, inputs, outputs, facts in rows],
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in given.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def through_uint8(name: str) -> list[tuple[str, list[str], list[str], dict[str, Any]]]:
    return [
        ("QuantizeLinear", [name, "x_scale", "x_zero"], ["q"], {}),
        ("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"], {}),
        ("DequantizeLinear", ["w", "w.scale"], ["weight"], {"axis": 0}),
    ]


def upsampling() -> tuple[Any, np.ndarray]:
    """Nearest upsampling, uint8, and a convolution with an int8 kernel; and an image."""
    given = constants((OUT, CHANNELS, 3, 3)) | {"sizes": np.array([1, 1, 2, 2], np.float32)}
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    rows = [
        ("Resize", ["x", "", "sizes"], ["large"], how),
        *through_uint8("large"),
        ("Conv", ["d", "weight", "b"], ["y"], {"pads": [1, 1, 1, 1]}),
    ]
    shape = [2, CHANNELS, SIDE, SIDE]
    return graph_of(rows, given, shape), RNG.standard_normal(shape).astype(np.float32)


def gated() -> tuple[Any, np.ndarray]:
    """uint8, a product with an int8 matrix, and GEGLU; and tokens."""
    given = constants((2 * OUT, CHANNELS))
    rows = [
        *through_uint8("x"),
        ("Transpose", ["weight"], ["turned"], {"perm": [1, 0]}),
        ("MatMul", ["d", "turned"], ["product"], {}),
        ("Add", ["product", "b"], ["both"], {}),
        ("Split", ["both"], ["value", "gate"], {"axis": -1, "num_outputs": 2}),
        ("Gelu", ["gate"], ["opened"], {}),
        ("Mul", ["value", "opened"], ["y"], {}),
    ]
    shape = [2, 6, CHANNELS]
    return graph_of(rows, given, shape), RNG.standard_normal(shape).astype(np.float32)


def reference(graph: Any, given: np.ndarray) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    out: np.ndarray = ReferenceEvaluator(graph).run(None, {"x": given})[0]
    return out


def compiled_and_run(model: Any, given: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
    """The output, and how many products and convolutions run in which kernel."""
    ov = pytest.importorskip("openvino")
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = ov.Core().compile_model(model, "CPU", properties)
    kernels: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in ("Convolution", "FullyConnected"):
            kernels[f"{kind} {facts['runtimePrecision'].astype(str)}"] += 1
    return np.array(compiled([given])[0]), kernels


def test_int8_is_multiplied_before_upsampling() -> None:
    ov = pytest.importorskip("openvino")
    graph, image = upsampling()
    expected = reference(graph, image)
    model = ov.Core().read_model(graph.SerializeToString())
    assert openvino_upsample.multiply_before_upsampling(model) == 1
    model.validate_nodes_and_infer_types()
    assert not {op.get_type_name() for op in model.get_ordered_ops()} & {"Interpolate", "Convolution"}
    actual, kernels = compiled_and_run(model, image)
    assert actual.shape == expected.shape
    assert LIMIT.holds(relative_l2(actual, expected))
    assert not LIMIT.holds(relative_l2(actual[:, :, ::-1], expected))
    assert set(kernels) <= {"FullyConnected u8", "FullyConnected i8", "FullyConnected f32"}


def test_other_scales_than_one_are_left_alone() -> None:
    """One scale for each channel depends on the channel, not on the place; but one for each row would not."""
    ov = pytest.importorskip("openvino")
    graph, _ = upsampling()
    model = ov.Core().read_model(graph.SerializeToString())
    from openvino import opset13 as ops

    resize = next(op for op in model.get_ordered_ops() if op.get_type_name() == "Interpolate")
    (entry,) = resize.output(0).get_target_inputs()
    rows = ops.constant(np.ones((1, 1, 2 * SIDE, 1), np.float32))
    entry.replace_source_output(ops.multiply(resize.output(0), rows).output(0))
    assert openvino_upsample.multiply_before_upsampling(model) == 0


def test_scales_of_another_kernel_are_found() -> None:
    ov = pytest.importorskip("openvino")
    graph, image = upsampling()
    expected = reference(graph, image)
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == "w.scale")
    values = np.frombuffer(scale.raw_data, np.float32)
    scale.raw_data = np.roll(values, 1).tobytes()
    model = ov.Core().read_model(graph.SerializeToString())
    assert openvino_upsample.multiply_before_upsampling(model) == 1
    model.validate_nodes_and_infer_types()
    assert not LIMIT.holds(relative_l2(compiled_and_run(model, image)[0], expected))


@pytest.mark.parametrize("wrong", [False, True])
def test_int8_gated_layers_are_split(tmp_path: Path, wrong: bool) -> None:
    ov = pytest.importorskip("openvino")
    from safetensors.numpy import save_file

    graph, tokens = gated()
    from onnx import numpy_helper

    file = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    stored = {name: np.ascontiguousarray(file[name]) for name in ("w", "w.scale", "b")}
    if wrong:
        stored["w.scale"] = np.roll(stored["w.scale"], 1)
    save_file(stored, tmp_path / "weights.safetensors")
    expected = reference(graph, tokens)
    core = ov.Core()
    model = core.read_model(graph.SerializeToString())
    assert openvino_gated.split_gated_linears(core, model, tmp_path / "weights.safetensors") == 1
    model.validate_nodes_and_infer_types()
    actual, _ = compiled_and_run(model, tokens)
    assert actual.shape == expected.shape
    assert LIMIT.holds(relative_l2(actual, expected)) != wrong


def attention(zero: int) -> tuple[Any, np.ndarray]:
    """Self-attention over heads whose queries and keys go through uint8; and tokens."""
    heads, size = 2, CHANNELS // 2
    given = {
        "shape": np.array([2, -1, heads, size], np.int64),
        "x_scale": np.array(0.03, np.float32),
        "x_zero": np.array(zero, np.uint8),
        "factor": np.array(size**-0.5, np.float32),
    }
    rows = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"], {}),
        ("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"], {}),
        ("Reshape", ["d", "shape"], ["parts"], {}),
        ("Reshape", ["x", "shape"], ["exact"], {}),
        ("Transpose", ["parts"], ["query"], {"perm": [0, 2, 1, 3]}),
        ("Transpose", ["parts"], ["key"], {"perm": [0, 2, 3, 1]}),
        ("Transpose", ["exact"], ["value"], {"perm": [0, 2, 1, 3]}),
        ("MatMul", ["query", "key"], ["product"], {}),
        ("Mul", ["product", "factor"], ["scores"], {}),
        ("Softmax", ["scores"], ["weights"], {}),
        ("MatMul", ["weights", "value"], ["y"], {}),
    ]
    shape = [2, 64, CHANNELS]
    return graph_of(rows, given, shape), RNG.standard_normal(shape).astype(np.float32)


def kinds_of_subgraphs(model: Any) -> set[str]:
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    return {
        row["runtimePrecision"].astype(str) for row in facts if row["layerType"].astype(str) == "Subgraph"
    }


def test_queries_and_keys_around_128_are_multiplied_in_int8() -> None:
    ov = pytest.importorskip("openvino")
    graph, tokens = attention(zero=128)
    expected = reference(graph, tokens)
    model = ov.Core().read_model(graph.SerializeToString())
    assert "i8" not in kinds_of_subgraphs(model)
    assert openvino_symmetric.quantize_around_zero(model) == 1
    model.validate_nodes_and_infer_types()
    assert openvino_symmetric.quantize_around_zero(model) == 0
    if "avx512_vnni" in Path("/proc/cpuinfo").read_text():
        assert "i8" in kinds_of_subgraphs(model)
    actual, _ = compiled_and_run(model, tokens)
    assert LIMIT.holds(relative_l2(actual, expected))
    assert not LIMIT.holds(relative_l2(actual[:, :, ::-1], expected))


def test_other_zero_points_are_left_alone() -> None:
    ov = pytest.importorskip("openvino")
    graph, _ = attention(zero=127)
    assert openvino_symmetric.quantize_around_zero(ov.Core().read_model(graph.SerializeToString())) == 0
