"""Scaling what only reaches normalisations changes no result, and touches nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings.editor import Editor
from kiln.backends.lowerings.rescale import FACTOR, rescale
from kiln.benchmarks.parity import THRESHOLDS

LIMIT = THRESHOLDS["lowered_relative_l2"]


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("names", [("static",), ("opset17",)], ids="-".join)
def test_in_fp32_the_result_is_the_same(
    names: tuple[str, ...], component: str, lower_tiny: Any, error_of: Any
) -> None:
    editor = Editor(lower_tiny(names, component))
    norms = len(editor.live("GroupNormalization", "InstanceNormalization"))
    assert rescale(editor) == norms > 0
    assert LIMIT.holds(error_of(editor.finish(), component))


def test_without_the_epsilon_it_is_not(lower_tiny: Any, error_of: Any) -> None:
    editor = Editor(lower_tiny(("static",), "vae_decoder"))
    found = [
        (entry, entry.f)
        for node in editor.live("GroupNormalization")
        for entry in node.attribute
        if entry.name == "epsilon"
    ]
    rescale(editor, 2.0**-9)
    for entry, epsilon in found:
        entry.f = epsilon
    assert not LIMIT.holds(error_of(editor.finish(), "vae_decoder"))


def network(extra: list[Any], output: str) -> onnx.ModelProto:
    """Two convolutions, a sum and a normalisation; ``extra`` reads what is inside."""
    rng = np.random.default_rng(3)
    constants = {
        "w1": rng.standard_normal((8, 4, 3, 3)),
        "b1": rng.standard_normal(8),
        "w2": rng.standard_normal((8, 8, 1, 1)),
        "b2": rng.standard_normal(8),
        "gamma": rng.standard_normal(8),
        "beta": rng.standard_normal(8),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["first"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["first", "w2", "b2"], ["second"]),
        helper.make_node("Add", ["first", "second"], ["sum"]),
        helper.make_node(
            "GroupNormalization", ["sum", "gamma", "beta"], ["normal"], num_groups=4, epsilon=0.1
        ),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 6, 6))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, (1, 8, 6, 6))],
        [onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


CASES = {
    "nothing else": ([], "normal"),
    "a bent reader": (
        [helper.make_node("Relu", ["first"], ["bent"]), helper.make_node("Add", ["bent", "normal"], ["y"])],
        "y",
    ),
    "a linear reader": (
        [
            helper.make_node("Conv", ["sum", "w2", "b2"], ["c"]),
            helper.make_node("Mul", ["c", "normal"], ["y"]),
        ],
        "y",
    ),
    "the output": ([], "sum"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_readers_see_what_they_saw(case: str, run_exactly: Any, compare: Any) -> None:
    model = network(*CASES[case])
    feeds = {"x": np.random.default_rng(4).standard_normal((1, 4, 6, 6), np.float32)}
    editor = Editor(model)
    # What is given out keeps its size, and then so does the normalisation that reads it.
    assert rescale(editor) == (0 if case == "the output" else 1)
    scaled = editor.finish()
    expected = run_exactly(model, feeds)
    assert LIMIT.holds(compare(run_exactly(scaled, feeds), expected))
    unscaled = [node for node in scaled.graph.node if any("kiln_unscale" in name for name in node.input)]
    assert (
        len(unscaled) == {"nothing else": 0, "a bent reader": 1, "a linear reader": 1, "the output": 0}[case]
    )


def test_the_stream_is_smaller_by_the_factor(run_exactly: Any) -> None:
    model = network(*CASES["nothing else"])
    feeds = {"x": np.random.default_rng(5).standard_normal((1, 4, 6, 6), np.float32)}
    editor = Editor(model)
    rescale(editor)
    found = []
    for graph in (model, editor.finish()):
        watched = onnx.ModelProto()
        watched.CopyFrom(graph)
        watched.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))
        found.append(run_exactly(watched, feeds)[-1])
    np.testing.assert_array_equal(found[1], found[0] * np.float32(FACTOR))


def test_a_graph_without_normalisations_stays_as_it_is() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2,))],
    )
    editor = Editor(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    assert rescale(editor) == 0
    assert [node.op_type for node in editor.finish().graph.node] == ["Relu"]
