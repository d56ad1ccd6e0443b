"""Names: every dialect's spelling of a module, keys taken apart, and the key lists of real files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.formats import split_key
from kiln.exporters.adapters.keys import Location, ModuleIndex
from kiln.exporters.adapters.plan import plan_bake

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_" + QUERY.replace(".", "_"),
        "lora_unet_unet_" + QUERY.replace(".", "_"),
        "lycoris_" + QUERY.replace(".", "_"),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "unet." + QUERY,
        QUERY,
        "base_model.model." + QUERY,
        "unet.base_model.model." + QUERY,
        QUERY.replace(".to_q", ".processor.to_q"),
    ],
)
def test_every_spelling_of_one_module(tiny, stem):
    location = ModuleIndex(tiny.shapes).locate(stem)
    assert location is not None
    assert (location.network, location.module) == ("unet", QUERY)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_unet_x_to_q_lora_down.weight", ("lora_unet_unet_x_to_q", "down")),
        ("a.processor.to_out_lora.up.weight", ("a.processor.to_out", "up")),
        ("a.to_q.lora_A.default.weight", ("a.to_q", "down")),
        ("a.q_proj.lora_linear_layer.up.weight", ("a.q_proj", "up")),
        ("a.to_q.lora.alpha", ("a.to_q", "alpha")),
        ("unet:12:up", ("unet:12", "up")),
        ("a.lora_B.bias", ("a", "up_bias")),
        ("a.bias", None),
    ],
)
def test_keys_are_split_at_the_longest_suffix(key, expected):
    split = split_key(key)
    assert (split and (split.stem, split.parameter)) == expected


def test_unknown_modules_and_positions_are_not_guessed(tiny):
    index = ModuleIndex(tiny.shapes)
    assert index.locate("lora_unet_down_blocks_9_attentions_0_proj_in") is None
    assert index.locate("lora_te2_text_model_encoder_layers_0_mlp_fc1") is None
    assert index.place(["unet:0", "unet:1"]) == {}


@pytest.mark.parametrize("name", ["LoRA-v1-UNET", "LoRA-v1-CLIP", "LoRA-v1A-UNET", "LoRA-v1A-CLIP"])
def test_real_key_lists_match_the_real_sd1(sd1_shapes, shared, name):
    index = ModuleIndex(sd1_shapes)
    lines = (shared / "keys" / "model-toolkit" / f"{name}.txt").read_text().split("\n")
    stems = set()
    for line in filter(None, lines):
        key, shape = line.split(" ", 1)
        split = split_key(key)
        location = index.locate(split.stem)
        assert location is not None, key
        stems.add(split.stem)
        weight = index.shapes[location.network, f"{location.module}.weight"]
        expected = {"down": [-1, *weight[1:]], "up": [weight[0], -1, *(1,) * (len(weight) - 2)], "alpha": []}
        assert json.loads(shape) == expected[split.parameter], key
    assert len(stems) == (192 if "UNET" in name else 72)


def test_a_real_kohya_header_matches_the_real_sd1_and_an_sdxl_one_does_not(sd1_shapes, shared, save):
    headers = {
        name: json.loads((shared / "keys" / "invokeai" / f"{name}.json").read_text())
        for name in ("shinkai_makoto_offset", "Alien_Style")
    }
    index = ModuleIndex(sd1_shapes)
    stems = {split_key(key).stem for key in headers["shinkai_makoto_offset"]}
    assert len(index.place(stems)) == len(stems) == 264
    tensors = {
        k: np.zeros(
            [min(n, 2) if i == 0 and "down" in k else n for i, n in enumerate(v["shape"])], np.float16
        )
        for k, v in headers["Alien_Style"].items()
        if "attn2_to_k" in k and "transformer_blocks_0" in k
    }
    with pytest.raises(AdapterError, match="for SDXL"):
        plan_bake(sd1_shapes, [AdapterRef(save(tensors))])


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet." + QUERY.replace(".", "_"),
        "lora_unet." + QUERY,
        "lycoris_unet_" + QUERY.replace(".", "_"),
        "oft_unet_" + QUERY.replace(".", "_"),
        "oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "lycoris_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    ],
)
def test_more_spellings_of_one_module(tiny, stem):
    assert ModuleIndex(tiny.shapes).locate(stem) == Location("unet", QUERY)


TEXT_QUERY = "text_model.encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("stem", "network"),
    [
        *((f"{prefix}{TEXT_QUERY}", "text_encoder") for prefix in (
            "text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.",
            "base_model.model.text_encoder.", "text_encoder.base_model.model.", "lora_te1.", "lora_te.",
        )),
        *((f"{prefix}{TEXT_QUERY}", "text_encoder_2") for prefix in (
            "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "lora_te2.",
            "base_model.model.text_encoder_2.", "text_encoder_2.base_model.model.",
        )),
        *((prefix + TEXT_QUERY.replace(".", "_"), "text_encoder") for prefix in (
            "lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_te1_",
        )),
        ("lora_te2_" + TEXT_QUERY.replace(".", "_"), "text_encoder_2"),
        ("lycoris_te2_" + TEXT_QUERY.replace(".", "_"), "text_encoder_2"),
        ("text_encoder_2." + TEXT_QUERY.replace("q_proj", "to_q"), "text_encoder_2"),
        ("text_encoder." + TEXT_QUERY.replace("text_model.", ""), "text_encoder"),
    ],
)  # fmt: skip
def test_spellings_of_the_text_encoders_of_sdxl(sdxl_shapes, stem, network):
    assert ModuleIndex(sdxl_shapes).locate(stem) == Location(network, TEXT_QUERY)


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
        ("diffusion_model.label_emb.0.2", "add_embedding.linear_2"),
        ("lora_unet_time_embed_0", "time_embedding.linear_1"),
        ("lora_unet_input_blocks_0_0", "conv_in"),
        ("lora_unet_out_2", "conv_out"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        (
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
        ),
        ("lora_unet_input_blocks_4_0_in_layers_0", "down_blocks.1.resnets.0.norm1"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
    ],
)  # fmt: skip
def test_names_of_the_unet_of_sdxl_in_both_dialects(sdxl_shapes, stem, module):
    assert ModuleIndex(sdxl_shapes).locate(stem) == Location("unet", module)


def test_the_text_projection_of_the_second_encoder(sdxl_shapes):
    index = ModuleIndex(sdxl_shapes)
    for stem in ("lora_te2_text_projection", "text_encoder_2.text_projection"):
        assert index.locate(stem) == Location("text_encoder_2", "text_projection")


def test_names_without_a_network_go_to_the_encoder_that_has_them_all(sdxl_shapes):
    index = ModuleIndex(sdxl_shapes)
    stems = [f"base_model.model.text_model.encoder.layers.{n}.mlp.fc1" for n in range(32)]
    assert {place.network for place in index.place(stems).values()} == {"text_encoder_2"}
    assert len(index.place(stems)) == 32
    assert {place.network for place in index.place(stems[:12]).values()} == {"text_encoder"}


def test_the_only_text_encoder_of_the_refiner_answers_for_the_first(sdxl_shapes):
    index = ModuleIndex({"text_encoder_2": sdxl_shapes["text_encoder_2"]})
    stem = "lora_te_text_model_encoder_layers_31_mlp_fc1"
    assert index.locate(stem) == Location("text_encoder_2", "text_model.encoder.layers.31.mlp.fc1")


def test_a_real_sdxl_header_maps_completely(sdxl_shapes, shared):
    header = json.loads((shared / "keys" / "invokeai" / "Alien_Style.json").read_text())
    index = ModuleIndex(sdxl_shapes)
    places = index.place({split_key(key).stem for key in header})
    counts = {network: sum(p.network == network for p in places.values()) for network in sdxl_shapes}
    assert counts == {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}
    assert len(set(places.values())) == len(header) // 3 == len(places)
    for key, entry in header.items():
        split = split_key(key)
        weight = index.shapes[places[split.stem].tensor("weight")]
        if split.parameter == "down":
            assert entry["shape"][1:] == list(weight[1:]), key
        elif split.parameter == "up":
            assert entry["shape"][0] == weight[0], key


def test_sdxl_shapes_are_those_of_a_real_checkpoint(sdxl_shapes, shared):
    files = {
        "unet": "Juggernaut_XL_v9_unet_diffusion_pytorch_model.fp16",
        "text_encoder": "Juggernaut_XL_v9_text_encoder_model.fp16",
        "text_encoder_2": "Juggernaut_XL_v9_text_encoder_2_model.fp16",
    }
    for network, name in files.items():
        header = json.loads((shared / "keys" / "invokeai" / f"{name}.json").read_text())
        assert {key: tuple(entry["shape"]) for key, entry in header.items()} == sdxl_shapes[network]


def test_both_unet_dialects_in_one_sdxl_file_are_both_applied(sdxl_shapes, save):
    """As in the LCM and turbo mixes of which diffusers drops the half in SGM names."""
    stems = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
        "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (640, 2048),
    }
    tensors = {}
    for stem, (out, into) in stems.items():
        tensors[f"{stem}.lora_down.weight"] = np.ones((2, into), np.float16)
        tensors[f"{stem}.lora_up.weight"] = np.ones((out, 2), np.float16)
    with plan_bake(sdxl_shapes, [AdapterRef(save(tensors))]) as plan:
        assert plan.reports[0].matched_modules == {"unet": 2}
        assert plan.reports[0].unmatched_keys == ()


def test_4d_factors_for_the_linear_projections_of_sd2(sd2_shapes, save):
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert sd2_shapes["unet"]["down_blocks.0.attentions.0.proj_in.weight"] == (320, 320)
    tensors = {
        f"{stem}.lora_down.weight": np.ones((2, 320, 1, 1), np.float16),
        f"{stem}.lora_up.weight": np.ones((320, 2, 1, 1), np.float16),
    }
    with plan_bake(sd2_shapes, [AdapterRef(save(tensors))]) as plan:
        name = "down_blocks.0.attentions.0.proj_in.weight"
        baked = plan.bake("unet", name, np.zeros((320, 320), np.float32))
    assert (baked == 2).all()
