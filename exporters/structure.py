"""Derives the config of a network from its tensors' shapes, and checks a given config against them.

Shapes tell everything but the number of attention heads, the activation and the normalisation constants;
those come from the family's shipped config (SD1: 8 heads at every width; CLIP: 64 channels a head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that ``pattern`` (with one group) finds at the start of a name."""
    compiled = re.compile(pattern)
    return 1 + max((int(match[1]) for name in shapes if (match := compiled.match(name))), default=-1)


def _dim(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None or len(shape) <= axis:
        raise CheckpointError(f"is incomplete: {name} is missing or has no axis {axis}")
    return shape[axis]


def unet_facts(shapes: Shapes) -> Config:
    """Fields of a UNet2DConditionModel config that its tensors (diffusers names) decide."""
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    context = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape]
    return {
        "in_channels": _dim(shapes, "conv_in.weight", 1),
        "out_channels": _dim(shapes, "conv_out.weight", 0),
        "block_out_channels": [
            _dim(shapes, f"down_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(levels)
        ],
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": context[0] if context else 0,
    }


def autoencoder_facts(shapes: Shapes) -> Config:
    """Fields of an AutoencoderKL config that its decoder's tensors (diffusers names) decide."""
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    widths = [_dim(shapes, f"decoder.up_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(levels)]
    return {
        "latent_channels": _dim(shapes, "decoder.conv_in.weight", 1),
        "out_channels": _dim(shapes, "decoder.conv_out.weight", 0),
        "block_out_channels": widths[::-1],
        "layers_per_block": _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
    }


def text_encoder_facts(shapes: Shapes) -> Config:
    """Fields of a CLIPTextConfig that the encoder's tensors decide."""
    embeddings = "text_model.embeddings"
    return {
        "vocab_size": _dim(shapes, f"{embeddings}.token_embedding.weight", 0),
        "hidden_size": _dim(shapes, f"{embeddings}.token_embedding.weight", 1),
        "max_position_embeddings": _dim(shapes, f"{embeddings}.position_embedding.weight", 0),
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "intermediate_size": _dim(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
    }


def is_tiny_autoencoder(shapes: Shapes) -> bool:
    """Whether these are the tensors of an AutoencoderTiny (TAESD) under diffusers' names."""
    return "decoder.layers.0.weight" in shapes


def _unet_config(shapes: Shapes, base: Config) -> Config:
    facts = unet_facts(shapes)
    levels = range(len(facts["block_out_channels"]))
    attends = {
        side: [_any(shapes, f"{side}_blocks.{n}.attentions.") for n in levels] for side in ("down", "up")
    }
    facts["down_block_types"] = ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends["down"]]
    facts["up_block_types"] = ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in attends["up"]]
    depth = _count(shapes, r".*\.transformer_blocks\.(\d+)\.")
    if depth > 1:
        raise CheckpointError(
            f"has {depth} transformer layers in a block, which a single file does not lay out unambiguously; "
            "convert it to a diffusers folder"
        )
    if not _any(shapes, "mid_block."):
        facts["mid_block_type"] = None
    elif not _any(shapes, "mid_block.attentions."):
        facts["mid_block_type"] = "UNetMidBlock2D"
    if any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()):
        facts["use_linear_projection"] = True
    return {**base, **facts}


def _autoencoder_config(shapes: Shapes, base: Config) -> Config:
    facts = autoencoder_facts(shapes)
    levels = len(facts["block_out_channels"])
    facts["down_block_types"] = ["DownEncoderBlock2D"] * levels
    facts["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return {**base, **facts}


def _text_encoder_config(shapes: Shapes, base: Config) -> Config:
    facts = text_encoder_facts(shapes)
    heads, rest = divmod(facts["hidden_size"], 64)
    if rest:
        raise CheckpointError(
            f"its text encoder is {facts['hidden_size']} wide, so the number of heads cannot be told; "
            "convert it to a diffusers folder, whose config says it"
        )
    return {**base, **facts, "num_attention_heads": heads}


def _any(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


_DERIVE = {"unet": _unet_config, "vae": _autoencoder_config, "text_encoder": _text_encoder_config}
_FACTS = {"unet": unet_facts, "vae": autoencoder_facts, "text_encoder": text_encoder_facts}


def latent_channels(shapes: Shapes) -> int:
    """Channels of the latents of an autoencoder of either class."""
    tiny = is_tiny_autoencoder(shapes)
    return _dim(shapes, "decoder.layers.0.weight" if tiny else "decoder.conv_in.weight", 1)


def derive_config(network: str, shapes: Shapes, base: Mapping[str, Any]) -> Config:
    """Config of a network that came without one.

    Args:
        network: ``unet``, ``vae`` or ``text_encoder``.
        shapes: its tensors under diffusers' names.
        base: the family's shipped config; returned as it is when the shapes are those of the family.

    Raises:
        CheckpointError: tensors are missing, or the shapes do not decide the config.
    """
    return _DERIVE[network](shapes, dict(base))


def check_config(network: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Check that a config describes these tensors.

    Raises:
        CheckpointError: a field says something else than the shapes do.
    """
    if network == "vae" and is_tiny_autoencoder(shapes):
        facts = {"latent_channels": latent_channels(shapes)}
    else:
        facts = _FACTS[network](shapes)
    for field, found in facts.items():
        said = config.get(field)
        # A list where shapes give one number (or the reverse) is a finer statement, not a contradiction.
        if said is not None and type(said) is type(found) and said != found:
            raise CheckpointError(
                f"config and weights of {network} disagree: {field} is {said}, the weights have {found}"
            )
