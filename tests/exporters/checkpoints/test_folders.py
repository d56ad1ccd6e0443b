"""Checkpoints in diffusers' folders: variants, shards, old names, and folders that are broken."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kiln.errors import CheckpointError
from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.parts import shipped_config

Modules = dict[str, torch.nn.Module]
Shapes = dict[str, tuple[int, ...]]
EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji-model"
SHIPPED = Path(__file__).parents[3] / "exporters" / "data" / "sd1"


def test_a_folder_and_the_planted_error(files: Any, modules: Modules, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        files.check_equal(checkpoint, modules)
        assert checkpoint.layout == "diffusers"
        assert checkpoint.family.name == "sd1"
        assert checkpoint.tokenizer_dir == folder / "tokenizer"
        assert checkpoint.scheduler_config["beta_end"] == 0.012
        assert checkpoint.config("unet")["cross_attention_dim"] == 64
        assert checkpoint.config("vae")["scaling_factor"] == 0.18215
        planted = copy.deepcopy(modules["unet"])
        with torch.no_grad():
            next(planted.parameters()).mul_(1.01)
        with pytest.raises(AssertionError):
            files.check_equal(checkpoint, modules | {"unet": planted})


def test_fp16_variant_is_used_when_alone_and_on_request(
    files: Any, modules: Modules, folder: Path, tmp_path: Path
) -> None:
    halves = {network: copy.deepcopy(module).half() for network, module in modules.items()}
    alone = files.save_folder(halves, tmp_path / "alone", variant="fp16")
    assert (alone / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    with open_checkpoint(alone) as checkpoint:
        files.check_equal(checkpoint, modules, np.float16)
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    for network in halves:
        for file in (alone / network).glob("*.fp16.safetensors"):
            shutil.copy(file, both / network)
    with open_checkpoint(both) as checkpoint:
        files.check_equal(checkpoint, modules, np.float32)
    with open_checkpoint(both, variant="fp16") as checkpoint:
        files.check_equal(checkpoint, modules, np.float16)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bf16\.safetensors"):
        open_checkpoint(both, variant="bf16")


def test_bf16(files: Any, modules: Modules, tmp_path: Path) -> None:
    halves = {network: copy.deepcopy(module).bfloat16() for network, module in modules.items()}
    with open_checkpoint(files.save_folder(halves, tmp_path / "m")) as checkpoint:
        files.check_equal(checkpoint, modules, ml_dtypes.bfloat16)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_a_missing_one(files: Any, modules: Modules, tmp_path: Path, variant: str | None) -> None:
    path = files.save_folder(modules, tmp_path / "m", max_shard_size="1MB", variant=variant)
    shards = sorted((path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    with open_checkpoint(path, variant=variant) as checkpoint:
        files.check_equal(checkpoint, modules)
        assert len(checkpoint.files()) > 3
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name}.*is missing"):
        open_checkpoint(path)


def test_shard_indexes_that_lie(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = files.save_folder(modules, tmp_path / "m", max_shard_size="1MB")
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    outside = {**good["weight_map"], name: "../vae/diffusion_pytorch_model.safetensors"}
    other = next(file for file in good["weight_map"].values() if file != good["weight_map"][name])
    for weight_map, words in (
        (outside, "not a file beside it"),
        ({**good["weight_map"], name: other}, "lacks the tensor"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        open_checkpoint(path)
    index.unlink()
    with pytest.raises(CheckpointError, match="no index"):
        open_checkpoint(path)


def test_bin_weights_in_a_folder(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = files.save_folder(modules, tmp_path / "m", safe_serialization=False)
    if not list((path / "text_encoder").glob("*.bin")):
        pytest.skip("this transformers no longer writes .bin files")
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules)


def test_early_diffusers_names(files: Any, modules: Modules, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(weights).items():
        for new, early in old.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, early)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        state[name] = tensor.contiguous()
    assert any("proj_attn" in name for name in state)
    save_file(state, weights)
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules)


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> Path:
        path = tmp_path / name
        shutil.copytree(folder, path)
        change(path)
        return path

    def set_config(path: Path, network: str, **fields: Any) -> None:
        file = path / network / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    unet = "unet/diffusion_pytorch_model.safetensors"
    cases: dict[str, tuple[Callable[[Path], Any], str]] = {
        "no unet": (lambda p: shutil.rmtree(p / "unet"), "holds no unet folder"),
        "flux": (lambda p: (p / "unet").rename(p / "transformer"), "recognised as StableDiffusionPipeline"),
        "no weights": (
            lambda p: (p / unet).unlink(),
            "has no weights; expected diffusion_pytorch_model.safetensors",
        ),
        "no config": (lambda p: (p / "unet/config.json").unlink(), "no such file"),
        "text": (lambda p: (p / unet).write_text("hello, this is text"), "is a text file"),
        "cut": (lambda p: (p / unet).write_bytes((p / unet).read_bytes()[:-5]), "is truncated"),
        "width": (lambda p: set_config(p, "unet", cross_attention_dim=768), "cross_attention_dim is 768"),
        "class": (lambda p: set_config(p, "vae", _class_name="VQModel"), "is a VQModel"),
        "text class": (
            lambda p: set_config(p, "text_encoder", architectures=["BertModel"]),
            "is a BertModel",
        ),
        "class label": (lambda p: set_config(p, "unet", class_embed_type="timestep"), "class_embed_type"),
        "tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "no tokenizer folder"),
        "list": (lambda p: (p / "unet/config.json").write_text("[]"), "expected a JSON object"),
        "second": (lambda p: shutil.copytree(p / "text_encoder", p / "text_encoder_2"), "recognised as SDXL"),
    }
    for name, (change, words) in cases.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(broken(name, change))
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(CheckpointError, match="holds no unet folder"):
        open_checkpoint(tmp_path / "void")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint("n" * 5000)
    with pytest.raises(CheckpointError, match="EMA is for single files"):
        open_checkpoint(folder, ema=True)


def test_networks_of_different_models(files: Any, modules: Modules, folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(**(shipped_config("text_encoder") | {"hidden_size": 36, "num_hidden_layers": 1}))
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "text_encoder")
    CLIPTextModel(text).save_pretrained(path / "text_encoder")
    with pytest.raises(CheckpointError, match="36 wide, the UNet reads 64"):
        open_checkpoint(path)
    state = files.ldm_state(modules)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:1000].clone()
    with pytest.raises(CheckpointError, match="knows 1000 tokens"):
        open_checkpoint(files.save_single(state, tmp_path / "small.safetensors"))


def test_digest_follows_the_content(modules: Modules, folder: Path, tmp_path: Path) -> None:
    def digests(path: Path) -> tuple[str, str]:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.digest(), checkpoint.fingerprint()

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert digests(moved) == digests(folder)
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    assert digests(moved)[0] != digests(folder)[0]
    config = moved / "scheduler" / "scheduler_config.json"
    before = digests(moved)
    config.write_text(config.read_text().replace("0.012", "0.013"))
    after = digests(moved)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_files_are_closed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("unet", "conv_in.weight")


def test_the_bundled_models_architecture() -> None:
    if not EMOJI.exists():
        pytest.skip(f"the emoji model is not at {EMOJI}")
    with open_checkpoint(EMOJI) as checkpoint:
        assert checkpoint.family.name == "sd1"
        assert checkpoint.match.cross_attention_dim == 256
        assert checkpoint.config("vae")["_class_name"] == "AutoencoderTiny"
        for network in checkpoint.networks:
            stem = "model" if network == "text_encoder" else "diffusion_pytorch_model"
            stored = load_file(EMOJI / network / f"{stem}.safetensors")
            assert set(checkpoint.tensors(network)) == set(stored)
            for name, tensor in stored.items():
                assert np.array_equal(checkpoint.read(network, name), tensor.numpy())
