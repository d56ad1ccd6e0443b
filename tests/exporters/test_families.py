"""Families told apart by shapes: real key lists, diffusers' classes, and other architectures refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kiln.errors import CheckpointError
from kiln.exporters.families import FAMILIES, foreign_family, identify_unet, require_readable

Shapes = dict[str, tuple[int, ...]]

REAL = {
    "UNET-v1-SD": ("sd1", "", 4),
    "UNET-v1-Inpainting": ("sd1", "inpainting", 9),
    "UNET-v1-Pix2Pix": ("sd1", "instruct-pix2pix", 8),
    "UNET-v2-SD": ("sd2", "", 4),
    "UNET-v2-Inpainting": ("sd2", "inpainting", 9),
    "UNET-v2-Depth": ("sd2", "depth", 5),
    "UNET-XL-SD": ("sdxl", "", 4),
    "UNET-XL-Refiner": ("sdxl-refiner", "", 4),
}


@pytest.mark.parametrize("name", REAL)
def test_real_unets(key_list: Callable[[str], Shapes], name: str) -> None:
    match = identify_unet(key_list(name))
    assert (match.family.name, match.variant, match.in_channels) == REAL[name]
    assert match.naming == "ldm"
    assert match.cross_attention_dim == match.family.cross_attention_dim


@pytest.mark.parametrize("name", [name for name in REAL if name != "UNET-v1-SD"])
def test_what_this_version_does_not_read_is_refused_by_name(
    key_list: Callable[[str], Shapes], name: str
) -> None:
    match = identify_unet(key_list(name))
    with pytest.raises(CheckpointError) as caught:
        require_readable(match)
    assert match.title in str(caught.value)
    assert "this version reads" in str(caught.value)


def test_sd1_is_readable_and_a_planted_width_is_not(key_list: Callable[[str], Shapes]) -> None:
    shapes = key_list("UNET-v1-SD")
    require_readable(identify_unet(shapes))
    wide = {name: (*shape[:-1], 1024) if "attn2.to_k" in name else shape for name, shape in shapes.items()}
    assert identify_unet(wide).family.name == "sd2"
    with pytest.raises(CheckpointError, match="recognised as SD2; this version reads sd1"):
        require_readable(identify_unet(wide))


def unet_shapes(**config: Any) -> Shapes:
    from diffusers import UNet2DConditionModel

    defaults: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(defaults | config))
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def test_an_unusual_width_with_the_structure_of_sd1_is_sd1() -> None:
    match = identify_unet(unet_shapes())
    require_readable(match)
    assert (match.family.name, match.variant, match.naming) == ("sd1", "", "diffusers")
    assert match.cross_attention_dim == 32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "recognised as SDXL",
        ),
        ({"cross_attention_dim": 1024}, "recognised as SD2"),
        ({"cross_attention_dim": 2048}, "recognised as SDXL"),
        ({"in_channels": 9}, "SD1 inpainting"),
        ({"in_channels": 8}, "SD1 instruct-pix2pix"),
        ({"in_channels": 3}, "3 input channels"),
        ({"time_cond_proj_dim": 16}, "LCM"),
        ({"num_class_embeds": 10}, "class label"),
        ({"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, "Kandinsky"),
    ],
)
def test_structures_that_are_not_plain_sd1(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        require_readable(identify_unet(unet_shapes(**config)))


FOREIGN = {
    "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "FLUX",
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "transformer_blocks.0.attn.add_q_proj.weight": "Stable Diffusion 3",
    "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight": "Stable Video Diffusion",
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "cond_stage_model.roberta.embeddings.word_embeddings.weight": "AltDiffusion",
    "cc_projection.weight": "Zero123",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "adapter",
    "unet.down_blocks.0.attentions.0.attn1.processor.to_k_lora.down.weight": "adapter",
    "text_encoder:0:down": "adapter",
    "down_blocks.0.motion_modules.0.norm.weight": "AnimateDiff",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_are_named(key_list: Callable[[str], Shapes], name: str) -> None:
    title = foreign_family([name, "something.else"])
    assert title is not None
    assert FOREIGN[name] in title
    with pytest.raises(CheckpointError, match=FOREIGN[name]):
        identify_unet({name: (1, 1), **key_list("UNET-v1-SD")})


def test_the_families_own_names_are_not_foreign(
    key_list: Callable[[str], Shapes], sd1_ldm_keys: Shapes
) -> None:
    assert foreign_family(sd1_ldm_keys) is None
    for name in (*REAL, "VAE-v1-SD", "CLIP-v1-SD", "CLIP-v2-SD", "CLIP-XL-SD"):
        assert foreign_family(key_list(name)) is None
    assert foreign_family(key_list("ControlNet-v1-SD")) == "a ControlNet"


def test_no_unet_and_no_attention() -> None:
    with pytest.raises(CheckpointError, match="holds no UNet"):
        identify_unet({"a": (1,)})
    with pytest.raises(CheckpointError, match="no cross-attention"):
        identify_unet({"conv_in.weight": (320, 4, 3, 3)})


def test_only_families_with_shipped_configs_are_readable() -> None:
    assert [name for name, family in FAMILIES.items() if family.supported] == ["sd1"]
