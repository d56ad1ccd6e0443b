"""The null backend gives the shapes that real networks give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.null import NullBackend
from kiln.errors import SessionError

KL = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "out_channels": 3,
    "block_out_channels": [1, 1, 1, 1],
}
TINY = {
    "_class_name": "AutoencoderTiny",
    "latent_channels": 4,
    "out_channels": 3,
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
}


def run(component: str, config: dict[str, Any], **feeds: np.ndarray) -> dict[str, np.ndarray]:
    source = GraphSource(component, Path("none"), Path("none"), config, "")
    return NullBackend().prepare(source, PrepareOptions()).run(feeds)


@pytest.mark.parametrize(
    ("component", "config", "feeds", "expected"),
    [
        (
            "text_encoder",
            {"hidden_size": 768},
            {"input_ids": np.zeros((2, 77), np.int64)},
            {"last_hidden_state": (2, 77, 768), "pooler_output": (2, 768)},
        ),
        (
            "unet",
            {"out_channels": 4},
            {
                "sample": np.zeros((2, 9, 64, 48), np.float32),
                "timestep": np.zeros((), np.float32),
                "encoder_hidden_states": np.zeros((2, 77, 768), np.float32),
            },
            {"out_sample": (2, 4, 64, 48)},
        ),
        (
            "vae_decoder",
            KL,
            {"latent_sample": np.zeros((1, 4, 8, 6), np.float32)},
            {"sample": (1, 3, 64, 48)},
        ),
        (
            "vae_decoder",
            TINY,
            {"latent_sample": np.zeros((1, 4, 8, 6), np.float32)},
            {"sample": (1, 3, 32, 24)},
        ),
        (
            "vae_encoder",
            KL,
            {"sample": np.zeros((1, 3, 64, 48), np.float32)},
            {"latent_parameters": (1, 8, 8, 6)},
        ),
        (
            "vae_encoder",
            TINY,
            {"sample": np.zeros((1, 3, 64, 48), np.float32)},
            {"latent_parameters": (1, 4, 16, 12)},
        ),
    ],
)
def test_shapes(component: str, config: Any, feeds: Any, expected: dict[str, tuple[int, ...]]) -> None:
    outputs = run(component, config, **feeds)
    assert {name: array.shape for name, array in outputs.items()} == expected
    for array in outputs.values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert array.std() > 0.1


def test_incomplete_config() -> None:
    with pytest.raises(SessionError, match="config of vae_decoder has no 'block_out_channels'"):
        run("vae_decoder", {}, latent_sample=np.zeros((1, 4, 8, 8), np.float32))
