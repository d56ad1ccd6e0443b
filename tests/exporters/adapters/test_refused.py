"""What is refused before anything is written: other families, damaged files, values that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.errors import AdapterError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_" + QUERY.replace(".", "_")


def of_unet(network, module):
    return network == "unet" and ".attn" in module


def everywhere(network, module):
    return True


@pytest.fixture
def adapter(make_lora, spell, save):
    return save(spell("kohya", make_lora(everywhere)))


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
        ('{"unet.peft_type": "VERA"}', "VERA"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(tiny, make_lora, spell, save, metadata, message):
    tensors = spell("diffusers, peft suffixes", make_lora(of_unet, alpha=None))
    with pytest.raises(AdapterError, match=message):
        plan_bake(tiny.shapes, [AdapterRef(save(tensors, metadata={"lora_adapter_metadata": metadata}))])


EMBEDDING = {"<mine>": np.zeros(768, np.float32)}
FOREIGN_MORE = {
    "T-LoRA": ({f"{STEM}.lambda_layer": np.ones(4)}, "T-LoRA, which cannot be baked: it needs"),
    "DoRA over OFT": (
        {f"{STEM}.oft_R.weight": np.ones((4, 6)), f"{STEM}.initial_norm": np.ones((16, 1))},
        "DoRA over OFT, which cannot",
    ),
    "DoRA over GLoRA": (
        {f"{STEM}.{n}.weight": np.ones((16, 16)) for n in ("a1", "a2", "b1", "b2")}
        | {f"{STEM}.dora_scale": np.ones((16, 1))},
        "DoRA and GLoRA; expected one family",
    ),
    "DoRA over nothing": (
        {f"{STEM}.dora_scale": np.ones((16, 1))},
        "no change that it could give a length to",
    ),
    "reshape_weight": ({f"{STEM}.reshape_weight": np.ones(2)}, "FLUX's padded LoRA"),
    "VeRA": ({f"base_model.model.{QUERY}.vera_lambda_b": np.ones(16)}, "VeRA, which cannot be baked"),
    "two families": (
        {f"{STEM}.diff": np.ones((16, 16)), f"{STEM}.hada_w1_a": np.ones((16, 1))}
        | {f"{STEM}.lokr_w1": np.ones((4, 4))},
        "LoHa and LoKr; expected one family",
    ),
    "token": (EMBEDDING, "is a textual inversion embedding"),
}


@pytest.mark.parametrize("case", FOREIGN_MORE)
def test_what_cannot_be_baked_is_refused_by_name(tiny, save, case):
    tensors, message = FOREIGN_MORE[case]
    path = save({key: np.asarray(value, np.float32) for key, value in tensors.items()})
    with pytest.raises(AdapterError, match=message):
        plan_bake(tiny.shapes, [AdapterRef(path)])


def test_a_rank_below_one_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="rank 0"):
        AdapterRef(tmp_path, rank=0)
