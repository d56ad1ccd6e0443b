"""The key map against diffusers' converter, diffusers' classes, and lists of names from real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln.exporters import ldm_names
from kiln.exporters.key_maps import KEY_MAPS
from kiln.exporters.parts import shipped_config
from kiln.exporters.structure import derive_config

Shapes = dict[str, tuple[int, ...]]
MAPS = KEY_MAPS["sd1"].names


def meta_shapes(network: str, config: dict[str, Any] | None = None) -> Shapes:
    """Names and shapes of the class that diffusers or transformers builds from a config, without storage."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = config or shipped_config(network)
    with torch.device("meta"):
        if network == "text_encoder":
            module: torch.nn.Module = CLIPTextModel(CLIPTextConfig(**config))
        else:
            classes = {c.__name__: c for c in (AutoencoderKL, AutoencoderTiny, UNet2DConditionModel)}
            module = classes[config["_class_name"]].from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def ours(network: str, shapes: Shapes) -> Shapes:
    names = MAPS[network](shapes)
    reshape = ldm_names.vae_shape if network == "vae" else lambda name, shape: shape
    mapped = {new: reshape(new, shapes[old]) for old, new in names.items()}
    assert len(mapped) == len(names), "two names became one"
    return mapped


@pytest.mark.parametrize(
    ("network", "key_file", "count"),
    [("unet", "UNET-v1-SD", 686), ("vae", "VAE-v1-SD", 248), ("text_encoder", "CLIP-v1-SD", 196)],
)
def test_real_names_become_those_of_the_class(
    key_list: Callable[[str], Shapes], network: str, key_file: str, count: int
) -> None:
    mapped = ours(network, key_list(key_file))
    expected = meta_shapes(network)
    assert len(mapped) == count
    assert set(mapped) == {name for name in expected if not name.endswith("position_ids")}
    assert mapped == {name: expected[name] for name in mapped}


def test_a_planted_swap_in_the_key_map_is_seen(
    key_list: Callable[[str], Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = dict(ldm_names._RESNET)
    table["emb_layers.1"], table["skip_connection"] = table["skip_connection"], table["emb_layers.1"]
    monkeypatch.setattr(ldm_names, "_RESNET", table)
    assert ours("unet", key_list("UNET-v1-SD")) != meta_shapes("unet")


def numbered(shapes: Shapes) -> dict[str, torch.Tensor]:
    """One tensor per name whose every element is its number, without storage of its size."""
    return {name: torch.tensor(float(n)).expand(shape) for n, (name, shape) in enumerate(shapes.items())}


def converted(
    network: str, shapes: Shapes, config: dict[str, Any]
) -> dict[str, tuple[float, tuple[int, ...]]]:
    from diffusers.loaders import single_file_utils as theirs

    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[network]
    given = {prefix + name: tensor for name, tensor in numbered(shapes).items()}
    convert = {"unet": theirs.convert_ldm_unet_checkpoint, "vae": theirs.convert_ldm_vae_checkpoint}[network]
    result = convert(given, config)
    return {name: (float(tensor.flatten()[0]), tuple(tensor.shape)) for name, tensor in result.items()}


def ours_numbered(network: str, shapes: Shapes) -> dict[str, tuple[float, tuple[int, ...]]]:
    mapped = ours(network, shapes)
    number = {name: float(n) for n, name in enumerate(shapes)}
    return {new: (number[old], mapped[new]) for old, new in MAPS[network](shapes).items()}


@pytest.mark.parametrize(("network", "key_file"), [("unet", "UNET-v1-SD"), ("vae", "VAE-v1-SD")])
def test_each_tensor_goes_where_diffusers_puts_it(
    key_list: Callable[[str], Shapes], network: str, key_file: str
) -> None:
    shapes = key_list(key_file)
    expected = converted(network, shapes, shipped_config(network))
    got = ours_numbered(network, shapes)
    assert set(got) == set(expected)
    assert {name: shape for name, (_, shape) in got.items()} == {name: s for name, (_, s) in expected.items()}
    assert got == expected
    swapped = list(shapes)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    assert ours_numbered(network, {name: shapes[name] for name in swapped}) != expected


@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths_go_where_diffusers_puts_them(layers: int) -> None:
    config = shipped_config("unet") | {"block_out_channels": [32, 64, 64], "layers_per_block": layers}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]}
    config |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    shapes = meta_shapes("unet", config)
    back = ldm_names.unet_ldm_names(shapes)
    assert set(back) == set(shapes)
    ldm = {back[name]: shape for name, shape in shapes.items()}
    assert ldm_names.ldm_unet_layers(ldm) == layers
    got = ours_numbered("unet", ldm)
    expected = converted("unet", ldm, config)
    assert got == expected
    assert ours("unet", ldm) == shapes


def test_inverse_maps_give_the_real_names(key_list: Callable[[str], Shapes]) -> None:
    unet = key_list("UNET-v1-SD")
    assert {new: old for old, new in MAPS["unet"](unet).items()} == ldm_names.unet_ldm_names(
        meta_shapes("unet")
    )
    vae = key_list("VAE-v1-SD")
    assert {new: old for old, new in MAPS["vae"](vae).items()} == {
        name: ldm_names.vae_ldm_name(name) for name in meta_shapes("vae")
    }


def test_module_map_covers_sd1(key_list: Callable[[str], Shapes]) -> None:
    modules = ldm_names.ldm_unet_module_map()
    assert set(modules) == {name.rpartition(".")[0] for name in key_list("UNET-v1-SD")}
    assert set(modules.values()) == {name.rpartition(".")[0] for name in meta_shapes("unet")}
    assert modules == ldm_names.ldm_unet_module_map(meta_shapes("unet"))
    assert modules["output_blocks.2.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert modules["output_blocks.5.2.conv"] == "up_blocks.1.upsamplers.0.conv"


def test_ema_names(key_list: Callable[[str], Shapes]) -> None:
    names = key_list("UNET-v1-SD")
    ema = {ldm_names.ema_name(name) for name in names}
    assert len(ema) == len(names), "dot removal collides"
    assert {name.removeprefix("diffusion_model") for name in ema} == set(key_list("UNET-v1-EMA"))


def test_whole_file_of_sd_mecha(sd1_ldm_keys: Shapes) -> None:
    from kiln.exporters.single_files import group_by_network

    groups = group_by_network(sd1_ldm_keys)
    for network, group in groups.items():
        shapes = {bare: sd1_ldm_keys[stored] for stored, bare in group.items()}
        expected = meta_shapes(network)
        assert ours(network, shapes) == {n: s for n, s in expected.items() if not n.endswith("position_ids")}


def test_text_encoder_names_of_every_age() -> None:
    name = "text_model.encoder.layers.3.mlp.fc1.weight"
    assert ldm_names.clip_text_name(name) == name
    assert ldm_names.clip_text_name(name.removeprefix("text_model.")) == name
    for dropped in (
        "text_model.embeddings.position_ids",
        "text_projection.weight",
        "logit_scale",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ):
        assert ldm_names.clip_text_name(dropped) is None


def test_early_diffusers_autoencoder_names() -> None:
    place = "decoder.mid_block.attentions.0"
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        assert ldm_names.current_vae_name(f"{place}.{old}.weight") == f"{place}.{new}.weight"
        assert ldm_names.vae_shape(f"{place}.{new}.weight", (8, 8, 1, 1)) == (8, 8)
    assert ldm_names.vae_shape("decoder.up_blocks.2.resnets.0.conv_shortcut.weight", (8, 4, 1, 1)) == (
        8,
        4,
        1,
        1,
    )


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_the_shipped_config_is_what_shapes_say(network: str) -> None:
    config = shipped_config(network)
    assert derive_config(network, meta_shapes(network), config) == config


def test_the_config_of_another_depth_is_derived() -> None:
    config = shipped_config("unet") | {"block_out_channels": [320, 640, 1280], "layers_per_block": 1}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
    config |= {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    config["mid_block_type"] = None
    shapes = meta_shapes("unet", config)
    derived = derive_config("unet", shapes, shipped_config("unet"))
    assert derived == config
    assert meta_shapes("unet", derived) == shapes


def test_taesd_config_is_the_class_default() -> None:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        theirs = AutoencoderTiny()
    config = shipped_config("vae_tiny")
    for name, value in config.items():
        if name != "_class_name":
            said = theirs.config[name]
            assert (list(said) if isinstance(said, tuple) else said) == value
    assert len(meta_shapes("vae", config)) == 134


def test_the_shipped_tokenizer_is_clips() -> None:
    folder = Path(ldm_names.__file__).parent / "data" / "sd1" / "tokenizer"
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert merges[0].startswith("#version")
    pairs = [line for line in merges[1:] if line]
    assert len(pairs) == 49152 - 256 - 2
    # CLIP numbers its tokens: 256 bytes, the same ending a word, one per merge, two marks.
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    assert [vocabulary[token] for token in ordered] == list(range(49408))
    assert ordered[512:-2] == ["".join(pair.split()) for pair in pairs]
    assert ordered[256:512] == [f"{token}</w>" for token in ordered[:256]]
    assert ordered[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert "OpenAI" in (folder / "LICENSE-CLIP").read_text()
