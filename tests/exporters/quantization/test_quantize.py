"""Weights in int8: the bound on the error, and the values of onnxruntime's quantizer and ONNX's reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kiln.exporters.quantization.qdq import dequantize_node
from kiln.exporters.quantization.quantize import (
    ActivationRange,
    Int8Weight,
    fake_quantize,
    quantize_weight,
    row_scales,
)
from kiln.int8 import SCALE_SUFFIX, dequantized, dequantized_weights

FLOAT32 = float(np.finfo(np.float32).eps)
SHAPES = [(5, 7), (8, 4, 3, 3), (1, 1), (300, 1000)]


def random_weight(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(len(shape) + shape[0])
    channels = rng.uniform(0.01, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.standard_normal(shape) * channels).astype(dtype)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@settings(max_examples=150, deadline=None)
def test_no_value_is_off_by_more_than_half_a_step(weight: np.ndarray) -> None:
    made = quantize_weight(weight)
    assert made.values.dtype == np.int8
    assert made.values.shape == weight.shape
    assert made.scale.dtype == np.float32
    assert made.scale.shape == weight.shape[:1]
    assert (made.scale > 0).all()
    assert np.abs(made.values.astype(int)).max(initial=0) <= 127
    scale = made.scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    error = np.abs(weight.astype(np.float64) - made.values * scale)
    assert (error <= scale * (0.5 + 127 * FLOAT32)).all()


def onnxruntime_quantized(weight: np.ndarray) -> Int8Weight:
    """The same by onnxruntime.quantization, row by row."""
    utils = pytest.importorskip("onnxruntime.quantization.quant_utils")
    rows = [
        utils.quantize_data(row.astype(np.float32).ravel(), onnx.TensorProto.INT8, symmetric=True)
        for row in weight
    ]
    scales, values = [r[-2] for r in rows], [np.asarray(r[-1]) for r in rows]
    return Int8Weight(np.stack(values).reshape(weight.shape), np.float32(scales).reshape(-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_scales_are_those_of_onnxruntime(shape: tuple[int, ...], dtype: type) -> None:
    weight = random_weight(shape, dtype)
    made, expected = quantize_weight(weight), onnxruntime_quantized(weight)
    assert made.values.shape == expected.values.shape
    assert made.values.dtype == expected.values.dtype
    np.testing.assert_allclose(made.scale, expected.scale, rtol=2 * FLOAT32)
    off = made.values.astype(int) - expected.values
    assert np.abs(off).max() <= 1  # a quotient that ends in .5 may fall to either side
    assert np.count_nonzero(off) <= 1e-4 * off.size


@pytest.mark.parametrize("planted", ["axis", "scale"])
def test_a_planted_error_differs_from_onnxruntime(planted: str) -> None:
    weight = random_weight((6, 6))
    wrong = quantize_weight(weight.T) if planted == "axis" else quantize_weight(weight)
    scale = wrong.scale * np.float32(1.01 if planted == "scale" else 1)
    expected = onnxruntime_quantized(weight)
    assert not np.allclose(scale, expected.scale, rtol=1e-4)


def test_a_channel_of_zeros_and_a_tiny_one() -> None:
    weight = np.float32([[0, 0], [1e-42, -1e-42], [3, -3]])
    made = quantize_weight(weight)
    assert made.values[0].tolist() == [0, 0]
    assert made.scale[0] == 1
    assert made.scale[1] > 0
    assert made.values[2].tolist() == [127, -127]
    np.testing.assert_array_equal(row_scales(weight), made.scale)


def reference_dequantized(made: Int8Weight) -> np.ndarray:
    """What ONNX's reference implementation makes of the node that Kiln writes."""
    graph = onnx.helper.make_graph(
        [dequantize_node("w", "y")],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(made.values, "w"),
            onnx.numpy_helper.from_array(made.scale, "w" + SCALE_SUFFIX),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, {})[0])


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_dequantizing_is_what_onnx_says(shape: tuple[int, ...]) -> None:
    made = quantize_weight(random_weight(shape))
    tensors = {"w": made.values, "w" + SCALE_SUFFIX: made.scale}
    found, expected = dequantized("w", tensors), reference_dequantized(made)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    planted = reference_dequantized(Int8Weight(made.values, made.scale[::-1].copy()))
    assert not np.array_equal(found, planted)


def test_a_whole_file_is_dequantized_for_torch_too() -> None:
    torch = pytest.importorskip("torch")
    made = quantize_weight(random_weight((4, 3)))
    bias = np.float16([1, 2])
    # A weight that is called so, and is no scale of anything.
    tensors = {"w": made.values, "w.scale": made.scale, "b": bias, "layer.scale": bias}
    found = dequantized_weights(tensors)
    assert set(found) == {"w", "b", "layer.scale"}
    from_torch = dequantized_weights({name: torch.from_numpy(value) for name, value in tensors.items()})
    assert from_torch["w"].dtype == torch.float32
    np.testing.assert_array_equal(from_torch["w"].numpy(), found["w"])
    assert found["b"] is bias


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-2.5, 2.5)])
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_activations_go_through_uint8_as_onnx_says(bounds: tuple[float, float], symmetric: bool) -> None:
    given = ActivationRange(*bounds, symmetric)
    values = np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [500])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [500])],
        [
            onnx.numpy_helper.from_array(np.array(given.scale, np.float32), "s"),
            onnx.numpy_helper.from_array(np.array(given.zero_point, np.uint8), "z"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    expected = onnx.reference.ReferenceEvaluator(model).run(None, {"x": values})[0]
    np.testing.assert_array_equal(fake_quantize(values, given), expected)
    assert fake_quantize(np.float32([0]), given)[0] == 0
    other = ActivationRange(bounds[0] - 1, bounds[1] + 1, symmetric)
    assert not np.array_equal(fake_quantize(values, other), expected)


def test_a_tensor_of_zeros_stays_one() -> None:
    assert fake_quantize(np.zeros(3, np.float32), ActivationRange(0.0, 0.0)).tolist() == [0, 0, 0]
