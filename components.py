"""The input and output contract of each component: the table that exporter, backend and tests read.

Names and axes are those of Optimum's OnnxConfig for the same networks, so that a bundle opens in
``ORTDiffusionPipeline``. One deliberate difference: ``timestep`` is float32, because Karras
schedules ask for fractional timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Port:
    """One input or output: its name, numpy dtype name and axis labels (empty for a scalar)."""

    name: str
    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Contract:
    """All ports of one component, and the checkpoint network whose tensors it holds."""

    network: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


CONTRACTS: dict[str, Contract] = {
    "text_encoder": Contract(
        "text_encoder",
        (Port("input_ids", "int64", ("batch_size", "sequence_length")),),
        (
            Port("last_hidden_state", "float32", ("batch_size", "sequence_length", "hidden_size")),
            Port("pooler_output", "float32", ("batch_size", "hidden_size")),
        ),
    ),
    "unet": Contract(
        "unet",
        (
            Port("sample", "float32", ("batch_size", "in_channels", "latent_height", "latent_width")),
            Port("timestep", "float32", ()),
            Port("encoder_hidden_states", "float32", ("batch_size", "sequence_length", "hidden_size")),
        ),
        (Port("out_sample", "float32", ("batch_size", "out_channels", "latent_height", "latent_width")),),
    ),
    "vae_decoder": Contract(
        "vae",
        (
            Port(
                "latent_sample", "float32", ("batch_size", "latent_channels", "latent_height", "latent_width")
            ),
        ),
        (Port("sample", "float32", ("batch_size", "image_channels", "image_height", "image_width")),),
    ),
    "vae_encoder": Contract(
        "vae",
        (Port("sample", "float32", ("batch_size", "image_channels", "image_height", "image_width")),),
        (
            Port(
                "latent_parameters",
                "float32",
                ("batch_size", "latent_parameters", "latent_height", "latent_width"),
            ),
        ),
    ),
}

COMPONENTS = tuple(CONTRACTS)
NETWORKS = ("text_encoder", "unet", "vae")
