"""The lowering "ort_fused" on graphs of a few nodes: what is fused into one operator, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from kiln.backends.lowerings.ort_fused import to_ort_fused
from kiln.benchmarks.parity import THRESHOLDS
from kiln.errors import GraphError

LIMIT = THRESHOLDS["lowered_relative_l2"]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(data, options, providers=providers).run(None, feeds)


@pytest.mark.parametrize(("approximate", "kind"), [("none", "BiasGelu"), ("tanh", "FastGelu")])
def test_a_bias_before_gelu(approximate: str, kind: str, small: Any, compare: Any) -> None:
    rng = np.random.default_rng(6)
    nodes = [
        helper.make_node("Add", ["b", "x"], ["s"]),
        helper.make_node("Gelu", ["s"], ["y"], approximate=approximate),
    ]
    model = small(nodes, {"x": (2, 3, 8)}, {"b": rng.standard_normal(8)})
    fused = to_ort_fused(model)
    assert [node.op_type for node in fused.graph.node] == [kind]
    feeds = {"x": 3 * rng.standard_normal((2, 3, 8), np.float32)}
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))
    assert not LIMIT.holds(compare(run(fused, {"x": feeds["x"] * np.float32(1.01)}), run(model, feeds)))


def test_quick_gelu_keeps_its_slope(small: Any, compare: Any) -> None:
    nodes = [
        helper.make_node("Mul", ["slope", "x"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["g"]),
        helper.make_node("Mul", ["g", "x"], ["y"]),
    ]
    model = small(nodes, {"x": (4, 5)}, {"slope": np.array(1.702)})
    fused = to_ort_fused(model)
    [node] = fused.graph.node
    assert node.op_type == "QuickGelu"
    slope = next(entry.f for entry in node.attribute if entry.name == "alpha")
    assert round(slope, 4) == 1.702
    feeds = {"x": np.linspace(-4, 4, 20, dtype=np.float32).reshape(4, 5)}
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))


def test_the_sum_before_a_normalisation_is_given_on(small: Any, compare: Any) -> None:
    """The sum is read again after the normalisation, as by the residual branch, and has its own bias."""
    rng = np.random.default_rng(7)
    nodes = [
        helper.make_node("Add", ["a", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "b"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["n"], epsilon=0.01),
        helper.make_node("Mul", ["n", "sum"], ["y"]),
    ]
    constants = {name: rng.standard_normal(8) for name in ("bias", "gamma", "beta")}
    model = small(nodes, {"a": (2, 3, 8), "b": (2, 3, 8)}, constants)
    fused = to_ort_fused(model)
    assert [node.op_type for node in fused.graph.node] == ["SkipLayerNormalization", "Mul"]
    feeds = {name: rng.standard_normal((2, 3, 8), np.float32) for name in "ab"}
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))


def test_sums_that_the_kernel_cannot_add_stay(small: Any, compare: Any) -> None:
    """One that is broadcast, and a bias that somebody else reads, too."""
    rng = np.random.default_rng(8)
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["n"]),
        helper.make_node("Add", ["n", "gamma"], ["m"]),
        helper.make_node("Add", ["m", "sum"], ["t"]),
        helper.make_node("LayerNormalization", ["t", "gamma", "beta"], ["o"]),
        helper.make_node("Mul", ["o", "m"], ["y"]),
    ]
    constants = {name: rng.standard_normal(8) for name in ("gamma", "beta")}
    model = small(nodes, {"a": (2, 3, 8), "b": (1, 3, 8)}, constants)
    fused = to_ort_fused(model)
    kinds = [node.op_type for node in fused.graph.node]
    assert kinds == ["Add", "LayerNormalization", "Add", "SkipLayerNormalization", "Mul"]
    assert len(fused.graph.node[3].input) == 4
    feeds = {"a": rng.standard_normal((2, 3, 8), np.float32), "b": rng.standard_normal((1, 3, 8), np.float32)}
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))


def test_groups_of_an_odd_number_stay(small: Any) -> None:
    rng = np.random.default_rng(9)
    nodes = [helper.make_node("GroupNormalization", ["x", "gamma", "beta"], ["y"], num_groups=2)]
    model = small(nodes, {"x": (1, 6, 2, 2)}, {name: rng.standard_normal(6) for name in ("gamma", "beta")})
    assert [node.op_type for node in to_ort_fused(model).graph.node] == ["GroupNormalization"]


def test_attention_without_transpositions_gets_them(small: Any, compare: Any) -> None:
    shape, mask = (2, 3, 7, 8), (2, 1, 7, 7)
    nodes = [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], scale=0.2)]
    model = small(nodes, {"q": shape, "k": shape, "v": shape, "m": mask}, {})
    fused = to_ort_fused(model)
    rng = np.random.default_rng(10)
    feeds = {name: rng.standard_normal(shape, np.float32) for name in "qkv"}
    feeds["m"] = rng.standard_normal(mask, np.float32)
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))
    feeds["m"] = feeds["m"] * np.float32(1.1)
    wrong = run(model, feeds)
    feeds["m"] = feeds["m"] / np.float32(1.1)
    assert not LIMIT.holds(compare(run(fused, feeds), wrong))


def test_a_mask_of_another_kind_is_refused(small: Any) -> None:
    shape = (1, 2, 4, 8)
    nodes = [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])]
    model = small(nodes, {"q": shape, "k": shape, "v": shape, "m": (4, 4)}, {})
    with pytest.raises(GraphError, match="mask"):
        to_ort_fused(model)
