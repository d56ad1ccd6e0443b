"""A tiny SD1 whose text encoder is wide enough for a single file, which tells its heads by its width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import kiln

SHIPPED = Path(kiln.__file__).parent / "exporters/data/sd1"


@pytest.fixture(scope="session")
def small_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder, fp32."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "sd1"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=49408
    )
    for name, module in (("unet", unet), ("vae", vae), ("text_encoder", CLIPTextModel(text))):
        module.save_pretrained(folder / name, safe_serialization=True)
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer")
    shutil.copytree(SHIPPED / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
