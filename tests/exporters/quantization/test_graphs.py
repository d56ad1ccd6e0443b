"""The graph surgery, run by onnxruntime: what is observed, what is switched on, what is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import kiln
from kiln.exporters.graphs import find_graph
from kiln.exporters.quantization import plan
from kiln.exporters.quantization.observe import Observed, best_range, observing_graph, saturated_share
from kiln.exporters.quantization.plan import decoder_activations, unet_activations, weight_sites
from kiln.exporters.quantization.qdq import Operand, Site, operands, quantize_activations, sites
from kiln.exporters.quantization.quantize import ActivationRange, fake_quantize
from kiln.exporters.quantization.sensitivity import (
    SWITCHES,
    coarse_group,
    fine_group,
    groups_to_keep,
    measure_sensitivity,
    switched_graph,
)

onnxruntime = pytest.importorskip("onnxruntime")
UNET = Path(kiln.__file__).parent / "models/emoji/unet/config.json"


def small_graph(external: bool = False) -> onnx.ModelProto:
    """y = conv(x, k) reshaped, times the transposed m: one Conv, one MatMul behind a Transpose."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "linear.weight": rng.standard_normal((6, 4)).astype(np.float32),
    }
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    if external:
        for tensor in tensors:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["c"], ["t"], name="turn", perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["linear.weight"], ["m"], name="turn_weight", perm=[1, 0]),
        helper.make_node("MatMul", ["t", "m"], ["out_sample"], name="linear"),
    ]
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3, 8, 8]), ("out_sample", [2, 8, 8, 6]))
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


SITES = (
    Site("conv.weight", (4, 3, 3, 3), "Conv", "conv", "x"),
    Site("linear.weight", (6, 4), "MatMul", "linear", "t"),
)
OPERANDS = (Operand("conv.weight", "conv", "x"), Operand("linear.weight", "linear", "t"))
X = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def through(values: np.ndarray, given: ActivationRange) -> np.ndarray:
    return fake_quantize(values, given)


def computed(x_range: ActivationRange | None, t_range: ActivationRange | None) -> np.ndarray:
    """The small graph in parts, with its activations rounded between them."""
    x = X if x_range is None else through(X, x_range)
    model = small_graph()
    model.graph.output.append(helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [2, 8, 8, 4]))
    t = run(model, x=x)["t"]
    weight = onnx.numpy_helper.to_array(model.graph.initializer[1])
    return (t if t_range is None else through(t, t_range)) @ weight.T


RANGES = {"x": ActivationRange(-2.0, 2.5), "t": ActivationRange(-15.0, 12.0)}


def test_sites_are_found_with_their_output_channel_first() -> None:
    assert sites(small_graph(external=True)) == SITES
    assert operands(SITES) == OPERANDS


def test_a_weight_that_is_read_twice_is_left_alone() -> None:
    model = small_graph(external=True)
    model.graph.node.append(helper.make_node("Neg", ["conv.weight"], ["n"], name="second"))
    assert [s.weight for s in sites(model)] == ["linear.weight"]


def test_the_unet_of_the_bundled_model() -> None:
    graph = find_graph("unet", json.loads(UNET.read_text()))
    chosen = weight_sites("unet", graph)
    kinds = {kind: sum(s.op == kind for s in chosen) for kind in ("Conv", "MatMul", "Gemm", "Gather")}
    matmuls = sum(n.op_type == "MatMul" for n in graph.graph.node)
    assert kinds["MatMul"] == matmuls
    assert kinds["Conv"] == sum(n.op_type == "Conv" for n in graph.graph.node) - 2  # first and last
    assert kinds["Gather"] == 0
    assert not any("conv_in" in s.weight or "conv_out" in s.weight for s in chosen)
    able = unet_activations(graph, chosen)
    products = [operand for operand in able if not operand.symmetric]
    assert {operand.layer for operand in products} < {site.weight for site in chosen}
    assert not any("time_emb" in o.layer or "attn2.to_k" in o.layer for o in products)
    assert all(s.shape[0] == graph_shape(graph, s.weight)[0] for s in chosen)


def test_a_tiny_autoencoder_normalizes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the bundled model, which is too small as well."""
    config = UNET.parent.parent / "vae_decoder/config.json"
    graph = find_graph("vae_decoder", json.loads(config.read_text()))
    assert weight_sites("vae_decoder", graph) == ()
    monkeypatch.setattr(plan, "_LEAST_COMPONENT", 0)
    chosen = weight_sites("vae_decoder", graph)
    assert len(chosen) > 10
    assert decoder_activations(chosen) == ()


def graph_shape(graph: onnx.ModelProto, name: str) -> tuple[int, ...]:
    return next(tuple(t.dims) for t in graph.graph.initializer if t.name == name)


def test_quantized_activations_compute_what_numpy_does() -> None:
    model = small_graph()
    quantize_activations(model, OPERANDS, RANGES)
    found = run(model, x=X)["out_sample"]
    expected = computed(RANGES["x"], RANGES["t"])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    planted = computed(ActivationRange(-2.0, 2.7), RANGES["t"])
    assert not np.allclose(found, planted, atol=2e-5 * np.abs(expected).max())


def test_a_site_without_a_range_is_left_alone() -> None:
    model = small_graph()
    quantize_activations(model, OPERANDS, {"t": RANGES["t"]})
    expected = computed(None, RANGES["t"])
    np.testing.assert_allclose(run(model, x=X)["out_sample"], expected, atol=2e-5 * np.abs(expected).max())


def test_switches_turn_groups_on_and_off() -> None:
    made, groups = switched_graph(small_graph(), OPERANDS, RANGES)
    assert groups == ["conv", "linear"]
    for on in ([0, 0], [1, 0], [0, 1], [1, 1]):
        found = run(made, x=X, **{SWITCHES: np.float32(on)})["out_sample"]
        expected = computed(RANGES["x"] if on[0] else None, RANGES["t"] if on[1] else None)
        np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max(), err_msg=str(on))
    other = run(made, x=X, **{SWITCHES: np.float32([1, 0])})["out_sample"]
    assert not np.allclose(other, computed(None, RANGES["t"]), atol=1e-3)


def test_sensitivity_names_the_group_that_hurts() -> None:
    rough = {"x": ActivationRange(-2.0, 2.5), "t": ActivationRange(-300.0, 300.0)}
    made, groups = switched_graph(small_graph(), OPERANDS, rough)
    target = computed(None, None)
    errors, together = measure_sensitivity(lambda feeds: run(made, **feeds), groups, [{"x": X}], [target])
    assert list(errors) == ["linear", "conv"]
    assert errors["linear"] > 2 * errors["conv"] > 0
    assert together >= errors["linear"] * 0.9


def test_groups_are_kept_until_the_rest_is_good_enough() -> None:
    errors = {"a": 0.03, "b": 0.02, "c": 0.01, "d": 0.001}
    costs = dict.fromkeys(errors, 1.0)
    assert groups_to_keep(errors, costs, 0.05, 1.0) == []
    assert groups_to_keep(errors, costs, 0.03, 1.0) == ["a"]
    assert groups_to_keep(errors, costs, 0.005, 1.0) == ["a", "b", "c"]
    assert groups_to_keep(errors, costs, 0.005, 0.5) == ["a", "b"]
    assert groups_to_keep(errors, costs, 0.0, 0.0) == []


def test_what_is_cheap_is_kept_first_and_what_is_too_large_is_passed_over() -> None:
    errors = {"a": 0.03, "b": 0.02, "c": 0.01, "d": 0.001}
    costs = {"a": 100.0, "b": 10.0, "c": 1.0, "d": 10.0}
    assert groups_to_keep(errors, costs, 0.0, 1.0) == ["c", "b", "a", "d"]
    assert groups_to_keep(errors, costs, 0.0305, 1.0) == ["c", "b"]
    # "a" has no room, and beside it "d" makes less of the error than its share of the multiplications.
    assert groups_to_keep(errors, costs, 0.0, 0.2) == ["c", "b"]
    assert groups_to_keep(errors | {"d": 0.02}, costs, 0.0, 0.2) == ["c", "b", "d"]


@pytest.mark.parametrize(
    ("weight", "fine", "coarse"),
    [
        ("conv_in.weight", "conv_in", "conv_in"),
        (
            "down_blocks.1.resnets.0.conv2.weight",
            "down_blocks.1.resnets.0.conv2",
            "down_blocks.1.resnets.0",
        ),
        (
            "down_blocks.1.resnets.0.conv_shortcut.weight",
            "down_blocks.1.resnets.0.conv_shortcut",
            "down_blocks.1.resnets.0.conv_shortcut",
        ),
        (
            "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_out.0.weight",
            "up_blocks.3.attentions.1.attn1",
            "up_blocks.3.attentions.1",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
            "mid_block.attentions.0.ff.net.2",
            "mid_block.attentions.0",
        ),
        (
            "up_blocks.3.attentions.1.transformer_blocks.0.attn1.scores.query",
            "up_blocks.3.attentions.1.attn1.scores",
            "up_blocks.3.attentions.1.scores",
        ),
        ("up_blocks.0.upsamplers.0.conv.weight", "up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0"),
    ],
)
def test_groups_of_layers(weight: str, fine: str, coarse: str) -> None:
    assert (fine_group(weight), coarse_group(weight)) == (fine, coarse)


def test_extremes_are_observed_exactly_and_every_channel_is_sampled() -> None:
    model = small_graph()
    made = observing_graph(model, ["x", "t"])
    observed = Observed(["x", "t"])
    for factor in (1.0, -3.0):
        observed.add(run(made, x=X * np.float32(factor)))
    assert observed.lows["x"] == pytest.approx(float((X * np.float32(-3)).min()))
    assert observed.highs["x"] == pytest.approx(float((X * np.float32(-3)).max()))
    assert set(np.unique(X)) <= set(observed.samples("x").tolist())  # small enough to be kept whole


def test_the_sample_of_a_large_tensor_has_every_channel() -> None:
    rows, channels = 4096, 320
    values = np.broadcast_to(np.arange(channels, dtype=np.float32), (rows, channels))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], name="same")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, channels])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, channels])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    observed = Observed(["y"])
    observed.add(run(observing_graph(model, ["y"]), x=values))
    sample = observed.samples("y")
    assert len(sample) < 5000
    found, counts = np.unique(sample, return_counts=True)
    assert found.tolist() == list(range(channels))
    assert counts.max() <= 3 * counts.min()


def test_the_best_range_cuts_off_what_is_not_worth_it() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.standard_normal(1_000_000), [40.0]).astype(np.float32)
    whole = ActivationRange(float(values.min()), 40.0)
    found = best_range(values, whole)
    assert found.high < 30

    def error(given: ActivationRange) -> float:
        return float(np.mean((fake_quantize(values, given) - values) ** 2))

    assert error(found) < error(whole)
    assert saturated_share(values, found) < 1e-3
    assert saturated_share(values, ActivationRange(-1.0, 1.0)) == pytest.approx(0.3173, abs=0.01)  # 1 sigma
    even = np.linspace(-1, 1, 1000, dtype=np.float32)
    assert best_range(even, ActivationRange(-1.0, 1.0)) == ActivationRange(-1.0, 1.0)
    assert best_range(even, ActivationRange(-1.0, 1.0, symmetric=True)).symmetric
