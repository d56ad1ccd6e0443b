"""The lowering "ort_fused" computes the same, by ONNX Runtime's kernels and by their specification.

MultiHeadAttention, SkipLayerNormalization, BiasGelu, FastGelu and QuickGelu have kernels for the CPU.
GroupNorm and BiasSplitGelu have none, so functions stand for them that say in standard operators what their
documentation (ONNX Runtime, docs/ContribOperators.md) says in words.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings import fuse_mlp
from kiln.backends.lowerings.inference import MICROSOFT, infer
from kiln.backends.lowerings.ort_fused import CUDA_OPTIONS, to_ort_fused
from kiln.backends.lowerings.registry import lower
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
def test_it_computes_what_the_canonical_graph_does(component: str, lower_tiny: Any, error_of: Any) -> None:
    model = specified(lower_tiny(("ort_fused",), component, "fp16"))
    assert LIMIT.holds(error_of(model, component, "fp16"))


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_planted_error_is_seen(component: str, lower_tiny: Any, error_of: Any, plant_epsilon: Any) -> None:
    model = specified(lower_tiny(("ort_fused",), component))
    plant_epsilon(model)
    assert not LIMIT.holds(error_of(model, component))


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
def test_an_error_in_one_operator_is_seen(kind: str, change: Any, lower_tiny: Any, error_of: Any) -> None:
    model = lower_tiny(("ort_fused",), "unet")
    for node in model.graph.node:
        if node.op_type == kind:
            change(node)
    assert not LIMIT.holds(error_of(specified(model), "unet"))


@pytest.mark.usefixtures("tiny_widths")
@pytest.mark.parametrize("component", CONTRACTS)
def test_in_fp16_it_stays_near(component: str, lower_tiny: Any, error_of: Any) -> None:
    model = lower_tiny(("ort_fused", "fp16"), component, "fp16")
    types = infer(model)
    for node in model.graph.node:
        if node.op_type == "GroupNorm":
            elems = [types[name].tensor_type.elem_type for name in node.input]
            assert elems == [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT]
        elif node.domain == MICROSOFT:
            elems = {types[name].tensor_type.elem_type for name in node.input if name}
            assert elems == {TensorProto.FLOAT16}
    assert HALF_LIMIT.holds(error_of(specified(model), component, "fp16"))


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


def test_widths_that_the_kernel_does_not_have_stay(lower_tiny: Any) -> None:
    model = lower_tiny(("ort_fused",), "unet")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BiasSplitGelu"] == 0
    assert kinds["Gelu"] == kinds["MultiHeadAttention"] // 2


def test_a_graph_that_is_not_static_is_refused(source_of: Any) -> None:
    with pytest.raises(GraphError, match="static"):
        to_ort_fused(lower((), source_of("unet"), {}))


def test_the_options_for_the_provider_are_said() -> None:
    assert CUDA_OPTIONS == {"enable_skip_layer_norm_strict_mode": "1", "prefer_nhwc": "1"}
