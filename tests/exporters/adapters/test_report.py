"""What is said of each bake: how much was applied, why not the rest, how large it was, and warnings."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import relative_l2
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake
from kiln.exporters.adapters.report import EXPLOSION

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_" + QUERY.replace(".", "_")


def lora(size=0.1, **more):
    rng = np.random.default_rng(0)
    tensors = {
        "lora_down.weight": rng.normal(size=(4, 16)) * size,
        "lora_up.weight": rng.normal(size=(16, 4)),
        **more,
    }
    return {f"{STEM}.{key}": np.asarray(value, np.float32) for key, value in tensors.items()}


def test_every_key_that_is_not_applied_has_a_reason(tiny, save):
    embedding = "a token's embedding, which comes with the adapter where it acts"
    stray = {
        "lora_unet_down_blocks_9_proj_in.lora_down.weight": "the model has no such layer",
        "lora_unet_mid_block_attentions_0_proj_in.alpha": "its module has no tensor that changes a layer",
        f"{STEM}.rescale": "not read by LoRA",
        "bundle_emb.mine.string_to_param.*": embedding,
        "<s1>": embedding,
        "note": "no parameter that Kiln knows",
    }
    path = save(lora() | {key: np.ones(1, np.float32) for key in stray})
    with plan_bake(tiny.shapes, [AdapterRef(path)]) as plan:
        (report,) = plan.reports
    assert report.reasons == stray
    assert set(report.unmatched_keys) == set(stray)
    assert report.matched_keys == 2
    assert report.format == "LoRA"


def test_the_format_names_what_it_decomposes(tiny, save):
    tensors = lora(dora_scale=np.ones((16, 1)), bias_indices=np.zeros((2, 0)), bias_values=np.zeros(0))
    tensors[f"{STEM}.bias_indices"] = np.zeros((2, 0), np.int16)
    tensors[f"{STEM}.bias_size"] = np.array([16, 16], np.int16)
    with plan_bake(tiny.shapes, [AdapterRef(save(tensors))]) as plan:
        assert plan.reports[0].format == "DoRA over LoRA and sparse remainder"
        assert plan.reports[0].unmatched_keys == ()


def test_the_size_of_each_change(tiny, save):
    first, second = save(lora(), "first"), save(lora(0.3), "second")
    weight = tiny.tensors["unet"][f"{QUERY}.weight"]
    with plan_bake(
        tiny.shapes, [AdapterRef(first), AdapterRef(second, -0.5), AdapterRef(first, 0.0)]
    ) as plan:
        assert [report.changes for report in plan.reports] == [{}, {}, {}]
        assert [report.warnings for report in plan.reports] == [(), (), ()]
        for _ in range(2):  # a second time counts no second time
            plan.bake("unet", f"{QUERY}.weight", weight)
        changes = [report.changes for report in plan.reports]
    tensors = lora()
    product = tensors[f"{STEM}.lora_up.weight"] @ tensors[f"{STEM}.lora_down.weight"]
    length = np.linalg.norm(product) / np.linalg.norm(weight)
    name = f"unet.{QUERY}.weight"
    assert changes[0] == {name: pytest.approx(length, rel=1e-5)}
    assert changes[1] == {name: pytest.approx(1.5 * length, rel=1e-5)}
    assert changes[2] == {}


def test_an_adapter_that_changes_nothing_is_warned_of(tiny, save):
    weight = tiny.tensors["unet"][f"{QUERY}.weight"]
    for size in (0.0, 1e-12):
        with plan_bake(tiny.shapes, [AdapterRef(save(lora(size)))]) as plan:
            plan.bake("unet", f"{QUERY}.weight", weight)
            (warning,) = plan.reports[0].warnings
        assert "changes nothing" in warning


def test_an_adapter_that_explodes_a_weight_is_warned_of(tiny, save):
    weight = tiny.tensors["unet"][f"{QUERY}.weight"]
    path = save(lora(10))
    with plan_bake(tiny.shapes, [AdapterRef(path)]) as plan:
        baked = plan.bake("unet", f"{QUERY}.weight", weight)
        assert relative_l2(baked, weight) > EXPLOSION
        (warning,) = plan.reports[0].warnings
    assert f"{QUERY}.weight by" in warning
    assert "1 of 1 weights" in warning
    with plan_bake(tiny.shapes, [AdapterRef(path, 0.001)]) as plan:
        plan.bake("unet", f"{QUERY}.weight", weight)
        assert plan.reports[0].warnings == ()
