"""Checkpoints in every layout: against the modules they were saved from, and hostile ones refused."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kiln.errors import CheckpointError
from kiln.exporters.checkpoints import Checkpoint, open_checkpoint
from kiln.exporters.inspection import inspect_checkpoint
from kiln.exporters.ldm_names import ema_name, unet_ldm_names, vae_ldm_name
from kiln.exporters.parts import shipped_config, shipped_folder

Modules = dict[str, torch.nn.Module]
Shapes = dict[str, tuple[int, ...]]
EMOJI = Path(__file__).parents[3] / "shared" / "data" / "emoji-model"
SHIPPED = Path(__file__).parents[2] / "exporters" / "data" / "sd1"


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def folder(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in fp32."""
    return save_folder(modules, tmp_path_factory.mktemp("diffusers") / "model")


def save_folder(modules: Modules, path: Path, **options: Any) -> Path:
    for network, module in modules.items():
        module.save_pretrained(path / network, **options)  # type: ignore[operator]
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(SHIPPED / name, path / name)
    shutil.copy(SHIPPED / "model_index.json", path)
    return path


def expected(modules: Modules, network: str) -> dict[str, np.ndarray]:
    state = modules[network].state_dict()
    return {n: t.numpy() for n, t in state.items() if not n.endswith("position_ids")}


def check_equal(checkpoint: Checkpoint, modules: Modules, dtype: Any = np.float32) -> None:
    """Names, then shapes, types and values of every network."""
    assert checkpoint.networks == ("text_encoder", "unet", "vae")
    for network in checkpoint.networks:
        wanted, infos = expected(modules, network), checkpoint.tensors(network)
        assert set(infos) == set(wanted)
        for name, value in wanted.items():
            assert infos[name].shape == value.shape
            read = checkpoint.read(network, name)
            assert read.shape == value.shape
            assert read.dtype == dtype
            assert np.array_equal(read.astype(np.float32), value.astype(dtype).astype(np.float32))


def test_a_folder_and_the_planted_error(modules: Modules, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        check_equal(checkpoint, modules)
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
            check_equal(checkpoint, modules | {"unet": planted})


def test_fp16_variant_is_used_when_alone_and_on_request(
    modules: Modules, folder: Path, tmp_path: Path
) -> None:
    halves = {network: copy.deepcopy(module).half() for network, module in modules.items()}
    alone = save_folder(halves, tmp_path / "alone", variant="fp16")
    assert (alone / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    with open_checkpoint(alone) as checkpoint:
        check_equal(checkpoint, modules, np.float16)
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    for network in halves:
        for file in (alone / network).glob("*.fp16.safetensors"):
            shutil.copy(file, both / network)
    with open_checkpoint(both) as checkpoint:
        check_equal(checkpoint, modules, np.float32)
    with open_checkpoint(both, variant="fp16") as checkpoint:
        check_equal(checkpoint, modules, np.float16)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bf16\.safetensors"):
        open_checkpoint(both, variant="bf16")


def test_bf16(modules: Modules, tmp_path: Path) -> None:
    halves = {network: copy.deepcopy(module).bfloat16() for network, module in modules.items()}
    with open_checkpoint(save_folder(halves, tmp_path / "m")) as checkpoint:
        check_equal(checkpoint, modules, ml_dtypes.bfloat16)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_a_missing_one(modules: Modules, tmp_path: Path, variant: str | None) -> None:
    path = save_folder(modules, tmp_path / "m", max_shard_size="1MB", variant=variant)
    shards = sorted((path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    with open_checkpoint(path, variant=variant) as checkpoint:
        check_equal(checkpoint, modules)
        assert len(checkpoint.files()) > 3
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name}.*is missing"):
        open_checkpoint(path)


def test_shard_indexes_that_lie(modules: Modules, tmp_path: Path) -> None:
    path = save_folder(modules, tmp_path / "m", max_shard_size="1MB")
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


def test_bin_weights_in_a_folder(modules: Modules, tmp_path: Path) -> None:
    path = save_folder(modules, tmp_path / "m", safe_serialization=False)
    if not list((path / "text_encoder").glob("*.bin")):
        pytest.skip("this transformers no longer writes .bin files")
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, modules)


def test_early_diffusers_names(modules: Modules, folder: Path, tmp_path: Path) -> None:
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
        check_equal(checkpoint, modules)


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


def save_single(state: Mapping[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    return path


def test_a_single_file(modules: Modules, tmp_path: Path) -> None:
    path = save_single(ldm_state(modules), tmp_path / "flux-sdxl-whatever.safetensors")
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, modules)
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


def test_single_file_of_an_early_text_encoder(modules: Modules, tmp_path: Path) -> None:
    state = {name.replace(".text_model.", "."): tensor for name, tensor in ldm_state(modules).items()}
    assert not any("text_model" in name for name in state)
    with open_checkpoint(save_single(state, tmp_path / "a.safetensors")) as checkpoint:
        check_equal(checkpoint, modules)


def test_diffusers_names_below_prefixes(modules: Modules, tmp_path: Path) -> None:
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
        with open_checkpoint(save_single(state, tmp_path / "a.safetensors")) as checkpoint:
            check_equal(checkpoint, modules)


def test_a_bare_unet(modules: Modules, folder: Path, tmp_path: Path) -> None:
    state = modules["unet"].state_dict()
    names = unet_ldm_names(state)
    for stored in ({names[name]: t for name, t in state.items()}, state):
        path = save_single(stored, tmp_path / "unet.safetensors")
        with open_checkpoint(path, vae=folder, text_encoder=folder) as checkpoint:
            check_equal(checkpoint, modules)


def test_ema_is_taken_on_request_or_when_alone(modules: Modules, tmp_path: Path) -> None:
    path = save_single(with_ema(ldm_state(modules)), tmp_path / "ema.safetensors")
    weight = modules["unet"].state_dict()["conv_in.weight"].numpy()
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, modules)
        assert checkpoint.has_ema
        assert not checkpoint.uses_ema
    with open_checkpoint(path, ema=True) as checkpoint:
        assert checkpoint.uses_ema
        assert set(checkpoint.tensors("unet")) == set(modules["unet"].state_dict())
        assert np.array_equal(checkpoint.read("unet", "conv_in.weight"), 2 * weight)
    only = {
        n: t for n, t in with_ema(ldm_state(modules)).items() if not n.startswith("model.diffusion_model.")
    }
    with open_checkpoint(save_single(only, tmp_path / "only.safetensors")) as checkpoint:
        assert checkpoint.uses_ema
        assert set(checkpoint.tensors("unet")) == set(modules["unet"].state_dict())
        assert np.array_equal(checkpoint.read("unet", "conv_in.weight"), 2 * weight)
    del only["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(CheckpointError, match="holds no UNet"):
        open_checkpoint(save_single(only, tmp_path / "broken.safetensors"))
    broken = with_ema(ldm_state(modules))
    del broken["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(CheckpointError, match="EMA copy lacks 1 of"):
        open_checkpoint(save_single(broken, tmp_path / "broken.safetensors"), ema=True)
    with pytest.raises(CheckpointError, match="no EMA weights"):
        open_checkpoint(save_single(ldm_state(modules), tmp_path / "none.safetensors"), ema=True)


def test_missing_networks_and_companions(modules: Modules, folder: Path, tmp_path: Path) -> None:
    path = save_single(ldm_state(modules, ("unet",)), tmp_path / "unet.safetensors")
    vae = save_single(ldm_state(modules, ("vae",)), tmp_path / "vae.safetensors")
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in load_file(vae).items()}
    bare_vae = save_single(
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
            check_equal(checkpoint, modules)
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


@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt(modules: Modules, tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": ldm_state(modules), "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, modules)
        assert checkpoint.layout == "pickle"


def test_bfloat16_from_ckpt(modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({name: tensor.bfloat16() for name, tensor in ldm_state(modules).items()}, path)
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, modules, ml_dtypes.bfloat16)


class Bomb:
    """What a hostile pickle does: runs a function when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": Bomb(tmp_path / "exploded")}}, path)
    with pytest.raises(CheckpointError, match="refuses to read it safely"):
        open_checkpoint(path)
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="refuses to read it safely"):
        open_checkpoint(path)


def test_ckpt_without_torch(modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(ldm_state(modules), path)
    original = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(CheckpointError, match=r"pip install 'kiln-diffusion\[export\]'"):
        open_checkpoint(path)


def test_pickle_named_safetensors(modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(ldm_state(modules), path)
    with pytest.raises(CheckpointError, match="zip archive"):
        open_checkpoint(path)


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


def test_v_prediction_is_read_from_the_file(modules: Modules, tmp_path: Path) -> None:
    state = ldm_state(modules)
    with open_checkpoint(save_single(state, tmp_path / "a.safetensors")) as checkpoint:
        assert checkpoint.scheduler_config.get("prediction_type", "epsilon") == "epsilon"
    path = save_single(state, tmp_path / "b.safetensors", **{"modelspec.prediction_type": "v"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.scheduler_config["prediction_type"] == "v_prediction"


def test_two_names_for_one_tensor(modules: Modules, tmp_path: Path) -> None:
    state = ldm_state(modules)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    state[name.replace("text_model.", "")] = state[name].clone()
    with pytest.raises(CheckpointError, match=r"are both text_model\.final_layer_norm\.weight"):
        open_checkpoint(save_single(state, tmp_path / "a.safetensors"))


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


def test_networks_of_different_models(modules: Modules, folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(**(shipped_config("text_encoder") | {"hidden_size": 36, "num_hidden_layers": 1}))
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "text_encoder")
    CLIPTextModel(text).save_pretrained(path / "text_encoder")
    with pytest.raises(CheckpointError, match="36 wide, the UNet reads 64"):
        open_checkpoint(path)
    state = ldm_state(modules)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:1000].clone()
    with pytest.raises(CheckpointError, match="knows 1000 tokens"):
        open_checkpoint(save_single(state, tmp_path / "small.safetensors"))


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


def test_inspection(modules: Modules, tmp_path: Path) -> None:
    path = save_single(with_ema(ldm_state(modules)), tmp_path / "a.safetensors")
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
