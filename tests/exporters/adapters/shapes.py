"""Tensor names and shapes of the real architectures, from the classes of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


def shapes_of(
    unet: Mapping[str, Any], **text_encoders: Mapping[str, Any]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensor names and shapes of networks with these configurations, from diffusers and transformers."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        modules = {"unet": UNet2DConditionModel(**unet)}
        for name, config in text_encoders.items():
            kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
            modules[name] = kind(CLIPTextConfig(**config))
    return {
        network: {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for network, module in modules.items()
    }


_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}


def sd1() -> dict[str, dict[str, tuple[int, ...]]]:
    """The real SD1."""
    return shapes_of({"cross_attention_dim": 768, "attention_head_dim": 8}, text_encoder=_CLIP_L)


def sd2() -> dict[str, dict[str, tuple[int, ...]]]:
    """The real SD2, whose text encoder has the 23 layers that are used."""
    unet = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
    }
    return shapes_of(unet, text_encoder=text)


def sdxl() -> dict[str, dict[str, tuple[int, ...]]]:
    """The real SDXL with both text encoders."""
    unet = {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    second = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    }
    return shapes_of(unet, text_encoder=_CLIP_L, text_encoder_2=second)
