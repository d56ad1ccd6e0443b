"""Multiplications of each operand, against what torch counts of diffusers' module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kiln
from kiln.bundle import open_bundle
from kiln.exporters.graphs import find_graph
from kiln.exporters.quantization.multiplications import multiplications
from kiln.exporters.quantization.plan import unet_activations, weight_sites

EMOJI = Path(kiln.__file__).parent / "models/emoji"
BATCH, SIDE, TOKENS = 2, 16, 32
FEEDS = {
    "sample": np.zeros((BATCH, 4, SIDE, SIDE), np.float32),
    "timestep": np.array(500, np.float32),
    "encoder_hidden_states": np.zeros((BATCH, TOKENS, 256), np.float32),
}


def counted_by_torch() -> tuple[dict[str, int], int]:
    """Multiplications by layer, and those of all queries with keys; a flop of torch's is half of one."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from kiln.backends.torch_modules import call_module, load_module

    module = load_module(open_bundle(EMOJI).source("unet"), torch.float32, torch.device("cpu"))
    feeds = {name: torch.from_numpy(array) for name, array in FEEDS.items()}
    # Written out, so that scores are a product of their own.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call_module("unet", module, feeds)
    counts = {name: dict(by_operator) for name, by_operator in counter.get_flop_counts().items()}
    layers, scores = {}, 0
    for name, found in counts.items():
        inside = name.removeprefix("UNet2DConditionModel.")
        layers[f"{inside}.weight"] = sum(found.values()) // 2
        if inside.endswith((".attn1", ".attn2")):
            scores += sum(count for op, count in found.items() if "bmm" in str(op)) // 2
    return layers, scores // 2  # the other half is the weights of the softmax with the values


def sizes_of(names: list[str]) -> dict[str, int]:
    """Values of some tensors of the bundled UNet, from onnxruntime."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = EMOJI / "unet/model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {name: array.size for name, array in zip(names, session.run(names, FEEDS), strict=True)}


def test_a_query_whose_key_stays_costs_its_own_values() -> None:
    graph = find_graph("unet", json.loads((EMOJI / "unet/config.json").read_text()))
    sites = weight_sites("unet", graph)
    able = [
        operand for operand in unet_activations(graph, sites) if not operand.layer.endswith(".scores.key")
    ]
    sizes = {operand.tensor: 1000 + index for index, operand in enumerate(able)}
    found = multiplications(graph, sites, able, sizes, BATCH)
    queries = [operand for operand in able if operand.layer.endswith(".scores.query")]
    assert queries
    assert {o.layer: found[o.layer] for o in queries} == {o.layer: sizes[o.tensor] for o in queries}


def test_they_are_those_that_torch_counts() -> None:
    layers, scores = counted_by_torch()
    graph = find_graph("unet", json.loads((EMOJI / "unet/config.json").read_text()))
    sites = weight_sites("unet", graph)
    able = unet_activations(graph, sites)
    sizes = sizes_of(list(dict.fromkeys(operand.tensor for operand in able)))
    found = multiplications(graph, sites, able, sizes, BATCH)
    products = {layer: count for layer, count in found.items() if ".scores." not in layer}
    assert products == {layer: layers[layer] for layer in products}
    assert sum(count for layer, count in found.items() if ".scores." in layer) == scores
    assert scores > 0
    assert len({operand.layer for operand in able}) == len(found)
    for node in graph.graph.node:  # the planted error
        kept = [attribute for attribute in node.attribute if attribute.name != "strides"]
        del node.attribute[:]
        node.attribute.extend(kept)
    planted = multiplications(graph, sites, able, sizes, BATCH)
    wrong = {layer for layer in products if planted[layer] != layers[layer]}
    assert wrong == {layer for layer in products if ".downsamplers." in layer} != set()
