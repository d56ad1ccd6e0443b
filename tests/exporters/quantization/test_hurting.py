"""Which weights int8 leaves in floats: by name, on the shipped graphs and on the plan of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import kiln
from kiln.exporters.graphs import find_graph
from kiln.exporters.parts import shipped_config
from kiln.exporters.quantization.hurting import hurting_weights
from kiln.exporters.quantization.plan import (
    FULL,
    WEIGHTS,
    full_plan,
    unet_activations,
    weight_sites,
    weights_plan,
)
from kiln.exporters.quantization.store import Calibration

EMOJI = json.loads((Path(kiln.__file__).parent / "models/emoji/unet/config.json").read_text())
SHORTCUT = "mid_block.resnets.0.conv_shortcut.weight"


def test_the_outermost_blocks_and_the_shortcuts() -> None:
    names = [
        "time_embedding.linear_1.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.1.resnets.0.conv1.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight",
        "down_blocks.10.resnets.0.conv1.weight",
        "mid_block.attentions.0.proj_in.weight",
        "up_blocks.0.resnets.0.conv1.weight",
        "up_blocks.2.resnets.0.conv1.weight",
        "up_blocks.10.attentions.0.proj_in.weight",
    ]
    assert hurting_weights(names) == (names[1], names[3], names[8])
    assert hurting_weights([]) == ()
    assert hurting_weights([SHORTCUT]) == (SHORTCUT,)


@pytest.mark.parametrize("config", [EMOJI, shipped_config("unet")], ids=["bundled", "sd15"])
def test_the_blocks_are_those_that_see_the_image_at_its_full_size(config: dict[str, object]) -> None:
    """onnx's shape inference knows where each convolution runs; names are not asked."""
    graph = find_graph("unet", config)
    shapes = inferred_shapes(graph)
    convolutions = [site for site in weight_sites("unet", graph) if site.op == "Conv"]
    image = ("latent_height", "latent_width")
    full = {s.weight for s in convolutions if shapes[str(s.activation)][2:] == image}
    shortcuts = {s.weight for s in convolutions if "conv_shortcut" in s.weight}
    levels = len(config["block_out_channels"])  # type: ignore[arg-type]
    # It leads into the outermost level, but belongs to the block before: one large kernel.
    upsampler = f"up_blocks.{levels - 2}.upsamplers.0.conv.weight"
    left = set(hurting_weights(site.weight for site in convolutions))
    assert upsampler in full
    assert left == full - {upsampler} | shortcuts


def inferred_shapes(graph: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    inferred = onnx.shape_inference.infer_shapes(graph, data_prop=True).graph
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in inferred.value_info
    }


def test_the_plan_says_what_is_left() -> None:
    graph = find_graph("unet", EMOJI)
    sites = weight_sites("unet", graph)
    plan = weights_plan({"unet": sites, "text_encoder": (), "vae_decoder": ()})
    left = set(plan.weights_kept)
    assert plan.precision == WEIGHTS
    assert [site.weight for site in plan.chosen["unet"]] == [s.weight for s in sites if s.weight not in left]
    assert plan.facts("unet") == {"weights": len(sites) - len(left), "weights_kept": list(plan.weights_kept)}
    assert plan.facts("text_encoder") == {"weights": 0}
    values = {site.weight: int(np.prod(site.shape)) for site in sites}
    assert 0 < sum(values[name] for name in left) < 0.07 * sum(values.values())
    assert not left & set(plan.types("unet"))


def test_with_int8_activations_a_weight_is_left_where_its_activation_is() -> None:
    graph = find_graph("unet", EMOJI)
    sites = weight_sites("unet", graph)
    hurting = hurting_weights(site.weight for site in sites)
    kept = (hurting[0], "mid_block.attentions.0.proj_in.weight")
    chosen = {"unet": sites, "text_encoder": (), "vae_decoder": ()}
    plan = full_plan(chosen, {"unet": unet_activations(graph, sites)}, Calibration("a", "f", {}, kept))
    assert plan.precision == FULL
    assert plan.weights_kept == kept[:1]
    assert {s.weight for s in sites} - {s.weight for s in plan.chosen["unet"]} == {kept[0]}
    assert plan.facts("unet") == {
        "weights": len(sites) - 1,
        "weights_kept": [kept[0]],
        "activations": 0,
        "kept": list(kept),
    }
