"""Planning and baking: what is touched, what adds up, what is refused, and real files of strangers."""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.formats import split_key
from kiln.exporters.adapters.keys import ModuleIndex
from kiln.exporters.adapters.plan import plan_bake

LIMIT = THRESHOLDS["baked_weight_relative_l2"]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def everywhere(network, module):
    return True


def attention(network, module):
    return ".attn" in module or ".self_attn." in module


def of_unet(network, module):
    return network == "unet" and attention(network, module)


@pytest.fixture
def adapter(make_lora, spell, save):
    return save(spell("kohya", make_lora(everywhere)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_untouched_and_strength_0_give_back_the_same_tensor(tiny, adapter, dtype):
    name = f"{QUERY}.weight"
    tensor = tiny.tensors["unet"][name].astype(dtype)
    before = tensor.tobytes()
    with plan_bake(tiny.shapes, [AdapterRef(adapter, 0.0)]) as plan:
        assert not any(plan.is_touched(n, k) for n, tensors in tiny.tensors.items() for k in tensors)
        assert plan.bake("unet", name, tensor) is tensor
        assert plan.reports[0].matched_modules["unet"] > 0
    with plan_bake(tiny.shapes, [AdapterRef(adapter, 1.0, 0.0)]) as plan:
        text = "text_model.encoder.layers.0.mlp.fc1.weight"
        assert plan.is_touched("unet", name)
        assert not plan.is_touched("text_encoder", text)
        assert not plan.is_touched("unet", f"{QUERY}.bias")
        assert not plan.is_touched("vae", name)
        assert plan.bake("unet", name, tensor).dtype == np.float32
    assert tensor.tobytes() == before


def test_strengths_add_up(tiny, adapter, baked):
    one = baked(tiny, AdapterRef(adapter, 0.9, 0.5))
    two = baked(tiny, AdapterRef(adapter, 0.5, 0.2), AdapterRef(adapter, 0.4, 0.3))
    assert all(LIMIT.holds(relative_l2(two[key], one[key])) for key in one)
    wrong = baked(tiny, AdapterRef(adapter, 0.5, 0.2), AdapterRef(adapter, 0.41, 0.3))
    assert not all(LIMIT.holds(relative_l2(wrong[key], one[key])) for key in one)


def test_opposite_strengths_cancel(tiny, adapter, baked):
    there_and_back = baked(tiny, AdapterRef(adapter, 0.7), AdapterRef(adapter, -0.7))
    for (network, name), value in there_and_back.items():
        np.testing.assert_allclose(value, tiny.tensors[network][name], atol=1e-6)


def test_a_half_precision_base_is_summed_in_float32(tiny, adapter):
    name = f"{QUERY}.weight"
    half = tiny.tensors["unet"][name].astype(np.float16)
    with plan_bake(tiny.shapes, [AdapterRef(adapter, 0.5)] * 2) as plan:
        actual = plan.bake("unet", name, half)
        delta = plan.bake("unet", name, np.zeros(half.shape, np.float32))
    assert LIMIT.holds(relative_l2(actual, half.astype(np.float32) + delta))


def test_the_report(tiny, make_lora, spell, save):
    tensors = spell("kohya", make_lora(attention))
    stray = {
        "lora_unet_down_blocks_9_attentions_0_proj_in.alpha": np.float32(1)[None],
        "note": np.zeros(2, "f4"),
    }
    path = save(tensors | stray, metadata={"ss_output_name": "mine", "ss_tag_frequency": "long"})
    with plan_bake(tiny.shapes, [AdapterRef(path, 0.5, 0.25)]) as plan:
        (report,) = plan.reports
    expected = Counter(f.network for f in make_lora(attention))
    assert dict(report.matched_modules) == dict(expected)
    assert set(report.unmatched_keys) == set(stray)
    assert (report.path, report.format) == (path, "LoRA")
    assert (report.unet_strength, report.text_encoder_strength) == (0.5, 0.25)
    assert report.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.metadata == {"ss_output_name": "mine"}


def test_the_file_is_closed_when_the_plan_is_let_go(tiny, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        plan = plan_bake(tiny.shapes, [AdapterRef(adapter)])
        del plan
        gc.collect()


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


def kohya(modules, context, rank=4):
    """A kohya file of attn2.to_k modules that read ``context`` features."""
    tensors = {}
    for name, width in modules.items():
        tensors[f"{name}.lora_down.weight"] = np.zeros((rank, context), np.float32)
        tensors[f"{name}.lora_up.weight"] = np.zeros((width, rank), np.float32)
    return tensors


SDXL = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": 640}
SD2 = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": 320}
FLUX = {
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": np.zeros((4, 3072), np.float32),
    "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": np.zeros((3072, 4), np.float32),
}
FOREIGN = {
    "FLUX": (FLUX, "is a FLUX LoRA .*this model is SD1"),
    "FLUX of kohya": (
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": np.zeros((4, 9))},
        "FLUX LoRA",
    ),
    "SDXL": (kohya(SDXL, 2048), r"for SDXL \(its attn2.to_k reads 2048 features\); this model is SD1"),
    "SDXL text": (
        kohya({"lora_te2_text_model_encoder_layers_0_mlp_fc1": 9}, 9),
        "SDXL .*second text encoder",
    ),
    "SD2": (kohya(SD2, 1024), r"for SD2 \(its attn2.to_k reads 1024 features\)"),
    "SD3": (
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.zeros((4, 9))},
        "diffusion transformer",
    ),
    "Cascade": ({"lora_prior_unet_x.lora_down.weight": np.zeros((4, 9))}, "Stable Cascade"),
    "embedding": ({"emb_params": np.zeros((2, 768))}, "is a textual inversion embedding"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": np.zeros(3)}, "is a checkpoint, not an adapter"),
    "unrelated": (
        {"fc.lora_down.weight": np.zeros((4, 9)), "fc.lora_up.weight": np.zeros((9, 4))},
        "none of its 2",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_family_is_refused_with_the_reason(sd1_shapes, save, case):
    tensors, message = FOREIGN[case]
    # What the metadata claims is not believed.
    path = save(tensors, metadata={"ss_base_model_version": "sd_1.5"})
    with pytest.raises(AdapterError, match=message) as caught:
        plan_bake(sd1_shapes, [AdapterRef(path)])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_tiny_target_compares_shapes(tiny, save):
    with pytest.raises(AdapterError, match=r"attn2.to_k.weight.*\[320, 1024\].*\[16, 24\].*probably for SD2"):
        plan_bake(tiny.shapes, [AdapterRef(save(kohya(SD2, 1024)))])


UNSUPPORTED = {
    "LoHa": {
        "hada_w1_a": (9, 4),
        "hada_w1_b": (4, 9),
        "hada_w2_a": (9, 4),
        "hada_w2_b": (4, 9),
        "alpha": (1,),
    },
    "LoKr": {"lokr_w1": (3, 3), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 3)},
    "DoRA": {"lora_down.weight": (4, 9), "lora_up.weight": (9, 4), "dora_scale": (1, 9)},
    "IA3": {"weight": (9,), "on_input": (1,)},
    "OFT": {"oft_blocks": (3, 3, 3)},
    "GLoRA": {"a1.weight": (9, 4), "a2.weight": (4, 9), "b1.weight": (9, 4), "b2.weight": (4, 9)},
    "full difference": {"diff": (9, 9)},
    "norm difference": {"w_norm": (9,)},
}


@pytest.mark.parametrize("form", UNSUPPORTED)
def test_formats_to_come_are_refused_by_name(tiny, save, form):
    stem = "lora_unet_" + QUERY.replace(".", "_")
    path = save({f"{stem}.{name}": np.ones(shape, np.float32) for name, shape in UNSUPPORTED[form].items()})
    with pytest.raises(AdapterError, match=f"format {form}; this version reads LoRA and LoCon"):
        plan_bake(tiny.shapes, [AdapterRef(path)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_when_planning(tiny, make_lora, spell, save, value):
    tensors = spell("kohya", make_lora(of_unet))
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key] = tensors[key].copy()
    tensors[key].flat[0] = value
    with pytest.raises(AdapterError, match=r"holds NaN or infinity"):
        plan_bake(tiny.shapes, [AdapterRef(save(tensors))])


def test_a_change_that_overflows_is_refused_when_baking(tiny, make_lora, spell, save):
    tensors = {
        k: np.full_like(v, 1e30) if "lora_" in k[-20:] else v
        for k, v in spell("kohya", make_lora(of_unet)).items()
    }
    with (
        plan_bake(tiny.shapes, [AdapterRef(save(tensors))]) as plan,
        pytest.raises(AdapterError, match="overflows"),
    ):
        plan.bake("unet", f"{QUERY}.weight", tiny.tensors["unet"][f"{QUERY}.weight"])


def test_integer_factors_are_refused(tiny, save):
    stem = "lora_unet_" + QUERY.replace(".", "_")
    tensors = {
        f"{stem}.lora_down.weight": np.ones((4, 16), "i4"),
        f"{stem}.lora_up.weight": np.ones((16, 4), "i4"),
    }
    with pytest.raises(AdapterError, match="type I32; expected floating point"):
        plan_bake(tiny.shapes, [AdapterRef(save(tensors))])


def test_one_module_under_two_names_is_refused(tiny, make_lora, spell, save):
    factors = make_lora(of_unet, alpha=None)
    tensors = spell("kohya", factors) | spell("diffusers", factors)
    with pytest.raises(AdapterError, match="are the same module"):
        plan_bake(tiny.shapes, [AdapterRef(save(tensors))])


def test_both_dialects_in_one_file_are_both_applied(tiny, make_lora, spell, save):
    factors = make_lora(everywhere)
    tensors = spell("kohya", factors[::2]) | spell("kohya, LDM names", factors[1::2])
    with plan_bake(tiny.shapes, [AdapterRef(save(tensors))]) as plan:
        assert sum(plan.reports[0].matched_modules.values()) == len(factors)
        assert plan.reports[0].unmatched_keys == ()


HOSTILE = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "text": (b"this is not a tensor file, it is a letter", "is a text file"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git-LFS pointer",
    ),
    "header too long": ((10**9).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header beyond the end": ((500).to_bytes(8, "little") + b"{}", "truncated"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    "zip": (b"PK\x03\x04" + bytes(60), "torch"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line_errors(tiny, tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterError, match=message) as caught:
        plan_bake(tiny.shapes, [AdapterRef(path)])
    assert "\n" not in str(caught.value)


def test_a_truncated_adapter_is_refused(tiny, adapter):
    adapter.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="truncated"):
        plan_bake(tiny.shapes, [AdapterRef(adapter)])


def test_a_folder_without_weights_is_refused(tiny, tmp_path):
    with pytest.raises(AdapterError, match=r"folder without adapter_model.safetensors"):
        plan_bake(tiny.shapes, [AdapterRef(tmp_path)])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"unet.lora_alpha": "many"}', "finite number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}', "runs no expressions"),
        ('{"unet.peft_type": "LOKR"}', "LOKR"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(tiny, make_lora, spell, save, metadata, message):
    tensors = spell("diffusers, peft suffixes", make_lora(of_unet, alpha=None))
    with pytest.raises(AdapterError, match=message):
        plan_bake(tiny.shapes, [AdapterRef(save(tensors, metadata={"lora_adapter_metadata": metadata}))])


REAL = {
    "sd-pokemon-model-lora_pytorch_lora_weights.safetensors": ({"unet": 128}, 0),
    "attn_procs_sd1.safetensors": ({"unet": 128}, 0),
    "analog_svd_rank4.safetensors": ({"unet": 144, "text_encoder": 48}, 0),
    "lora_disney.safetensors": ({"unet": 144, "text_encoder": 48}, 2),
    "peft_sd15_text_encoder": ({"text_encoder": 24}, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_match_the_real_sd1(sd1_shapes, shared, name):
    modules, unmatched = REAL[name]
    with plan_bake(sd1_shapes, [AdapterRef(shared / "adapters" / name, 0.5)]) as plan:
        (report,) = plan.reports
        touched = {key for key in ((n, k) for n, t in sd1_shapes.items() for k in t) if plan.is_touched(*key)}
        network, tensor = min(touched)
        base = np.zeros(sd1_shapes[network][tensor], np.float16)
        value = plan.bake(network, tensor, base)
    assert dict(report.matched_modules) == modules
    assert len(report.unmatched_keys) == unmatched
    assert len(touched) == sum(modules.values())
    assert value.dtype == np.float32
    assert np.isfinite(value).all()
    assert value.any()


def test_a_real_lokr_is_refused_by_name(sd1_shapes, shared):
    with pytest.raises(AdapterError, match="format LoKr"):
        plan_bake(sd1_shapes, [AdapterRef(shared / "adapters" / "smart_falcon_4_lokr.safetensors")])


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
