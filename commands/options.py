"""What several commands share: how a model and its adapters are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..exporters.adapters.base import AdapterRef
    from ..exporters.embeddings.base import EmbeddingRef

MODEL_HELP = "A bundle, a .safetensors or .ckpt file, a diffusers folder, or a bundled model."
LORA_HELP = (
    "An adapter: FILE, FILE:STRENGTH or FILE:UNET:TEXT_ENCODER; then any of :te=0.5, :unet=0.8, :dyn=4 (the "
    "first ranks of a DyLoRA) and :lbw=INS or :lbw=1,0,... (block strengths). Repeat for more."
)
EMBEDDING_HELP = (
    "A textual inversion embedding: FILE or FILE:TOKEN; .safetensors, .pt, .bin, or a .png of "
    "stable-diffusion-webui. Prompts call it TOKEN, else what the file says (<token>, or the name in a "
    "picture), else the file's name. Repeat for more."
)
PRESETS_HELP = "More names for lbw=: a file with lines NAME:1,0,0,... of 12, 17, 20 or 26 numbers."


def lora_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--lora``, as often as one likes, and ``--lbw-presets``."""
    presets = click.option(
        "--lbw-presets", type=click.Path(path_type=Path), metavar="FILE", help=PRESETS_HELP
    )
    lora = click.option("--lora", "loras", multiple=True, metavar="FILE:STRENGTH", help=LORA_HELP)
    return lora(presets(command))


def embedding_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--embedding``, as often as one likes."""
    return click.option(
        "--embedding", "embeddings", multiple=True, metavar="FILE[:TOKEN]", help=EMBEDDING_HELP
    )(command)


def embedding_refs(texts: tuple[str, ...]) -> tuple[EmbeddingRef, ...]:
    """The embeddings of ``--embedding``; UsageError for one that is not there."""
    if not texts:
        return ()
    from ..exporters.embeddings.base import EmbeddingRef

    return tuple(map(EmbeddingRef.parse, texts))


def adapters(texts: tuple[str, ...], lbw_presets: Path | None = None) -> tuple[AdapterRef, ...]:
    """The adapters of ``--lora``; UsageError for one that cannot be read or found."""
    if not texts:
        return ()
    from ..exporters.resolve import locate_adapter

    presets = block_presets(lbw_presets)
    return tuple(locate_adapter(text, presets) for text in texts)


def block_presets(path: Path | None) -> Mapping[str, str]:
    """Names of block strengths: the built-in ones, and those of ``--lbw-presets``."""
    from ..exporters.adapters.block_strengths import PRESETS, read_presets

    return PRESETS if path is None else read_presets(path)
