"""The lowerings "opset17" and "opset22": primitives that compute the same, of those MIGraphX imports."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.lowerings.decompose import split_attention, split_scale
from kiln.backends.lowerings.editor import Editor
from kiln.backends.lowerings.inference import static_shape, words
from kiln.backends.lowerings.primitives import OPERATORS, to_primitives
from kiln.backends.lowerings.registry import lower
from kiln.backends.lowerings.static import make_static
from kiln.benchmarks.parity import THRESHOLDS
from kiln.components import CONTRACTS
from kiln.errors import GraphError

LIMIT = THRESHOLDS["lowered_relative_l2"]
OPSETS = [("opset17", 17, 8), ("opset22", 22, 10)]
# AMDMIGraphX's own list of what it does not import, and its limits.
REFUSED = words(
    """
    Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress DFT STFT
    DeformConv Det MaxUnpool Mish Swish Optional OptionalGetElement SequenceAt SequenceConstruct StringConcat
    """
)


@pytest.mark.parametrize("component", CONTRACTS)
@pytest.mark.parametrize(("name", "stored"), [("opset17", "fp16"), ("opset22", "fp32")])
def test_it_computes_what_the_canonical_graph_does(
    name: str, component: str, stored: str, lower_tiny: Any, error_of: Any
) -> None:
    assert LIMIT.holds(error_of(lower_tiny((name,), component, stored), component, stored))


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_planted_error_is_seen(component: str, lower_tiny: Any, error_of: Any, plant_epsilon: Any) -> None:
    model = lower_tiny(("opset17",), component)
    plant_epsilon(model)
    assert not LIMIT.holds(error_of(model, component))


@pytest.mark.parametrize("component", CONTRACTS)
@pytest.mark.parametrize(("name", "opset", "ir"), OPSETS)
def test_only_primitives_of_the_opset_are_left(
    name: str, opset: int, ir: int, component: str, shipped_source: Any, sd1_shapes: Any
) -> None:
    model = lower((name,), shipped_source(component), sd1_shapes[component])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == ir
    assert not model.functions
    used = {node.op_type for node in model.graph.node}
    assert used <= OPERATORS
    assert not used.intersection(REFUSED)
    assert not used & {"Attention", "GroupNormalization", "Gelu", "Shape"}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert not node.domain
        schema = onnx.defs.get_schema(node.op_type, opset)  # raises for an operator that came later
        assert schema.since_version <= opset
        assert {entry.name for entry in node.attribute} <= set(schema.attributes)
        if node.op_type in ("Slice", "Squeeze", "Unsqueeze", "Expand", "Tile", "Split", "Reshape", "Resize"):
            assert {source for source in node.input[1:] if source} <= constants
    assert not OPERATORS.intersection(REFUSED)


def test_ports_and_weights_keep_their_names(shipped_source: Any, sd1_shapes: Any) -> None:
    for component in CONTRACTS:
        before = lower((), shipped_source(component), {})
        after = lower(("opset17",), shipped_source(component), sd1_shapes[component])
        for kind in ("input", "output"):
            old, new = getattr(before.graph, kind), getattr(after.graph, kind)
            assert [value.name for value in new] == [value.name for value in old]
            elems = [value.type.tensor_type.elem_type for value in old]
            assert [value.type.tensor_type.elem_type for value in new] == elems
        weights = [
            {t.name: t.SerializeToString() for t in model.graph.initializer if t.external_data}
            for model in (before, after)
        ]
        assert weights[0] == weights[1]


def attention(
    query: tuple[int, ...], tokens: int, mask: tuple[int, ...] | None = None, kind: int = 1, **facts: Any
) -> onnx.ModelProto:
    """One Attention whose queries, keys and values are inputs."""
    other = (query[0], query[1], tokens, query[3])
    ports = {"q": (query, 1), "k": (other, 1), "v": (other, 1)} | ({"m": (mask, kind)} if mask else {})
    graph = helper.make_graph(
        [helper.make_node("Attention", list(ports), ["y"], **facts)],
        "attention",
        [helper.make_tensor_value_info(name, elem, shape) for name, (shape, elem) in ports.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, query)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def attention_feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(1), {}
    for value in model.graph.input:
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        if value.type.tensor_type.elem_type == TensorProto.BOOL:
            feeds[value.name] = rng.uniform(size=shape) < 0.7
            feeds[value.name][..., 0] = True
        else:
            feeds[value.name] = rng.standard_normal(shape, np.float32)
    return feeds


def split(model: onnx.ModelProto, limit: int) -> onnx.ModelProto:
    editor = Editor(model)
    split_attention(editor, limit)
    return editor.finish()


MASKS: list[tuple[tuple[int, ...] | None, int]] = [
    (None, 1),
    ((7, 5), 1),
    ((2, 1, 7, 5), 1),
    ((1, 3, 1, 5), 1),
    ((2, 3, 7, 5), 9),
]


@pytest.mark.parametrize(("mask", "kind"), MASKS, ids=str)
@pytest.mark.parametrize("limit", [10**9, 2 * 3 * 5 * 3, 1], ids=["whole", "parts", "rows"])
def test_attention_in_parts_is_attention(
    mask: tuple[int, ...] | None, kind: int, limit: int, run_exactly: Any, compare: Any
) -> None:
    model = attention((2, 3, 7, 16), 5, mask, kind, scale=0.3)
    feeds = attention_feeds(model)
    lowered = split(model, limit)
    expected = run_exactly(model, feeds)
    assert LIMIT.holds(compare(run_exactly(lowered, feeds), expected))
    parts = {10**9: 1, 90: 3, 1: 7}[limit]
    assert Counter(node.op_type for node in lowered.graph.node)["Softmax"] == parts
    largest = max(
        np.prod(static_shape(Editor(lowered).types, node.output[0]))
        for node in lowered.graph.node
        if node.op_type == "Softmax"
    )
    assert largest <= max(limit, 2 * 3 * 5)
    feeds["q"] = feeds["q"] * np.float32(1.01)
    assert not LIMIT.holds(compare(run_exactly(lowered, feeds), expected))


@pytest.mark.parametrize("scale", [0.125, 1 / np.sqrt(40), 1 / np.sqrt(512), 1.0, 3.0])
def test_the_scale_is_split_with_one_rounding_at_most(scale: float) -> None:
    first, second = split_scale(scale)
    assert np.log2(first) == round(np.log2(first))
    assert first * second == pytest.approx(scale, rel=1e-12)
    assert 0.49 < first / second < 2.01
    if scale in (0.125, 1.0):
        assert np.float16(first) * np.float16(second) == np.float16(scale)


@pytest.mark.parametrize(
    "facts", [{"is_causal": 1}, {"softcap": 5.0}, {"scale": -1.0}], ids=["causal", "cap", "negative"]
)
def test_attention_that_no_network_has_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(GraphError, match="Attention"):
        to_primitives(make_static(attention((1, 2, 4, 8), 4, **facts), SHAPES_OF_ATTENTION), 17)


SHAPES_OF_ATTENTION = dict.fromkeys("qkv", (1, 2, 4, 8))


def one(kind: str, inputs: dict[str, tuple[int, ...]], facts: dict[str, Any]) -> onnx.ModelProto:
    """A static model of one node."""
    graph = helper.make_graph(
        [helper.make_node(kind, list(inputs), ["y"], **facts)],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return make_static(model, inputs)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_forms_of_gelu(approximate: str, run_exactly: Any, compare: Any) -> None:
    model = one("Gelu", {"x": (3, 50)}, {"approximate": approximate})
    feeds = {"x": np.linspace(-6, 6, 150, dtype=np.float32).reshape(3, 50)}
    lowered = to_primitives(model, 17)
    expected = run_exactly(model, feeds)
    assert LIMIT.holds(compare(run_exactly(lowered, feeds), expected))
    other = run_exactly(one("Gelu", {"x": (3, 50)}, {"approximate": "tanh"}), feeds)
    assert LIMIT.holds(compare(other, expected)) == (approximate == "tanh")


def test_an_operator_without_a_form_is_refused() -> None:
    with pytest.raises(GraphError, match="Swish"):
        to_primitives(one("Swish", {"x": (2, 3)}, {}), 17)
    with pytest.raises(GraphError, match="RMSNormalization"):
        to_primitives(one("RMSNormalization", {"x": (2, 3), "scale": (3,)}, {}), 17)


def test_a_new_attribute_is_dropped_only_if_it_says_nothing() -> None:
    plain = to_primitives(one("Cast", {"x": (2, 3)}, {"to": TensorProto.FLOAT, "saturate": 1}), 17)
    assert [entry.name for entry in plain.graph.node[0].attribute] == ["to"]
    with pytest.raises(GraphError, match="saturate"):
        to_primitives(one("Cast", {"x": (2, 3)}, {"to": TensorProto.FLOAT, "saturate": 0}), 17)


def test_resizing_that_migraphx_cannot_is_refused() -> None:
    sizes = onnx.numpy_helper.from_array(np.array([1, 1, 8, 8], np.int64), "sizes")
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="cubic")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 8, 8))],
        [sizes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(GraphError, match="cubic"):
        to_primitives(make_static(model, {"x": (1, 1, 4, 4)}), 17)


def test_a_graph_that_is_not_static_is_refused(source_of: Any) -> None:
    with pytest.raises(GraphError, match="static"):
        to_primitives(lower((), source_of("unet"), {}), 17)
