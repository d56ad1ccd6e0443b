"""Checkpoints in one safetensors file: LDM's layout, EMA, parts that are missing, other families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kiln.errors import CheckpointError
from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.inspection import inspect_checkpoint
from kiln.exporters.ldm_names import unet_ldm_names
from kiln.exporters.parts import shipped_config, shipped_folder

Modules = dict[str, torch.nn.Module]
Shapes = dict[str, tuple[int, ...]]
EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji-model"
SHIPPED = Path(__file__).parents[3] / "exporters" / "data" / "sd1"


def test_a_single_file(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = files.save_single(files.ldm_state(modules), tmp_path / "flux-sdxl-whatever.safetensors")
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules)
        assert checkpoint.layout == "ldm"
        assert not checkpoint.has_ema
        assert set(checkpoint.ignored) == {
            "alphas_cumprod",
            "global_step",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
        }
        assert checkpoint.tokenizer_dir == shipped_folder(checkpoint.family) / "tokenizer"
        assert checkpoint.scheduler_config["beta_schedule"] == "scaled_linear"
        from diffusers import UNet2DConditionModel

        rebuilt = UNet2DConditionModel.from_config(checkpoint.config("unet"))
        rebuilt.load_state_dict(
            {name: torch.from_numpy(checkpoint.read("unet", name)) for name in checkpoint.tensors("unet")}
        )


def test_single_file_of_an_early_text_encoder(files: Any, modules: Modules, tmp_path: Path) -> None:
    state = {name.replace(".text_model.", "."): tensor for name, tensor in files.ldm_state(modules).items()}
    assert not any("text_model" in name for name in state)
    with open_checkpoint(files.save_single(state, tmp_path / "a.safetensors")) as checkpoint:
        files.check_equal(checkpoint, modules)


def test_diffusers_names_below_prefixes(files: Any, modules: Modules, tmp_path: Path) -> None:
    for unet, vae, text in (
        ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."),
        ("unet.", "vae.", "te."),
        ("unet.", "vae.", "text_encoder."),
    ):
        prefixes = {"unet": unet, "vae": vae, "text_encoder": text}
        state = {
            prefix + name: tensor.clone()
            for network, prefix in prefixes.items()
            for name, tensor in modules[network].state_dict().items()
        }
        with open_checkpoint(files.save_single(state, tmp_path / "a.safetensors")) as checkpoint:
            files.check_equal(checkpoint, modules)


def test_a_bare_unet(files: Any, modules: Modules, folder: Path, tmp_path: Path) -> None:
    state = modules["unet"].state_dict()
    names = unet_ldm_names(state)
    for stored in ({names[name]: t for name, t in state.items()}, state):
        path = files.save_single(stored, tmp_path / "unet.safetensors")
        with open_checkpoint(path, vae=folder, text_encoder=folder) as checkpoint:
            files.check_equal(checkpoint, modules)


def test_ema_is_taken_on_request_or_when_alone(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = files.save_single(files.with_ema(files.ldm_state(modules)), tmp_path / "ema.safetensors")
    weight = modules["unet"].state_dict()["conv_in.weight"].numpy()
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules)
        assert checkpoint.has_ema
        assert not checkpoint.uses_ema
    with open_checkpoint(path, ema=True) as checkpoint:
        assert checkpoint.uses_ema
        assert set(checkpoint.tensors("unet")) == set(modules["unet"].state_dict())
        assert np.array_equal(checkpoint.read("unet", "conv_in.weight"), 2 * weight)
    only = {
        n: t
        for n, t in files.with_ema(files.ldm_state(modules)).items()
        if not n.startswith("model.diffusion_model.")
    }
    with open_checkpoint(files.save_single(only, tmp_path / "only.safetensors")) as checkpoint:
        assert checkpoint.uses_ema
        assert set(checkpoint.tensors("unet")) == set(modules["unet"].state_dict())
        assert np.array_equal(checkpoint.read("unet", "conv_in.weight"), 2 * weight)
    del only["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(CheckpointError, match="holds no UNet"):
        open_checkpoint(files.save_single(only, tmp_path / "broken.safetensors"))
    broken = files.with_ema(files.ldm_state(modules))
    del broken["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(CheckpointError, match="EMA copy lacks 1 of"):
        open_checkpoint(files.save_single(broken, tmp_path / "broken.safetensors"), ema=True)
    with pytest.raises(CheckpointError, match="no EMA weights"):
        open_checkpoint(files.save_single(files.ldm_state(modules), tmp_path / "none.safetensors"), ema=True)


def test_missing_networks_and_companions(files: Any, modules: Modules, folder: Path, tmp_path: Path) -> None:
    path = files.save_single(files.ldm_state(modules, ("unet",)), tmp_path / "unet.safetensors")
    vae = files.save_single(files.ldm_state(modules, ("vae",)), tmp_path / "vae.safetensors")
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in load_file(vae).items()}
    bare_vae = files.save_single(
        {n: t for n, t in bare.items() if "coder" in n or "quant" in n}, tmp_path / "bare.safetensors"
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.networks == ("unet",)
        with pytest.raises(CheckpointError, match=r"holds no vae .*vae=PATH"):
            checkpoint.tensors("vae")
    for companion in (
        vae,
        bare_vae,
        folder,
        folder / "vae",
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    ):
        with open_checkpoint(path, vae=companion, text_encoder=folder) as checkpoint:
            files.check_equal(checkpoint, modules)
    with pytest.raises(CheckpointError, match="holds no text_encoder"):
        open_checkpoint(path, text_encoder=vae)
    with pytest.raises(CheckpointError, match="holds no UNet"):
        open_checkpoint(vae)


def test_a_companion_replaces(modules: Modules, folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny()
    tiny.save_pretrained(tmp_path / "taesd")
    for companion in (tmp_path / "taesd", tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"):
        with open_checkpoint(folder, vae=companion) as checkpoint:
            assert set(checkpoint.tensors("vae")) == set(tiny.state_dict())
            assert checkpoint.config("vae")["_class_name"] == "AutoencoderTiny"
            assert checkpoint.config("vae")["scaling_factor"] == 1.0


@pytest.mark.parametrize(
    ("key_file", "words"),
    [
        ("UNET-v1-Inpainting", "recognised as SD1 inpainting"),
        ("UNET-v1-Pix2Pix", "recognised as SD1 instruct-pix2pix"),
        ("UNET-v2-SD", "recognised as SD2; this version reads sd1"),
        ("UNET-XL-SD", "recognised as SDXL; this version reads sd1"),
        ("UNET-XL-Refiner", "recognised as SDXL refiner; this version reads sd1"),
    ],
)
def test_other_families_in_single_files(
    key_list: Callable[[str], Shapes],
    write_sparse: Callable[..., Path],
    tmp_path: Path,
    key_file: str,
    words: str,
) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in key_list(key_file).items()}
    path = write_sparse(tmp_path / "sd15.safetensors", shapes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_full_size_file_of_real_names(
    sd1_ldm_keys: Shapes, write_sparse: Callable[..., Path], tmp_path: Path
) -> None:
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    value = np.random.default_rng(0).normal(size=(512, 512, 1, 1)).astype(np.float16)
    path = write_sparse(tmp_path / "real.safetensors", sd1_ldm_keys, {name: value})
    with open_checkpoint(path) as checkpoint:
        for network in checkpoint.networks:
            config = shipped_config(network)
            assert {**checkpoint.config(network), "scaling_factor": 0} == {**config, "scaling_factor": 0}
        read = checkpoint.read("vae", "decoder.mid_block.attentions.0.to_q.weight")
        assert np.array_equal(read, value[:, :, 0, 0])
        report = inspect_checkpoint(path)
    assert {n.network: n.parameters for n in report.networks} == {
        "text_encoder": 123_060_480,
        "unet": 859_520_964,
        "vae": 83_653_863,
    }
    assert report.layout == "ldm"


def test_float8_and_quantized_files(
    sd1_ldm_keys: Shapes, write_sparse: Callable[..., Path], tmp_path: Path
) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    path = write_sparse(tmp_path / "a.safetensors", sd1_ldm_keys, dtypes={first: "F8_E4M3"})
    with pytest.raises(CheckpointError, match="8-bit float"):
        open_checkpoint(path)
    marked = {**sd1_ldm_keys, "model.diffusion_model.scaled_fp8": (2,)}
    with pytest.raises(CheckpointError, match="scaled fp8"):
        open_checkpoint(write_sparse(tmp_path / "b.safetensors", marked))
    (tmp_path / "c.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(CheckpointError, match="GGUF"):
        open_checkpoint(tmp_path / "c.gguf")


def test_v_prediction_is_read_from_the_file(files: Any, modules: Modules, tmp_path: Path) -> None:
    state = files.ldm_state(modules)
    with open_checkpoint(files.save_single(state, tmp_path / "a.safetensors")) as checkpoint:
        assert checkpoint.scheduler_config.get("prediction_type", "epsilon") == "epsilon"
    path = files.save_single(state, tmp_path / "b.safetensors", **{"modelspec.prediction_type": "v"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.scheduler_config["prediction_type"] == "v_prediction"


def test_two_names_for_one_tensor(files: Any, modules: Modules, tmp_path: Path) -> None:
    state = files.ldm_state(modules)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    state[name.replace("text_model.", "")] = state[name].clone()
    with pytest.raises(CheckpointError, match=r"are both text_model\.final_layer_norm\.weight"):
        open_checkpoint(files.save_single(state, tmp_path / "a.safetensors"))


def test_inspection(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = files.save_single(files.with_ema(files.ldm_state(modules)), tmp_path / "a.safetensors")
    report = inspect_checkpoint(path)
    assert report.has_ema
    assert report.prediction_type == "epsilon"
    assert report.file_bytes == path.stat().st_size
    for row in report.networks:
        parameters = sum(t.numel() for t in modules[row.network].state_dict().values())
        assert row.parameters == parameters
        assert row.nbytes == 4 * parameters
        assert set(row.dtypes) == {"F32"}
    assert json.loads(json.dumps(report.as_dict()))["title"] == "SD1"
