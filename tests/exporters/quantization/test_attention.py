"""Which queries and keys are found, and what rounding them does to an attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import kiln
from kiln.exporters.graphs import find_graph
from kiln.exporters.quantization.attention import score_operands
from kiln.exporters.quantization.plan import weight_sites
from kiln.exporters.quantization.qdq import Operand, Site, quantize_activations, sites
from kiln.exporters.quantization.quantize import ActivationRange, fake_quantize

onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

UNET = Path(kiln.__file__).parent / "models/emoji/unet/config.json"
TOKENS, HEADS, SIZE = 12, 2, 4
X = np.random.default_rng(1).standard_normal((2, TOKENS, HEADS * SIZE)).astype(np.float32)
WEIGHTS = {
    f"block.attn1.to_{kind}.weight": np.random.default_rng(seed)
    .standard_normal((HEADS * SIZE, HEADS * SIZE))
    .astype(np.float32)
    for seed, kind in enumerate("qkv")
}
RANGES = {"q": ActivationRange(-5.0, 5.0, symmetric=True), "k": ActivationRange(-6.0, 6.0, symmetric=True)}


def attention_graph(*, bias: bool = False, external: bool = False) -> onnx.ModelProto:
    """Self-attention as diffusers writes it: three linear layers, heads split off, one ``Attention``."""
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()]
    if external:
        for tensor in tensors:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    shape = onnx.numpy_helper.from_array(np.array([2, -1, HEADS, SIZE], np.int64), "heads")
    flat = onnx.numpy_helper.from_array(np.array([2, -1, HEADS * SIZE], np.int64), "flat")
    offset = onnx.numpy_helper.from_array(np.full(HEADS * SIZE, 0.5, np.float32), "bias")
    nodes = []
    for kind in "qkv":
        weight, product = f"block.attn1.to_{kind}.weight", kind
        nodes.append(helper.make_node("Transpose", [weight], [f"{kind}_t"], name=f"{kind}_t", perm=[1, 0]))
        if bias:
            product = f"{kind}_product"
            nodes.append(helper.make_node("Add", [product, "bias"], [kind], name=f"{kind}_add"))
        nodes.insert(
            len(nodes) - bias,
            helper.make_node("MatMul", ["x", f"{kind}_t"], [product], name=f"{kind}_linear"),
        )
        nodes += [
            helper.make_node("Reshape", [kind, "heads"], [f"{kind}_view"], name=f"{kind}_view"),
            helper.make_node(
                "Transpose", [f"{kind}_view"], [f"{kind}_heads"], name=f"{kind}_heads", perm=[0, 2, 1, 3]
            ),
        ]
    nodes += [
        helper.make_node("Attention", [f"{kind}_heads" for kind in "qkv"], ["a"], name="attention"),
        helper.make_node("Transpose", ["a"], ["a_tokens"], name="back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["a_tokens", "flat"], ["y"], name="join"),
    ]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(X.shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [*tensors, shape, flat, offset])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": X})[0])


def computed(ranges: dict[str, ActivationRange]) -> np.ndarray:
    """The same by torch, with queries and keys rounded before."""
    q, k, v = (X @ WEIGHTS[f"block.attn1.to_{kind}.weight"].T for kind in "qkv")
    parts = (fake_quantize(q, ranges["q"]), fake_quantize(k, ranges["k"]), v)
    heads = [torch.from_numpy(p).reshape(2, TOKENS, HEADS, SIZE).transpose(1, 2) for p in parts]
    found = torch.nn.functional.scaled_dot_product_attention(*heads)
    return found.transpose(1, 2).reshape(X.shape).numpy()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_queries_and_keys_are_found_where_the_projection_gives_them(bias: bool) -> None:
    model = attention_graph(bias=bias, external=True)
    assert score_operands(model, sites(model)) == (
        Operand("block.attn1.scores.query", "q_view", "q", symmetric=True),
        Operand("block.attn1.scores.key", "k_view", "k", symmetric=True),
    )


def test_an_attention_whose_weights_stay_is_left_alone() -> None:
    model = attention_graph(external=True)
    chosen = tuple(site for site in sites(model) if "to_q" not in site.weight)
    assert [operand.layer for operand in score_operands(model, chosen)] == ["block.attn1.scores.key"]
    assert score_operands(model, ()) == ()


def test_a_tensor_that_is_no_projection_is_left_alone() -> None:
    model = attention_graph(external=True)
    linear = next(node for node in model.graph.node if node.name == "k_linear")
    linear.op_type = "Mul"
    site = Site("block.attn1.to_q.weight", (8, 8), "MatMul", "q_linear", "x")
    assert [o.tensor for o in score_operands(model, (site,))] == ["q"]


def test_a_rounded_attention_computes_what_torch_does() -> None:
    model = attention_graph()
    chosen = score_operands(attention_graph(external=True), sites(attention_graph(external=True)))
    quantize_activations(model, chosen, RANGES)
    found, expected = run(model), computed(RANGES)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, run(attention_graph()), atol=1e-3)
    planted = computed({**RANGES, "k": ActivationRange(-6.5, 6.5, symmetric=True)})
    assert not np.allclose(found, planted, atol=1e-3)


def test_every_attention_of_the_bundled_unet() -> None:
    graph = find_graph("unet", json.loads(UNET.read_text()))
    found = score_operands(graph, weight_sites("unet", graph))
    attentions = sum(node.op_type == "Attention" for node in graph.graph.node)
    assert len(found) == len({operand.layer for operand in found}) == 2 * attentions
    assert all(operand.layer.endswith((".scores.query", ".scores.key")) for operand in found)
    assert {part for o in found for part in ("attn1", "attn2") if part in o.layer} == {"attn1", "attn2"}
