"""Where two backends part: an error planted into a weight, and into a node, is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.fidelity import Trial, explain
from kiln.benchmarks.fidelity.calls import read_calls
from kiln.benchmarks.fidelity.components import recording
from kiln.benchmarks.fidelity.layers import OUTPUT, GraphMap, read_map
from kiln.benchmarks.fidelity.probing import probe
from kiln.benchmarks.fidelity.recording import record
from kiln.benchmarks.fidelity.sampling import Sampling
from kiln.benchmarks.fidelity.searching import AT_ONCE, search
from kiln.benchmarks.records.record import Requested, WorkloadFacts
from kiln.bundle import Bundle, open_bundle
from kiln.metrics import relative_l2

OPENVINO = Requested("kiln", "openvino", "CPU", "fp32")
ONNXRUNTIME = Requested("kiln", "onnxruntime", "cpu", "fp32")
TORCH = Requested("kiln", "torch", "cpu", "fp32")
SHORT = Sampling(1, 2, 2)

Plant = Callable[[Path, str, str, Callable[[np.ndarray], np.ndarray]], Bundle]


def test_a_planted_weight_is_named(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path, plant: Plant, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    layer = "up_blocks.1.resnets.0.conv1"
    bundle = plant(tmp_path / "planted", "unet", f"{layer}.weight", lambda w: w * np.float32(1.1))
    found = explain(
        Trial(bundle, ONNXRUNTIME, OPENVINO, workload, against=emoji, recordings=recordings), SHORT
    )
    assert (found["component"], found["layer"], found["kind"]) == ("unet", layer, "jump")
    assert found["layer_error"] > 0.05
    assert found["error_before"] < 1e-5
    assert found["nodes"][-1]["op_type"] == "Conv"
    assert f"jumps to {found['layer_error']:.2g} in {layer} at Conv" in found["text"]


def test_a_planted_operator_is_named(
    emoji: Bundle,
    workload: WorkloadFacts,
    recordings: Path,
    signed: Callable[[Path, str], None],
    tmp_path: Path,
) -> None:
    """The weights are right; one node in the middle of the text encoder computes something else."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "planted"
    shutil.copytree(emoji.path, folder)
    path = folder / "text_encoder/model.onnx"
    model = onnx.load(path, load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    planted = norms[len(norms) // 2]
    next(a for a in planted.attribute if a.name == "epsilon").f = 0.5
    path.write_bytes(model.SerializeToString())
    signed(folder, "text_encoder/model.onnx")
    bundle = open_bundle(folder)
    found = explain(
        Trial(bundle, ONNXRUNTIME, OPENVINO, workload, against=emoji, recordings=recordings), SHORT
    )
    assert (found["component"], found["kind"]) == ("text_encoder", "jump")
    assert planted.input[1].startswith(found["layer"] + ".weight")
    assert found["nodes"][-1]["node"] == planted.name


def test_a_layer_that_gives_nan_is_named(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path, plant: Plant, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    layer = "decoder.layers.6.conv.2"
    bundle = plant(tmp_path / "nan", "vae_decoder", f"{layer}.bias", lambda b: b * np.float32("nan"))
    found = explain(
        Trial(bundle, ONNXRUNTIME, OPENVINO, workload, against=emoji, recordings=recordings), SHORT
    )
    assert (found["component"], found["exceeds"], found["layer"]) == ("vae_decoder", True, layer)
    assert found["layer_error"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["emoji", "tiny_bundle"])
def test_modules_of_torch_and_tensors_of_the_graph_are_the_same(
    name: str, request: pytest.FixtureRequest, workload: WorkloadFacts, tmp_path: Path
) -> None:
    """Every layer of every component, on torch by hooks and on ONNX Runtime by its tensors."""
    pytest.importorskip("torch")
    value = request.getfixturevalue(name)
    bundle = value if isinstance(value, Bundle) else open_bundle(value)
    side = 64 if name == "emoji" else 128
    one = replace(workload, prompts=workload.prompts[:1], width=side, height=side)
    record(bundle, ONNXRUNTIME, one, SHORT, tmp_path / "calls")
    for component in ("text_encoder", "unet", "vae_decoder"):
        layers = [layer.name for layer in read_map(bundle.source(component).graph_path).layers]
        found = []
        for asked in (ONNXRUNTIME, TORCH):
            out = tmp_path / f"{asked.name}.npz"
            probe(bundle, asked, tmp_path / "calls", component, 0, layers, out)
            found.append(np.load(out))
        graph, modules = found
        common = set(graph.files) & set(modules.files)
        assert len(common - {OUTPUT}) > 0.95 * len(layers)
        for layer in common:
            assert relative_l2(modules[layer].ravel(), graph[layer].ravel()) < 1e-4, (component, layer)


def test_looking_inside_leaves_the_output_as_it_is(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path, tmp_path: Path
) -> None:
    with recording(Trial(emoji, ONNXRUNTIME, OPENVINO, workload, recordings=recordings), SHORT) as folder:
        call = next(read_calls(folder, "unet"))
        names = ["conv_in", "conv_out", "no such layer"]
        probe(emoji, ONNXRUNTIME, folder, "unet", 0, names, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert set(file.files) == {OUTPUT, "conv_in", "conv_out"}
        np.testing.assert_allclose(file[OUTPUT], call.outputs["out_sample"], atol=1e-5)
        np.testing.assert_array_equal(file["conv_out"], file[OUTPUT])
    assert not list((emoji.path / "unet").glob("tmp*"))


def chain(count: int) -> GraphMap:
    """``l0 -> l1 -> ...``, products one after the other."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("MatMul", [f"t{i}", f"l{i}.weight"], [f"t{i + 1}"]) for i in range(count)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("t0", f"t{count}")]
    weights = [helper.make_tensor(f"l{i}.weight", TensorProto.FLOAT, [1], [1.0]) for i in range(count)]
    return GraphMap(helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights))


def scripted(
    errors: dict[str, float], output: float
) -> tuple[Callable[[Sequence[str]], dict[str, float]], list[int]]:
    asked: list[int] = []

    def look(names: Sequence[str]) -> dict[str, float]:
        asked.append(len(names))
        return {name: errors[name] for name in names} | {OUTPUT: output}

    return look, asked


@pytest.mark.parametrize("culprit", [0, 1, 23, 24, 250, 498, 499])
def test_the_search_finds_any_layer_of_many_in_few_looks(culprit: int) -> None:
    graph = chain(500)
    names = {layer.name: layer.tensor for layer in graph.layers}
    look, asked = scripted({f"l{i}": 1e-7 if i < culprit else 2e-2 for i in range(500)}, 2e-2)
    found = search(look, graph, names)
    if culprit:
        assert found.layer == f"l{culprit}"
        assert (found.after, found.before) == (f"l{culprit - 1}", 1e-7)
    assert len(asked) <= 4
    assert max(asked) <= AT_ONCE


def test_a_layer_in_a_branch_is_not_blamed_for_what_comes_from_another() -> None:
    """``side`` lies before ``join`` in the file and feeds it; ``main`` is right."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("MatMul", ["x", "main.weight"], ["a"]),
        helper.make_node("MatMul", ["x", "side.weight"], ["b"]),
        helper.make_node("MatMul", ["a", "next.weight"], ["c"]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("MatMul", ["d", "join.weight"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    weights = [
        helper.make_tensor(f"{n}.weight", TensorProto.FLOAT, [1], [1.0])
        for n in ("main", "side", "next", "join")
    ]
    graph = GraphMap(helper.make_graph(nodes, "branches", ports[:1], ports[1:], weights))
    names = {layer.name: layer.tensor for layer in graph.layers}
    look, _ = scripted({"main": 1e-7, "side": 1e-7, "next": 3e-2, "join": 1e-2}, 1e-2)
    found = search(look, graph, names)
    assert (found.layer, found.after) == ("next", "main")


def test_a_layer_with_its_bias_in_a_node_of_its_own() -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["fc.weight"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["product"]),
        helper.make_node("Add", ["product", "fc.bias"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors = [helper.make_tensor(f"fc.{kind}", TensorProto.FLOAT, [1], [1.0]) for kind in ("weight", "bias")]
    (layer,) = GraphMap(helper.make_graph(nodes, "linear", ports[:1], ports[1:], tensors)).layers
    assert (layer.name, layer.tensor) == ("fc", "y")
