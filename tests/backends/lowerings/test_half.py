"""The lowerings "fp16" and "bf16": near the fp32 result, and each value of the type that was promised.

Run with onnx's reference, which rounds after each operator; ONNX Runtime's CPU provider computes most of a
graph typed fp16 in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings import half
from kiln.backends.lowerings.inference import infer, words
from kiln.backends.lowerings.registry import lower
from kiln.benchmarks.parity import THRESHOLDS
from kiln.components import CONTRACTS
from kiln.errors import GraphError

LIMITS = {kind: THRESHOLDS[f"lowered_{kind}_relative_l2"] for kind in ("fp16", "bf16")}
ELEMS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LISTS = [("fp16",), ("bf16",), ("opset17", "fp16"), ("opset22", "bf16")]


# The UNet takes seconds with the reference: once for each type.
EXACT = [
    (names, component)
    for names in LISTS
    for component in CONTRACTS
    if component != "unet" or names in (("opset17", "fp16"), ("bf16",))
]


@pytest.mark.parametrize(("names", "component"), EXACT)
def test_it_stays_near_the_fp32_result(
    names: tuple[str, ...], component: str, lower_tiny: Any, exact_error_of: Any
) -> None:
    model = lower_tiny(names, component, "fp16")
    assert LIMITS[names[-1]].holds(exact_error_of(model, component, "fp16"))


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_planted_error_is_seen(
    component: str, lower_tiny: Any, exact_error_of: Any, plant_epsilon: Any
) -> None:
    model = lower_tiny(("fp16",), component, "fp16")
    plant_epsilon(model)
    assert not LIMITS["fp16"].holds(exact_error_of(model, component, "fp16"))


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize("names", [("fp16",), ("opset17", "fp16")], ids="-".join)
def test_onnx_runtime_runs_it(names: tuple[str, ...], component: str, lower_tiny: Any, error_of: Any) -> None:
    model = lower_tiny(names, component, "fp16")
    assert LIMITS["fp16"].holds(error_of(model, component, "fp16"))


@pytest.mark.parametrize("component", CONTRACTS)
@pytest.mark.parametrize("names", [*LISTS, ("ort_fused", "fp16")], ids="-".join)
def test_types_are_as_promised(
    names: tuple[str, ...], component: str, source_of: Any, shapes: Any, shipped_source: Any, sd1_shapes: Any
) -> None:
    cases = [(source_of(component), shapes)]
    if names[0] == "ort_fused":
        cases.append((shipped_source(component), sd1_shapes))
    for source, sizes in cases:
        before = lower(("static",), source, sizes[component])
        model = lower(names, source, sizes[component])
        for kind in ("input", "output"):
            assert list(getattr(model.graph, kind)) == list(getattr(before.graph, kind))
        types = infer(model)
        for node in model.graph.node:
            elems = [types[name].tensor_type.elem_type for name in node.input if name]
            if node.op_type in half.HEAVY:
                assert set(elems) == {ELEMS[names[-1]]}, node.name
            if node.op_type in ("Sin", "Cos", "Softmax", "InstanceNormalization"):
                assert set(elems) == {TensorProto.FLOAT}, node.name


def test_weights_stored_in_the_type_are_read_without_a_cast(lower_tiny: Any) -> None:
    model = lower_tiny(("fp16",), "unet", "fp16")
    weights = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    cast = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    assert len(weights) > 600
    assert not weights & cast
    assert cast == {"sample", "encoder_hidden_states", "sin", "cos", "out_sample__half"}
    other = lower_tiny(("fp16",), "unet", "fp32")
    assert weights <= {node.input[0] for node in other.graph.node if node.op_type == "Cast"}


def test_the_angles_of_the_timestep_stay_fp32(lower_tiny: Any) -> None:
    """In fp16 an angle near 999 is off by up to a quarter; all before sine and cosine is float32."""
    model = lower_tiny(("fp16",), "unet")
    types = infer(model)
    behind = {"timestep"}
    for node in model.graph.node:
        if behind.intersection(node.input):
            assert {types[name].tensor_type.elem_type for name in node.output} == {TensorProto.FLOAT}, (
                node.name
            )
            if node.op_type not in ("Sin", "Cos"):
                behind.update(node.output)
    assert any(node.op_type == "Cos" and behind.intersection(node.input) for node in model.graph.node)


@pytest.fixture
def lowered(small: Any) -> Callable[..., onnx.ModelProto]:
    """``lowered(nodes, constants, kind="fp16")``: a small graph that reads ``x``, in a 16-bit type."""

    def make(
        nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], kind: str = "fp16"
    ) -> onnx.ModelProto:
        return half.to_half(small(nodes, {"x": (2, 4)}, constants), "unet", kind)

    return make


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_constants_stay_finite_unless_they_are_infinite(kind: str, dtype: Any, lowered: Any) -> None:
    """A causal mask of -3.4e38 would become -inf in fp16, and a row of those NaN."""
    mask = np.array([0, np.finfo(np.float32).min, -math.inf, 1.5], np.float32)
    model = lowered([helper.make_node("Add", ["x", "mask"], ["y"])], {"mask": mask}, kind)
    (tensor,) = model.graph.initializer
    value = onnx.numpy_helper.to_array(tensor)
    assert value.dtype == dtype
    assert [math.isfinite(float(v)) for v in value] == [True, kind == "fp16", False, True]
    assert float(value[3]) == 1.5


def test_a_value_read_by_both_kinds_is_cast_once(lowered: Any, run_exactly: Any, compare: Any) -> None:
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("Exp", ["b"], ["c"]),
        helper.make_node("Softmax", ["a"], ["d"], axis=0),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("Mul", ["a", "e"], ["y"]),
    ]
    model = lowered(nodes, {})
    casts = [list(node.input) for node in model.graph.node if node.op_type == "Cast"]
    assert casts == [["x"], ["a"], ["c"], ["d"], ["y__half"]]
    x = np.arange(8, dtype=np.float32).reshape(2, 4) / 4
    soft = [np.exp(2 * x) / np.exp(2 * x).sum(axis, keepdims=True) for axis in (-1, 0)]
    expected = 2 * x * (np.exp(soft[0]) + soft[1])
    assert LIMITS["fp16"].holds(compare(run_exactly(model, {"x": x}), [expected]))


def test_casts_to_float_become_casts_to_the_type(lowered: Any) -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=-1),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    model = lowered(nodes, {})
    (cast,) = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "i"]
    assert helper.get_attribute_value(cast.attribute[0]) == TensorProto.FLOAT16


def test_a_product_that_cannot_be_half_is_an_error(lowered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "ISLANDS", half.ISLANDS | words("MatMul"))
    constants = {"w": np.ones((4, 4), np.float32)}
    with pytest.raises(GraphError, match="MatMul"):
        lowered([helper.make_node("MatMul", ["x", "w"], ["y"])], constants)
