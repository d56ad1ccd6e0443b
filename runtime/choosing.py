"""What a request asks of the UNet: the shapes of a run, and how many runs; ``auto`` chooses by it."""

from __future__ import annotations

from ..backends.auto import Work
from ..bundle import Bundle
from .request import Request


def unet_shapes(rows: int, cells: tuple[int, int], states: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the UNet's inputs.

    Args:
        rows: images denoised together, twice that with guidance.
        cells: height and width of the latents.
        states: tokens and width of the text encoder's hidden states.
    """
    return {"sample": (rows, 4, *cells), "timestep": (), "encoder_hidden_states": (rows, *states)}


def vae_factor(bundle: Bundle) -> int:
    """Pixels per latent cell and side of a bundle's VAE."""
    config = bundle.config("vae_decoder")
    if config.get("_class_name") == "AutoencoderTiny":
        # diffusers' default, which configs may leave out, has four levels.
        return int(2 ** (len(config.get("decoder_block_out_channels", (64,) * 4)) - 1))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def unet_work(bundle: Bundle, request: Request, cells: tuple[int, int], tokens: int, *, guided: bool) -> Work:
    """What a request asks of a bundle's UNet; the last batch, which may be smaller, counts as a whole one."""
    facts = bundle.manifest["components"]["unet"]
    rows = min(request.count, request.batch_size) * (2 if guided else 1)
    width = int(bundle.config("unet")["cross_attention_dim"])
    return Work(
        bundle.source("unet"),
        unet_shapes(rows, cells, (tokens, width)),
        request.steps * -(-request.count // request.batch_size),
        int(facts.get("parameters", 0)),
        str(facts.get("architecture") or bundle.digest("unet")),
        facts.get("storage") or {},
        guided,
    )
