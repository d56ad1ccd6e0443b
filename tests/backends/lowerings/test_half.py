"""The lowerings "fp16" and "bf16": near the fp32 result, and finite where a plain conversion is not.

Run with onnx's reference, which rounds after each operator; ONNX Runtime's CPU provider computes most of a
graph typed fp16 in fp32 and would not show an overflow.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.base import GraphSource
from kiln.backends.lowerings import half
from kiln.backends.lowerings.inference import infer, words
from kiln.backends.lowerings.registry import lower
from kiln.backends.lowerings.static import make_static
from kiln.benchmarks.parity import THRESHOLDS
from kiln.components import CONTRACTS
from kiln.errors import GraphError
from kiln.exporters.binding import bind
from kiln.exporters.weights import place, write_weights

LIMITS = {kind: THRESHOLDS[f"lowered_{kind}_relative_l2"] for kind in ("fp16", "bf16")}
ELEMS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
HALF_MAX = float(np.finfo(np.float16).max)
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
    names: tuple[str, ...],
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_exactly: Any,
    canonical_outputs: Any,
    compare: Any,
) -> None:
    source = source_of(component, "fp16")
    model = lower(names, source, shapes[component])
    actual = run_exactly(model, feeds[component], source.weights_path.parent)
    assert LIMITS[names[-1]].holds(compare(actual, canonical_outputs(component, "fp16")))


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_planted_error_is_seen(
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_exactly: Any,
    canonical_outputs: Any,
    compare: Any,
    plant_epsilon: Any,
) -> None:
    source = source_of(component, "fp16")
    model = lower(("fp16",), source, shapes[component])
    plant_epsilon(model)
    actual = run_exactly(model, feeds[component], source.weights_path.parent)
    assert not LIMITS["fp16"].holds(compare(actual, canonical_outputs(component, "fp16")))


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize("names", [("fp16",), ("opset17", "fp16")], ids="-".join)
def test_onnx_runtime_runs_it(
    names: tuple[str, ...],
    component: str,
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    compare: Any,
) -> None:
    source = source_of(component, "fp16")
    actual = run_ort(lower(names, source, shapes[component]), source, feeds[component])
    assert LIMITS["fp16"].holds(compare(actual, canonical_outputs(component, "fp16")))


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


def test_weights_stored_in_the_type_are_read_without_a_cast(source_of: Any, shapes: Any) -> None:
    model = lower(("fp16",), source_of("unet", "fp16"), shapes["unet"])
    weights = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    cast = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    assert len(weights) > 600
    assert not weights & cast
    assert cast == {"sample", "encoder_hidden_states", "sin", "cos", "out_sample__half"}
    other = lower(("fp16",), source_of("unet", "fp32"), shapes["unet"])
    assert weights <= {node.input[0] for node in other.graph.node if node.op_type == "Cast"}


def test_the_angles_of_the_timestep_stay_fp32(source_of: Any, shapes: Any) -> None:
    """In fp16 an angle near 999 is off by up to a quarter; all before sine and cosine is float32."""
    model = lower(("fp16",), source_of("unet"), shapes["unet"])
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


# Overflow


def naive(model: onnx.ModelProto) -> onnx.ModelProto:
    """What a plain converter makes, the one among ONNX Runtime's tools: every float becomes fp16."""
    convert = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for node in copied.graph.node:  # a converter that knows nothing leaves nothing in fp32
        for entry in node.attribute:
            if entry.name == "stash_type":
                entry.i = TensorProto.FLOAT16
    del copied.graph.value_info[:]
    made = convert(copied, keep_io_types=True, op_block_list=[], disable_shape_infer=True)
    inputs = {value.name for value in made.graph.input}
    nodes = sorted(made.graph.node, key=lambda node: not inputs.issuperset(node.input))  # it puts casts last
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def attention_of_sd2(scale_after: bool) -> onnx.ModelProto:
    """One head of 64 channels, as Stable Diffusion 2 has them; whole, or as exporters write it out."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 32, 64)) for name in "qkv"]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 32, 64))
    constants = [onnx.numpy_helper.from_array(np.array(0.125, np.float32), "scale")]
    nodes = [helper.make_node("Attention", ["q", "k", "v"], ["y"])]
    if scale_after:
        nodes = [
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["product"]),
            helper.make_node("Mul", ["product", "scale"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
            helper.make_node("MatMul", ["weights", "v"], ["y"]),
        ]
    graph = helper.make_graph(nodes, "sd2", ports, [output], constants if scale_after else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def large_queries() -> dict[str, np.ndarray]:
    """Products of about 160,000, three times what fp16 holds; after the scale they are about 20,000."""
    from scipy.linalg import hadamard

    rng = np.random.default_rng(2)
    rows = hadamard(64)[:32].astype(np.float32)
    mixed = rows + 0.999 * np.roll(rows, 1, axis=0)
    feeds = {"q": 50 * mixed, "k": 50 * rows, "v": rng.standard_normal((32, 64))}
    return {name: value[None, None].astype(np.float32) for name, value in feeds.items()}


SD2_SHAPES = dict.fromkeys("qkv", (1, 1, 32, 64))


def source_from(model: onnx.ModelProto, folder: Path, component: str = "unet") -> GraphSource:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return GraphSource(component, path, folder / "weights.safetensors", {}, "digest")


@pytest.mark.parametrize("names", [("fp16",), ("opset17", "fp16")], ids="-".join)
def test_large_queries_of_sd2_do_not_overflow(
    names: tuple[str, ...], tmp_path: Path, run_exactly: Any, compare: Any
) -> None:
    feeds = large_queries()
    expected = run_exactly(attention_of_sd2(scale_after=True), feeds)
    assert np.abs(feeds["q"][0, 0] @ feeds["k"][0, 0].T).max() > 2 * HALF_MAX
    model = lower(names, source_from(attention_of_sd2(scale_after=False), tmp_path), SD2_SHAPES)
    assert LIMITS["fp16"].holds(compare(run_exactly(model, feeds), expected))
    (wrong,) = run_exactly(naive(attention_of_sd2(scale_after=True)), feeds)
    assert not np.isfinite(wrong).all()


@pytest.fixture(scope="module")
def hot_decoder(source_of: Any, tmp_path_factory: Any) -> GraphSource:
    """The tiny VAE decoder, stored in fp16, with a residual stream 2 ** 16 times as large.

    Everything that adds to the stream is scaled, and what is linear in it gets its bias scaled; so the
    normalisations give what they gave, and so does the network.
    """
    from safetensors.numpy import load_file

    source = source_of("vae_decoder", "fp32")
    folder = tmp_path_factory.mktemp("hot")
    weights = load_file(source.weights_path)
    factor = np.float32(2.0**16)
    for name in weights:
        adds = name.startswith("decoder.conv_in.") or ".conv2." in name or ".to_out.0." in name
        linear = name.endswith(("conv_shortcut.bias", "upsamplers.0.conv.bias"))
        if adds or linear:
            weights[name] = weights[name] * factor
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    assert all(np.isfinite(value).all() for value in halves.values())
    header, placed = place((name, "F16", value.shape) for name, value in halves.items())
    write_weights(folder / "weights.safetensors", header, (halves[name] for name in placed))
    model = onnx.load(source.graph_path, load_external_data=False)
    return source_from(bind(model, placed), folder, "vae_decoder")


@pytest.mark.parametrize("names", [("fp16",), ("opset17", "fp16")], ids="-".join)
def test_a_vae_whose_activations_pass_65504_stays_finite(
    names: tuple[str, ...],
    hot_decoder: GraphSource,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    run_exactly: Any,
    compare: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, given, folder = shapes["vae_decoder"], feeds["vae_decoder"], hot_decoder.weights_path.parent
    canonical = lower(("static",), hot_decoder, sizes)
    expected = run_ort(canonical, hot_decoder, given)
    watched = onnx.ModelProto()
    watched.CopyFrom(canonical)
    stream = next(
        node.input[0] for node in reversed(canonical.graph.node) if node.op_type == "GroupNormalization"
    )
    watched.graph.output.extend(info for info in canonical.graph.value_info if info.name == stream)
    assert np.abs(run_ort(watched, hot_decoder, given)[-1]).max() > 2 * HALF_MAX
    model = lower(names, hot_decoder, sizes)
    assert LIMITS["fp16"].holds(compare(run_exactly(model, given, folder), expected))
    # The same lowering without the scaling, and a plain converter, leave the range of fp16.
    monkeypatch.setattr(half, "rescale", lambda editor: 0)
    (wrong,) = run_exactly(lower(names, hot_decoder, sizes), given, folder)
    assert not np.isfinite(wrong).all()


def test_the_plain_converter_fails_on_that_vae(
    hot_decoder: GraphSource, shapes: Any, feeds: Any, run_exactly: Any
) -> None:
    model = lower(("static",), hot_decoder, shapes["vae_decoder"])
    onnx.external_data_helper.load_external_data_for_model(model, str(hot_decoder.weights_path.parent))
    (wrong,) = run_exactly(naive(model), feeds["vae_decoder"])
    assert not np.isfinite(wrong).all()


def test_bf16_needs_no_scaling(
    hot_decoder: GraphSource, shapes: Any, feeds: Any, run_ort: Any, run_exactly: Any, compare: Any
) -> None:
    model = lower(("bf16",), hot_decoder, shapes["vae_decoder"])
    expected = run_ort(lower((), hot_decoder, {}), hot_decoder, feeds["vae_decoder"])
    actual = run_exactly(model, feeds["vae_decoder"], hot_decoder.weights_path.parent)
    assert LIMITS["bf16"].holds(compare(actual, expected))
    assert not any("kiln_unscale" in tensor.name for tensor in model.graph.initializer)


# Small graphs


def lowered(nodes: list[Any], constants: dict[str, np.ndarray], kind: str = "fp16") -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return half.to_half(make_static(model, {"x": (2, 4)}), "unet", kind)


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_constants_stay_finite_unless_they_are_infinite(kind: str, dtype: Any) -> None:
    """A causal mask of -3.4e38 would become -inf in fp16, and a row of those NaN."""
    mask = np.array([0, np.finfo(np.float32).min, -math.inf, 1.5], np.float32)
    model = lowered([helper.make_node("Add", ["x", "mask"], ["y"])], {"mask": mask}, kind)
    (tensor,) = model.graph.initializer
    value = onnx.numpy_helper.to_array(tensor)
    assert value.dtype == dtype
    assert [math.isfinite(float(v)) for v in value] == [True, kind == "fp16", False, True]
    assert float(value[3]) == 1.5


def test_a_value_read_by_both_kinds_is_cast_once(run_exactly: Any, compare: Any) -> None:
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


def test_casts_to_float_become_casts_to_the_type() -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=-1),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    model = lowered(nodes, {})
    (cast,) = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "i"]
    assert helper.get_attribute_value(cast.attribute[0]) == TensorProto.FLOAT16


def test_a_product_that_cannot_be_half_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "ISLANDS", half.ISLANDS | words("MatMul"))
    constants = {"w": np.ones((4, 4), np.float32)}
    with pytest.raises(GraphError, match="MatMul"):
        lowered([helper.make_node("MatMul", ["x", "w"], ["y"])], constants)
