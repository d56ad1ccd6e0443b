"""Planning and baking: what is touched, what adds up, what is refused, and real files of strangers."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters.base import AdapterRef
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


def test_both_dialects_in_one_file_are_both_applied(tiny, make_lora, spell, save):
    factors = make_lora(everywhere)
    tensors = spell("kohya", factors[::2]) | spell("kohya, LDM names", factors[1::2])
    with plan_bake(tiny.shapes, [AdapterRef(save(tensors))]) as plan:
        assert sum(plan.reports[0].matched_modules.values()) == len(factors)
        assert plan.reports[0].unmatched_keys == ()
