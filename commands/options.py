"""What several commands share: how a model and its adapters are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..exporters.adapters.base import AdapterRef

MODEL_HELP = "A bundle, a .safetensors or .ckpt file, a diffusers folder, or a bundled model."
LORA_HELP = "An adapter: FILE, FILE:STRENGTH or FILE:UNET:TEXT_ENCODER. Repeat for more."


def lora_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--lora``, as often as one likes."""
    return click.option("--lora", "loras", multiple=True, metavar="FILE:STRENGTH", help=LORA_HELP)(command)


def adapters(texts: tuple[str, ...]) -> tuple[AdapterRef, ...]:
    """The adapters of ``--lora``; UsageError for one that cannot be read or found."""
    if not texts:
        return ()
    from ..exporters.resolve import locate_adapter

    return tuple(locate_adapter(text) for text in texts)
