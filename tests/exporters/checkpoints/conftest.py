"""Shared by the tests of checkpoints: a tiny SD1 as torch modules, and how it is written and compared."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kiln.exporters.checkpoints import Checkpoint
from kiln.exporters.ldm_names import ema_name, unet_ldm_names, vae_ldm_name
from kiln.exporters.parts import shipped_config

Modules = dict[str, torch.nn.Module]
Shapes = dict[str, tuple[int, ...]]
EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji-model"
SHIPPED = Path(__file__).parents[3] / "exporters" / "data" / "sd1"


@pytest.fixture(scope="package")
def modules() -> Modules:
    """A tiny SD1 with four levels, as in the real one, and the real vocabulary."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    widths = {"block_out_channels": [32, 32, 64, 64]}
    text = shipped_config("text_encoder") | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    return {
        "unet": UNet2DConditionModel.from_config(
            shipped_config("unet") | widths | {"cross_attention_dim": 64}
        ),
        "vae": AutoencoderKL.from_config(shipped_config("vae") | widths),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**(text | {"num_attention_heads": 1}))),
    }


@pytest.fixture(scope="package")
def folder(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in fp32."""
    return CheckpointFiles.save_folder(modules, tmp_path_factory.mktemp("diffusers") / "model")


class CheckpointFiles:
    """Writes the tiny SD1 in every layout, and compares what is read with it."""

    @staticmethod
    def save_folder(modules: Modules, path: Path, **options: Any) -> Path:
        for network, module in modules.items():
            module.save_pretrained(path / network, **options)  # type: ignore[operator]
        for name in ("tokenizer", "scheduler"):
            shutil.copytree(SHIPPED / name, path / name)
        shutil.copy(SHIPPED / "model_index.json", path)
        return path

    @staticmethod
    def expected(modules: Modules, network: str) -> dict[str, np.ndarray]:
        state = modules[network].state_dict()
        return {n: t.numpy() for n, t in state.items() if not n.endswith("position_ids")}

    @staticmethod
    def check_equal(checkpoint: Checkpoint, modules: Modules, dtype: Any = np.float32) -> None:
        """Names, then shapes, types and values of every network."""
        assert checkpoint.networks == ("text_encoder", "unet", "vae")
        for network in checkpoint.networks:
            wanted, infos = CheckpointFiles.expected(modules, network), checkpoint.tensors(network)
            assert set(infos) == set(wanted)
            for name, value in wanted.items():
                assert infos[name].shape == value.shape
                read = checkpoint.read(network, name)
                assert read.shape == value.shape
                assert read.dtype == dtype
                assert np.array_equal(read.astype(np.float32), value.astype(dtype).astype(np.float32))

    @staticmethod
    def ldm_state(
        modules: Modules, networks: tuple[str, ...] = ("unet", "vae", "text_encoder")
    ) -> dict[str, torch.Tensor]:
        """The tensors of a single file as found on model sites."""
        state: dict[str, torch.Tensor] = {"alphas_cumprod": torch.ones(1000), "global_step": torch.tensor(7)}
        if "unet" in networks:
            unet = modules["unet"].state_dict()
            for new, old in unet_ldm_names(unet).items():
                state[f"model.diffusion_model.{old}"] = unet[new].clone()
        if "vae" in networks:
            for new, tensor in modules["vae"].state_dict().items():
                attention = ".attentions.0.to_" in new and tensor.ndim == 2
                state[f"first_stage_model.{vae_ldm_name(new)}"] = (
                    tensor[:, :, None, None].clone() if attention else tensor
                )
        if "text_encoder" in networks:
            for new, tensor in modules["text_encoder"].state_dict().items():
                state[f"cond_stage_model.transformer.{new}"] = tensor.clone()
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return state

    @staticmethod
    def with_ema(state: dict[str, torch.Tensor], factor: float = 2.0) -> dict[str, torch.Tensor]:
        copies = {
            f"model_ema.{ema_name(name.removeprefix('model.diffusion_model.'))}": tensor * factor
            for name, tensor in state.items()
            if name.startswith("model.diffusion_model.")
        }
        return {
            **state,
            **copies,
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(1),
        }

    @staticmethod
    def save_single(state: Mapping[str, torch.Tensor], path: Path, **metadata: str) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
        return path


@pytest.fixture(scope="session")
def files() -> type[CheckpointFiles]:
    return CheckpointFiles
