"""Checks that the networks of a checkpoint belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .families import FamilyMatch
from .parts import Part
from .structure import latent_channels, text_encoder_facts, unet_facts

SHIPPED_VOCABULARY = 49408  # tokens of CLIP's tokenizer


def check_fit(path: Path, match: FamilyMatch, parts: Mapping[str, Part]) -> None:
    """Compare the widths at which the networks meet: a mismatch would fail late or draw noise.

    Raises:
        CheckpointError: they are of different models; the text gives both widths.
    """
    predicted = unet_facts(parts["unet"].shapes)["out_channels"]
    if predicted != match.family.latent_channels:
        raise CheckpointError(
            f"{path}: its UNet predicts {predicted} channels; {match.title} predicts "
            f"{match.family.latent_channels}"
        )
    if "text_encoder" in parts:
        width = text_encoder_facts(parts["text_encoder"].shapes)["hidden_size"]
        if width != match.cross_attention_dim:
            raise CheckpointError(
                f"{path}: the text encoder is {width} wide, the UNet reads {match.cross_attention_dim}: "
                "they are of different models"
            )
    if "vae" in parts:
        channels = latent_channels(parts["vae"].shapes)
        if channels != match.in_channels:
            raise CheckpointError(
                f"{path}: the VAE has {channels} latent channels, the UNet {match.in_channels}: "
                "they are of different models"
            )


def check_vocabulary(path: Path, text_encoder: Part) -> None:
    """Check that a text encoder that came without a tokenizer can use the shipped one.

    Raises:
        CheckpointError: it knows another number of tokens.
    """
    size = text_encoder_facts(text_encoder.shapes)["vocab_size"]
    if size != SHIPPED_VOCABULARY:
        raise CheckpointError(
            f"{path}: the text encoder knows {size} tokens, the CLIP tokenizer {SHIPPED_VOCABULARY}; give a "
            "diffusers folder, which brings its own tokenizer"
        )
