"""The lowering "ort_fused" computes the same, by ONNX Runtime's kernels and by their specification.

MultiHeadAttention, SkipLayerNormalization, BiasGelu, FastGelu and QuickGelu have kernels for the CPU.
GroupNorm and BiasSplitGelu have none, so functions stand for them that say in standard operators what their
documentation (ONNX Runtime, docs/ContribOperators.md) says in words.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings import fuse_mlp
from kiln.backends.lowerings.inference import MICROSOFT, infer
from kiln.backends.lowerings.ort_fused import CUDA_OPTIONS, to_ort_fused
from kiln.backends.lowerings.registry import lower
from kiln.backends.lowerings.static import make_static
from kiln.benchmarks.parity import THRESHOLDS
from kiln.components import CONTRACTS
from kiln.errors import GraphError

LIMIT = THRESHOLDS["lowered_relative_l2"]
HALF_LIMIT = THRESHOLDS["lowered_fp16_relative_l2"]
TINY_WIDTHS = (256, 512)
SPECIFIED = "specified"

GROUP_NORM = """
<opset_import: ["" : 21]>
GroupNorm <groups: int, activation: int, epsilon: float = 0.00001, channels_last: int = 1>
(X, gamma, beta) => (Y)
{
    first = Transpose <perm = [0, 3, 1, 2]> (X)
    wide = Cast <to = 1> (first)
    normal = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon> (wide, gamma, beta)
    chosen = Constant <value_int: int = @activation> ()
    silu = Cast <to = 9> (chosen)
    gate = Sigmoid (normal)
    bent = Mul (normal, gate)
    result = Where (silu, bent, normal)
    last = Transpose <perm = [0, 2, 3, 1]> (result)
    Y = CastLike (last, X)
}
"""
BIAS_SPLIT_GELU = """
<opset_import: ["" : 20]>
BiasSplitGelu (X, bias) => (Y)
{
    sum = Add (X, bias)
    left, right = Split <axis = -1, num_outputs = 2> (sum)
    bent = Gelu (right)
    Y = Mul (left, bent)
}
"""


def specified(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose operators without a CPU kernel are functions."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for text in (GROUP_NORM, BIAS_SPLIT_GELU):
        function = onnx.parser.parse_function(
            text.replace("<opset_import", f'<domain: "{SPECIFIED}", opset_import')
        )
        copied.functions.append(function)
        for node in copied.graph.node:
            if node.op_type == function.name and node.domain == MICROSOFT:
                node.domain = SPECIFIED
    copied.opset_import.append(helper.make_opsetid(SPECIFIED, 1))
    return copied


@pytest.fixture
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let BiasSplitGelu take the widths of the tiny network, which its CUDA kernel does not have."""
    monkeypatch.setattr(fuse_mlp, "SPLIT_GELU_WIDTHS", TINY_WIDTHS)


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("component", CONTRACTS)
def test_it_computes_what_the_canonical_graph_does(
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    compare: Any,
) -> None:
    source = source_of(component, "fp16")
    model = specified(lower(("ort_fused",), source, shapes[component]))
    actual = run_ort(model, source, feeds[component])
    assert LIMIT.holds(compare(actual, canonical_outputs(component, "fp16")))


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_planted_error_is_seen(
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    compare: Any,
    plant_epsilon: Any,
) -> None:
    source = source_of(component)
    model = specified(lower(("ort_fused",), source, shapes[component]))
    plant_epsilon(model)
    actual = run_ort(model, source, feeds[component])
    assert not LIMIT.holds(compare(actual, canonical_outputs(component)))


def fact(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(entry for entry in node.attribute if entry.name == name)


def wrong_scale(node: onnx.NodeProto) -> None:
    fact(node, "scale").f *= 1.01


def no_activation(node: onnx.NodeProto) -> None:
    fact(node, "activation").i = 0


def no_bias(node: onnx.NodeProto) -> None:
    del node.input[4:]


PLANTED = [
    ("MultiHeadAttention", wrong_scale),
    ("GroupNorm", no_activation),
    ("SkipLayerNormalization", no_bias),
]


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize(("kind", "change"), PLANTED)
def test_an_error_in_one_operator_is_seen(
    kind: str,
    change: Any,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    compare: Any,
) -> None:
    source = source_of("unet")
    model = lower(("ort_fused",), source, shapes["unet"])
    for node in model.graph.node:
        if node.op_type == kind:
            change(node)
    actual = run_ort(specified(model), source, feeds["unet"])
    assert not LIMIT.holds(compare(actual, canonical_outputs("unet")))


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("component", CONTRACTS)
def test_in_fp16_it_stays_near(
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    compare: Any,
) -> None:
    source = source_of(component, "fp16")
    model = lower(("ort_fused", "fp16"), source, shapes[component])
    types = infer(model)
    for node in model.graph.node:
        if node.op_type == "GroupNorm":
            elems = [types[name].tensor_type.elem_type for name in node.input]
            assert elems == [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT]
        elif node.domain == MICROSOFT:
            elems = {types[name].tensor_type.elem_type for name in node.input if name}
            assert elems == {TensorProto.FLOAT16}
    actual = run_ort(specified(model), source, feeds[component])
    assert HALF_LIMIT.holds(compare(actual, canonical_outputs(component, "fp16")))


# Stable Diffusion 1.5: 16 transformer blocks with two attentions, three normalisations and one GEGLU each; 22
# resnets with two GroupNorm, 16 before the transformers, one at the end. The first normalisation of a block
# follows no sum, the other two do.
EXPECTED = {
    "unet": {
        "MultiHeadAttention": 32,
        "GroupNorm": 61,
        "SkipLayerNormalization": 32,
        "BiasSplitGelu": 16,
        "QuickGelu": 2,
    },
    "text_encoder": {"MultiHeadAttention": 12, "SkipLayerNormalization": 24, "QuickGelu": 12},
    "vae_decoder": {"MultiHeadAttention": 1, "GroupNorm": 30},
    "vae_encoder": {"MultiHeadAttention": 1, "GroupNorm": 22},
}


@pytest.mark.parametrize("component", CONTRACTS)
def test_stable_diffusion_is_fused_whole(component: str, shipped_source: Any, sd1_shapes: Any) -> None:
    model = lower(("ort_fused",), shipped_source(component), sd1_shapes[component])
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, MICROSOFT: 1}
    fused = Counter(node.op_type for node in model.graph.node if node.domain == MICROSOFT)
    assert fused == EXPECTED[component]
    left = {node.op_type for node in model.graph.node if not node.domain}
    assert not left & {"Attention", "GroupNormalization", "Gelu", "Softmax", "Sigmoid"}
    native = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    known = {schema.name: schema for schema in native.get_all_operator_schema() if schema.domain == MICROSOFT}
    for node in model.graph.node:
        if node.domain == MICROSOFT:
            assert {entry.name for entry in node.attribute} <= set(known[node.op_type].attributes)
            assert len(node.input) <= len(known[node.op_type].inputs)
    for node in model.graph.node:
        if node.op_type == "GroupNorm":
            assert fact(node, "activation").i == (0 if ".attentions." in node.input[1] else 1)


def test_widths_that_the_kernel_does_not_have_stay(source_of: Any, shapes: Any) -> None:
    model = lower(("ort_fused",), source_of("unet"), shapes["unet"])
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BiasSplitGelu"] == 0
    assert kinds["Gelu"] == kinds["MultiHeadAttention"] // 2


def small(
    nodes: list[Any], ports: dict[str, tuple[int, ...]], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return make_static(model, ports)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(data, options, providers=providers).run(None, feeds)


@pytest.mark.parametrize(("approximate", "kind"), [("none", "BiasGelu"), ("tanh", "FastGelu")])
def test_a_bias_before_gelu(approximate: str, kind: str, compare: Any) -> None:
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


def test_quick_gelu_keeps_its_slope(compare: Any) -> None:
    nodes = [
        helper.make_node("Mul", ["slope", "x"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["g"]),
        helper.make_node("Mul", ["g", "x"], ["y"]),
    ]
    model = small(nodes, {"x": (4, 5)}, {"slope": np.array(1.702)})
    fused = to_ort_fused(model)
    assert [(node.op_type, round(fact(node, "alpha").f, 4)) for node in fused.graph.node] == [
        ("QuickGelu", 1.702)
    ]
    feeds = {"x": np.linspace(-4, 4, 20, dtype=np.float32).reshape(4, 5)}
    assert LIMIT.holds(compare(run(fused, feeds), run(model, feeds)))


def test_the_sum_before_a_normalisation_is_given_on(compare: Any) -> None:
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


def test_sums_that_the_kernel_cannot_add_stay(compare: Any) -> None:
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


def test_groups_of_an_odd_number_stay(compare: Any) -> None:
    rng = np.random.default_rng(9)
    nodes = [helper.make_node("GroupNormalization", ["x", "gamma", "beta"], ["y"], num_groups=2)]
    model = small(nodes, {"x": (1, 6, 2, 2)}, {name: rng.standard_normal(6) for name in ("gamma", "beta")})
    assert [node.op_type for node in to_ort_fused(model).graph.node] == ["GroupNormalization"]


def test_attention_without_transpositions_gets_them(compare: Any) -> None:
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


def test_a_mask_of_another_kind_is_refused() -> None:
    shape = (1, 2, 4, 8)
    nodes = [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])]
    model = small(nodes, {"q": shape, "k": shape, "v": shape, "m": (4, 4)}, {})
    with pytest.raises(GraphError, match="mask"):
        to_ort_fused(model)


def test_a_graph_that_is_not_static_is_refused(source_of: Any) -> None:
    with pytest.raises(GraphError, match="static"):
        to_ort_fused(lower((), source_of("unet"), {}))


def test_the_options_for_the_provider_are_said() -> None:
    assert CUDA_OPTIONS == {"enable_skip_layer_norm_strict_mode": "1", "prefer_nhwc": "1"}
