"""Tiny modules of torch, one for each component, with inputs and the check of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from kiln.backends.base import GraphSource
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS

LIMIT = THRESHOLDS["component_relative_l2"]
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 12)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)


@dataclass
class Case:
    """A component: its module, how to call that, the tensors that a bundle keeps of it, and inputs."""

    component: str
    module: Any
    config: dict[str, Any]
    call: Callable[[Any, dict[str, Any]], tuple[Any, ...]]
    feeds: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()

    def save(
        self, folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tensors: None
    ) -> GraphSource:
        """Write what a bundle holds of the component, with its tensors changed."""
        tensors = self.module.state_dict()
        tensors = {k: v for k, v in tensors.items() if not k.startswith(self.left_out or "\0")}
        change(tensors)
        path = folder / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        return GraphSource(self.component, folder / "model.onnx", path, self.config, "")

    def expected(self) -> list[np.ndarray]:
        """What the module itself gives."""
        with torch.no_grad():
            outputs = self.call(self.module, {k: torch.from_numpy(v.copy()) for k, v in self.feeds.items()})
        return [output.float().numpy() for output in outputs]

    def check(self, outputs: dict[str, np.ndarray]) -> None:
        """Compare with what the module gives: names, shapes, dtype, finite, values."""
        assert list(outputs) == [port.name for port in CONTRACTS[self.component].outputs]
        for array, want in zip(outputs.values(), self.expected(), strict=True):
            assert array.shape == want.shape
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
            assert LIMIT.holds(relative_l2(array, want))


def make_text_encoder() -> Case:
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=97,
        eos_token_id=98,
    )
    ids = np.random.default_rng(2).integers(0, 97, (2, 20))
    ids[0, 7:] = 98
    ids[1, 12:] = 98

    def call(module: Any, feeds: dict[str, Any]) -> tuple[Any, ...]:
        states = module(**feeds)
        return states.last_hidden_state, states.pooler_output

    return Case(
        "text_encoder", transformers.CLIPTextModel(config), config.to_dict(), call, {"input_ids": ids}
    )


def make_unet() -> Case:
    module = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    states = np.random.default_rng(3).standard_normal((2, 20, 16)).astype(np.float32)
    feeds = {"sample": LATENTS, "timestep": np.array(481.25, np.float32), "encoder_hidden_states": states}
    return Case("unet", module, _config(module), lambda m, f: (m(**f).sample,), feeds)


def make_kl(component: str) -> Case:
    module = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    if component == "vae_decoder":
        left_out = ("encoder.", "quant_conv.")
        return Case(
            component, module, _config(module), lambda m, f: (m.decode(f["latent_sample"]).sample,),
            {"latent_sample": LATENTS}, left_out,
        )  # fmt: skip
    left_out = ("decoder.", "post_quant_conv.")

    def encode(module: Any, feeds: dict[str, Any]) -> tuple[Any, ...]:
        posterior = module.encode(feeds["sample"]).latent_dist
        return (torch.cat([posterior.mean, posterior.logvar], dim=1),)

    return Case(component, module, _config(module), encode, {"sample": IMAGES}, left_out)


def make_tiny(component: str) -> Case:
    module = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    if component == "vae_decoder":
        call = lambda m, f: (m.decode(f["latent_sample"]).sample,)  # noqa: E731
        return Case(component, module, _config(module), call, {"latent_sample": LATENTS}, ("encoder.",))
    call = lambda m, f: (m.encode(f["sample"]).latents,)  # noqa: E731
    return Case(component, module, _config(module), call, {"sample": IMAGES}, ("decoder.",))


def _config(module: Any) -> dict[str, Any]:
    return {**module.config, "_class_name": type(module).__name__}


MAKERS = {
    "text_encoder": make_text_encoder,
    "unet": make_unet,
    "kl decoder": lambda: make_kl("vae_decoder"),
    "kl encoder": lambda: make_kl("vae_encoder"),
    "tiny decoder": lambda: make_tiny("vae_decoder"),
    "tiny encoder": lambda: make_tiny("vae_encoder"),
}


def make_case(kind: str) -> Case:
    """A component with random weights, the same each time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = MAKERS[kind]()
    case.module.eval()
    return case
