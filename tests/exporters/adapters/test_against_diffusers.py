"""Baked weights of every dialect against ``fuse_lora`` of diffusers and ``merge_and_unload`` of PEFT."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.ldm_names import ldm_unet_module_map

LIMIT = THRESHOLDS["baked_weight_relative_l2"]


def is_attention(network, module):
    return ".attn" in module or ".self_attn." in module


def is_transformer(network, module):
    return network == "text_encoder" or ".attentions." in module


def is_sampled(network, module):
    return network == "text_encoder" or any(part in module for part in ("attentions", "resnets", "samplers"))


def worst(actual, expected):
    """Names, shapes, type, finite; then the largest relative distance of a tensor."""
    assert actual.keys() == expected.keys()
    distances = []
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        assert actual[key].dtype == np.float32, key
        assert np.isfinite(actual[key]).all(), key
        distances.append(relative_l2(actual[key], value))
    return max(distances)


def changed(tiny, weights):
    return {(n, k) for (n, k), v in weights.items() if not np.array_equal(v, tiny.tensors[n][k])}


def fuse(tiny, tensors, strength, **options):
    import torch

    pipeline = tiny.pipeline()
    pipeline.load_lora_weights({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, **options)
    pipeline.fuse_lora(lora_scale=strength)
    return pipeline


CASES = [
    ("kohya", is_sampled, 2.0),
    ("kohya", is_transformer, None),
    ("diffusers attention processors", is_attention, None),
    ("diffusers", is_attention, None),
    ("diffusers, peft suffixes", is_transformer, None),
]


@pytest.mark.parametrize(("dialect", "select", "alpha"), CASES)
def test_baked_weights_are_those_of_fuse_lora(
    tiny, make_lora, spell, save, baked, fused, dialect, select, alpha
):
    factors = make_lora(select, alpha=alpha)
    tensors = spell(dialect, factors)
    expected = fused(fuse(tiny, tensors, 0.7))
    actual = baked(tiny, AdapterRef(save(tensors), 0.7))
    assert len(changed(tiny, actual)) == len(factors)
    assert LIMIT.holds(worst(actual, expected))


def is_read_by_diffusers_in_ldm_names(network, module):
    # diffusers 0.39 takes input_blocks_1 for the start of input_blocks_10, and an upsampler without attention
    # before it for an attention: both occur in SD1 and not in SDXL, for which its mapping was written.
    far = "down_blocks.3" in module or "up_blocks.3.resnets.1" in module or "up_blocks.3.resnets.2" in module
    far = far or "up_blocks.3.attentions.1" in module or "up_blocks.3.attentions.2" in module
    return is_sampled(network, module) and not far and "up_blocks.0.upsamplers" not in module


def test_ldm_names_are_those_of_fuse_lora(tiny, make_lora, spell, save, baked, fused):
    factors = make_lora(is_read_by_diffusers_in_ldm_names)
    tensors = spell("kohya, LDM names", factors)
    assert any("input_blocks_4_1_transformer_blocks_0_attn1_to_q" in key for key in tensors)
    expected = fused(fuse(tiny, tensors, 0.7, unet_config=tiny.unet.config))
    actual = baked(tiny, AdapterRef(save(tensors), 0.7))
    assert len(changed(tiny, actual)) == len(factors)
    assert LIMIT.holds(worst(actual, expected))


def test_all_ldm_names_are_those_of_the_single_file_converter(tiny, make_lora, spell, save, baked):
    """Each LDM name is sent through diffusers' converter of checkpoints, with a number to know it by."""
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ldm = ldm_unet_module_map(tiny.tensors["unet"])
    numbers = {name: torch.tensor(float(i)) for i, name in enumerate(ldm)}
    checkpoint = {
        f"model.diffusion_model.{name}.{leaf}": number
        for name, number in numbers.items()
        for leaf in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, tiny.unet.config)
    expected = {f"{path}.weight": float(numbers[name]) for name, path in ldm.items()}
    assert {k: float(v) for k, v in converted.items() if k.endswith(".weight")} == expected
    factors = make_lora(lambda network, module: True)
    same = baked(tiny, AdapterRef(save(spell("kohya", factors), "diffusers_names")))
    other = baked(tiny, AdapterRef(save(spell("kohya, LDM names", factors), "ldm_names")))
    assert len(changed(tiny, other)) == len(factors)
    assert all(np.array_equal(same[key], other[key]) for key in same)


def test_bare_attention_processors_are_those_of_load_attn_procs(tiny, make_lora, spell, save, baked, fused):
    import torch

    factors = make_lora(lambda n, m: n == "unet" and is_attention(n, m), alpha=None)
    tensors = spell("bare attention processors", factors)
    pipeline = tiny.pipeline()
    pipeline.unet.load_attn_procs({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    pipeline.unet.fuse_lora(0.7)
    actual = baked(tiny, AdapterRef(save(tensors), 0.7))
    assert len(changed(tiny, actual)) == len(factors)
    assert LIMIT.holds(worst(actual, fused(pipeline)))


def scaled(tensors, factor):
    return {k: v * np.float32(factor) if "lora_up" in k else v for k, v in tensors.items()}


def other_alpha(tensors, factor):
    return {k: np.asarray(v * np.float32(factor)) if k.endswith("alpha") else v for k, v in tensors.items()}


def shifted(tensors):
    """Each up factor moved to another module of the same shape."""
    ups = [k for k in tensors if "lora_up" in k]
    shapes = {}
    for key in ups:
        shapes.setdefault(tensors[key].shape, []).append(key)
    moved = dict(tensors)
    for row in shapes.values():
        for source, target in zip(row, row[1:] + row[:1], strict=True):
            moved[target] = tensors[source]
    return moved


@pytest.mark.parametrize(
    "plant",
    [lambda t: scaled(t, 1.01), lambda t: other_alpha(t, 1.01), shifted],
    ids=["up", "alpha", "shifted"],
)
def test_a_planted_error_is_seen(tiny, make_lora, spell, save, baked, fused, plant):
    tensors = spell("kohya", make_lora(is_sampled))
    expected = fused(fuse(tiny, tensors, 0.7))
    assert not LIMIT.holds(worst(baked(tiny, AdapterRef(save(plant(tensors)), 0.7)), expected))


def test_an_error_of_the_strength_is_seen(tiny, make_lora, spell, save, baked, fused):
    tensors = spell("kohya", make_lora(is_sampled))
    expected = fused(fuse(tiny, tensors, 0.7))
    assert not LIMIT.holds(worst(baked(tiny, AdapterRef(save(tensors), 0.707)), expected))


def test_separate_strengths(tiny, make_lora, spell, save, baked, fused):
    import torch

    tensors = spell("kohya", make_lora(is_sampled))
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    pipeline.fuse_lora(components=["unet"], lora_scale=0.8)
    pipeline.fuse_lora(components=["text_encoder"], lora_scale=0.3)
    expected = fused(pipeline)
    path = save(tensors)
    assert LIMIT.holds(worst(baked(tiny, AdapterRef(path, 0.8, 0.3)), expected))
    assert not LIMIT.holds(worst(baked(tiny, AdapterRef(path, 0.3, 0.8)), expected))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_adapters_are_those_of_set_adapters(tiny, make_lora, spell, save, baked, fused):
    import torch

    first = spell("kohya", make_lora(is_sampled))
    second = spell("diffusers", make_lora(is_attention, alpha=None, rank=8, seed=1))
    pipeline = tiny.pipeline()
    for name, tensors in (("a", first), ("b", second)):
        pipeline.load_lora_weights(
            {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, adapter_name=name
        )
    pipeline.set_adapters(["a", "b"], [0.5, -0.25])
    pipeline.fuse_lora(adapter_names=["a", "b"])
    actual = baked(tiny, AdapterRef(save(first, "a"), 0.5), AdapterRef(save(second, "b"), -0.25))
    assert LIMIT.holds(worst(actual, fused(pipeline)))


PEFT_CONFIGS = {
    "alpha": {"lora_alpha": 3},
    "patterns": {
        "lora_alpha": 3,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
        "rank_pattern": {"k_proj": 2},
    },
    "rank stabilized": {"lora_alpha": 3, "use_rslora": True},
    "bias": {"lora_alpha": 3, "lora_bias": True},
}


@pytest.fixture(params=PEFT_CONFIGS)
def peft_model(request, tiny):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], **PEFT_CONFIGS[request.param])
    model = get_peft_model(copy.deepcopy(tiny.text_encoder), config)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    return model


@pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 4 LoRA tensor:UserWarning"
)  # of PEFT, about its own biases
def test_a_peft_folder_is_that_of_merge_and_unload(tiny, peft_model, baked, tmp_path):
    peft_model.save_pretrained(tmp_path)
    merged = {k: v.detach().numpy() for k, v in peft_model.merge_and_unload().state_dict().items()}
    expected = {("unet", k): v for k, v in tiny.tensors["unet"].items()}
    expected |= {("text_encoder", k): v for k, v in merged.items()}
    actual = baked(tiny, AdapterRef(tmp_path))
    assert changed(tiny, actual)
    assert LIMIT.holds(worst(actual, expected))
    (tmp_path / "adapter_config.json").unlink()
    assert not LIMIT.holds(worst(baked(tiny, AdapterRef(tmp_path)), expected)), (
        "the configuration was not read"
    )


def test_alpha_in_the_metadata_of_diffusers(tiny, baked, fused, tmp_path):
    import torch
    from peft import LoraConfig

    torch.manual_seed(2)
    pipeline = tiny.pipeline()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], alpha_pattern={"attn2.to_k": 2})
    pipeline.unet.add_adapter(config, "default")
    for name, value in pipeline.unet.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        **_collate_lora_metadata({"unet": pipeline.unet}),
    )
    other = tiny.pipeline()
    other.load_lora_weights(tmp_path)
    other.fuse_lora(lora_scale=0.7)
    actual = baked(tiny, AdapterRef(tmp_path / "pytorch_lora_weights.safetensors", 0.7))
    assert changed(tiny, actual)
    assert LIMIT.holds(worst(actual, fused(other)))
