"""The editor keeps graphs whole: order, dead nodes, names, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings.checks import check
from kiln.backends.lowerings.editor import Editor
from kiln.backends.lowerings.inference import Inference, infer
from kiln.errors import GraphError


def model_of(nodes: list[Any], output: str = "y", opset: int = 23) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, (2, 3))],
        [onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


CHAIN = [
    helper.make_node("Relu", ["x"], ["a"]),
    helper.make_node("Add", ["a", "w"], ["b"]),
    helper.make_node("Sigmoid", ["b"], ["c"]),
    helper.make_node("Mul", ["b", "c"], ["y"]),
]


def test_new_nodes_are_sorted_and_dead_ones_go() -> None:
    editor = Editor(model_of(CHAIN))
    sigmoid = editor.producer("c")
    assert sigmoid is not None
    editor.drop(sigmoid)
    scale = editor.constant(np.array(0.5, np.float32))
    editor.emit("Tanh", [editor.emit("Mul", ["b", scale])], "c")
    editor.emit("Exp", ["x"], "nobody_reads_this")
    model = editor.finish()
    assert [node.op_type for node in model.graph.node] == ["Relu", "Add", "Mul", "Tanh", "Mul"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w", scale}
    assert {value.name for value in model.graph.value_info} >= {"a", "b", "c"}
    check(model, full=True)


def test_looking() -> None:
    editor = Editor(model_of(CHAIN))
    assert [node.op_type for node in editor.live()] == ["Relu", "Add", "Sigmoid", "Mul"]
    assert [node.op_type for node in editor.users("b")] == ["Sigmoid", "Mul"]
    assert editor.only_user("b") is None
    assert editor.only_user("c", "Mul") is not None
    assert editor.only_user("c", "Add") is None
    assert editor.only_user("y") is None
    assert editor.producer("b", "Mul") is None
    assert editor.shape("c") == (2, 3)
    assert editor.is_weight("w")
    assert not editor.is_weight("a")
    assert editor.number("w") is None
    assert editor.number(editor.constant(np.array(2.5, np.float32))) == 2.5


def test_equal_constants_share_a_name_and_others_do_not() -> None:
    editor = Editor(model_of(CHAIN))
    names = [editor.constant(np.array(value, np.float32), "w") for value in (1, 2, 1)]
    assert names[0] == names[2] != names[1]
    assert "w" not in names
    assert editor.constant(np.array([1], np.float32)) not in names


def test_a_value_that_nothing_makes_is_an_error() -> None:
    editor = Editor(model_of(CHAIN))
    sigmoid = editor.producer("c")
    assert sigmoid is not None
    editor.drop(sigmoid)
    with pytest.raises(GraphError, match="reads c, which nothing"):
        editor.finish()


def test_a_cycle_is_an_error() -> None:
    editor = Editor(model_of(CHAIN))
    relu = editor.producer("a")
    assert relu is not None
    editor.drop(relu)
    editor.emit("Relu", ["c"], "a")
    with pytest.raises(GraphError, match="cycle"):
        editor.finish()


def test_a_changed_type_of_an_output_is_an_error() -> None:
    editor = Editor(model_of(CHAIN))
    last = editor.producer("y")
    assert last is not None
    editor.drop(last)
    editor.emit("Cast", ["c"], "y", to=TensorProto.FLOAT16)
    with pytest.raises(GraphError, match="another type"):
        editor.finish()


def test_functions_and_control_flow_are_refused() -> None:
    model = model_of(CHAIN)
    model.functions.add().name = "F"
    with pytest.raises(GraphError, match="functions"):
        Editor(model)
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))])
    condition = helper.make_node(
        "Constant", [], ["yes"], value=helper.make_tensor("v", TensorProto.BOOL, [], [1])
    )
    branch = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(GraphError):
        Editor(model_of([condition, branch]))


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (helper.make_node("NoSuchOperator", ["x"], ["y"]), "NoSuchOperator"),
        (helper.make_node("Conv", ["x", "w"], ["y"]), "Conv"),
        (helper.make_node("Unheard", ["x"], ["y"], domain="com.microsoft"), "no rule"),
        (helper.make_node("Relu", ["z"], ["y"]), "reads z"),
    ],
    ids=["unknown", "refused", "microsoft", "missing"],
)
def test_types_that_cannot_be_inferred_are_errors(node: onnx.NodeProto, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        infer(model_of([node]))


def test_types_are_those_that_onnx_infers() -> None:
    """Node by node as for the whole graph; ``GroupNormalization`` is what onnx itself has no rule for."""
    model = model_of(CHAIN)
    whole = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    ours = infer(model)
    assert {value.name: value.type for value in whole.graph.value_info} == {
        name: ours[name] for name in "abc"
    }
    norm = helper.make_node("GroupNormalization", ["x", "w", "w"], ["y"], num_groups=3)
    assert infer(model_of([norm]))["y"] == model.graph.input[0].type
    inference = Inference(model)
    assert set(inference.small) == {"w"}
