"""The lowering "static": the same results, nothing dynamic left, and clear refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings.inference import infer, static_shape
from kiln.backends.lowerings.registry import lower
from kiln.backends.lowerings.static import is_static, make_static
from kiln.benchmarks.parity import THRESHOLDS
from kiln.components import CONTRACTS
from kiln.errors import GraphError, SessionError

LIMIT = THRESHOLDS["lowered_relative_l2"]


@pytest.mark.parametrize("component", CONTRACTS)
def test_it_computes_what_the_canonical_graph_does(component: str, lower_tiny: Any, error_of: Any) -> None:
    assert LIMIT.holds(error_of(lower_tiny(("static",), component), component))


@pytest.mark.parametrize("component", CONTRACTS)
def test_a_planted_error_is_seen(component: str, lower_tiny: Any, error_of: Any, plant_epsilon: Any) -> None:
    model = lower_tiny(("static",), component)
    plant_epsilon(model)
    assert not LIMIT.holds(error_of(model, component))


@pytest.mark.parametrize("component", CONTRACTS)
def test_nothing_dynamic_is_left(component: str, source_of: Any, shapes: Any, lower_tiny: Any) -> None:
    before = lower((), source_of(component), {})
    model = lower_tiny(("static",), component)
    assert is_static(model)
    assert not is_static(before)
    assert not {"Shape", "Size", "Range", "ConstantOfShape"} & {node.op_type for node in model.graph.node}
    types = infer(model)
    assert all(static_shape(types, name) is not None for name in types)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Reshape":
            sizes = onnx.numpy_helper.to_array(constants[node.input[1]])
            assert (sizes > 0).all()
    for port in CONTRACTS[component].inputs:
        assert static_shape(types, port.name) == shapes[component][port.name]


def test_the_graph_given_is_not_changed(source_of: Any, shapes: Any) -> None:
    model = lower((), source_of("unet"), {})
    before = model.SerializeToString(deterministic=True)
    make_static(model, shapes["unet"])
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_weights_stay_references(source_of: Any, shapes: Any, stored: str) -> None:
    source = source_of("unet", stored)
    before = {
        t.name: t.SerializeToString() for t in lower((), source, {}).graph.initializer if t.external_data
    }
    model = lower(("static",), source, shapes["unet"])
    after = {t.name: t.SerializeToString() for t in model.graph.initializer if t.external_data}
    assert after == before
    assert model.ByteSize() < 2_000_000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sample": (2, 4, 8)}, "does not fit the graph's input sample"),
        ({"sample": (2, 5, 8, 16)}, "does not fit the graph's input sample"),
        ({"sample": (2, 4, 0, 24)}, "does not fit the graph's input sample"),
        ({"sample": (1, 4, 8, 16)}, "batch_size is"),
        ({"strange": (1,)}, "exactly"),
    ],
    ids=["rank", "channels", "zero", "batch", "name"],
)
def test_shapes_that_do_not_fit_are_refused(
    source_of: Any, shapes: Any, change: dict[str, tuple[int, ...]], text: str
) -> None:
    with pytest.raises(SessionError, match=text):
        lower(("static",), source_of("unet"), shapes["unet"] | change)


def test_a_missing_shape_is_refused(source_of: Any, shapes: Any) -> None:
    given = {name: shape for name, shape in shapes["unet"].items() if name != "timestep"}
    with pytest.raises(SessionError, match="exactly"):
        lower(("static",), source_of("unet"), given)


def tiny(nodes: list[Any], outputs: list[Any], constants: tuple[Any, ...] = ()) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_a_shape_that_depends_on_values_is_refused() -> None:
    found = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "many"])
    with pytest.raises(GraphError, match="depend on values"):
        make_static(tiny([helper.make_node("NonZero", ["x"], ["y"])], [found]), {"x": (3, 4)})


def test_random_values_and_outputs_are_not_folded() -> None:
    sizes = onnx.numpy_helper.from_array(np.array([2, 3], np.int64), "sizes")
    nodes = [
        helper.make_node("RandomUniform", [], ["noise"], shape=[1, 4]),
        helper.make_node("Add", ["x", "noise"], ["y"]),
        helper.make_node("Add", ["sizes", "sizes"], ["z"]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("z", TensorProto.INT64, [2]),
    ]
    model = make_static(tiny(nodes, outputs, (sizes,)), {"x": (3, 4)})
    assert [node.op_type for node in model.graph.node] == ["RandomUniform", "Add", "Add"]


def test_equal_constants_are_kept_once() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s1"]),
        helper.make_node("Shape", ["x"], ["s2"]),
        helper.make_node("Concat", ["s1", "s2"], ["both"], axis=0),
        helper.make_node("ReduceSum", ["both"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "number"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    model = make_static(tiny(nodes, [output]), {"x": (3, 4)})
    assert [node.op_type for node in model.graph.node] == ["Mul"]
    (constant,) = model.graph.initializer
    assert onnx.numpy_helper.to_array(constant) == 14.0
