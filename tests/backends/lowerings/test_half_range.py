"""The lowering "fp16" stays finite where a plain conversion leaves the range of fp16.

Run with onnx's reference, which rounds after each operator; ONNX Runtime's CPU provider computes most of a
graph typed fp16 in fp32 and would not show an overflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kiln.backends.base import GraphSource
from kiln.backends.lowerings import half
from kiln.backends.lowerings.registry import lower
from kiln.benchmarks.parity import THRESHOLDS
from kiln.exporters.binding import bind
from kiln.exporters.weights import place, write_weights

LIMITS = {kind: THRESHOLDS[f"lowered_{kind}_relative_l2"] for kind in ("fp16", "bf16")}
HALF_MAX = float(np.finfo(np.float16).max)


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
