"""A text encoder in OpenCLIP's names, whose attention is one matrix, against the same in transformers'."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.keys import ModuleIndex
from kiln.exporters.adapters.plan import plan_bake

WIDTH, LAYERS = 8, 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
REST = {
    "self_attn.out_proj": ("attn.out_proj", (WIDTH, WIDTH)),
    "mlp.fc1": ("mlp.c_fc", (4 * WIDTH, WIDTH)),
    "mlp.fc2": ("mlp.c_proj", (WIDTH, 4 * WIDTH)),
    "layer_norm1": ("ln_1", (WIDTH,)),
    "layer_norm2": ("ln_2", (WIDTH,)),
}


@pytest.fixture
def both():
    """The same random text encoder in both layouts."""
    rng = np.random.default_rng(0)
    split, fused = {}, {}
    for layer in range(LAYERS):
        hf, oc = f"text_model.encoder.layers.{layer}", f"model.transformer.resblocks.{layer}"
        for leaf, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,))):
            parts = [rng.normal(size=shape).astype(np.float32) for _ in PROJECTIONS]
            split |= {f"{hf}.self_attn.{p}.{leaf}": v for p, v in zip(PROJECTIONS, parts, strict=True)}
            fused[f"{oc}.attn.in_proj_{leaf}"] = np.concatenate(parts)
        for name, (other, shape) in REST.items():
            for leaf, size in (("weight", shape), ("bias", shape[:1])):
                value = rng.normal(size=size).astype(np.float32)
                split[f"{hf}.{name}.{leaf}"] = fused[f"{oc}.{other}.{leaf}"] = value
    return split, fused


def baked(tensors, path, network):
    shapes = {network: {name: value.shape for name, value in tensors.items()}}
    with plan_bake(shapes, [AdapterRef(path, 0.7), AdapterRef(path, -0.3)]) as plan:
        weights = {name: plan.bake(network, name, value) for name, value in tensors.items()}
        return weights, plan.reports[0]


def adapter(save, chosen, family):
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(LAYERS):
        for name in chosen:
            stem = f"lora_te2_text_model_encoder_layers_{layer}_{name.replace('.', '_')}"
            shape = REST[name][1] if name in REST else (WIDTH, WIDTH)
            if len(shape) == 1:
                tensors[f"{stem}.w_norm"] = rng.normal(size=shape)
                continue
            tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(2, shape[1]))
            tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(shape[0], 2))
            if family == "DoRA":
                tensors[f"{stem}.dora_scale"] = rng.uniform(1, 2, size=(1, shape[1]))
            tensors[f"{stem}.diff_b"] = rng.normal(size=shape[:1])
    return save({key: value.astype(np.float32) for key, value in tensors.items()})


@pytest.mark.parametrize("family", ["LoRA", "DoRA"])
@pytest.mark.parametrize(
    "chosen",
    [
        [f"self_attn.{p}" for p in PROJECTIONS] + list(REST),
        ["self_attn.q_proj", "self_attn.v_proj"],  # stable-diffusion-webui would skip these
        ["self_attn.k_proj"],
    ],
)
def test_each_projection_changes_its_own_rows(both, save, chosen, family):
    split, fused = both
    path = adapter(save, chosen, family)
    expected, _ = baked(split, path, "text_encoder_2")
    actual, report = baked(fused, path, "text_encoder_2")
    assert report.matched_modules == {"text_encoder_2": LAYERS * len(chosen)}
    assert report.unmatched_keys == ()
    for layer in range(LAYERS):
        hf, oc = f"text_model.encoder.layers.{layer}", f"model.transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            parts = [expected[f"{hf}.self_attn.{p}.{leaf}"] for p in PROJECTIONS]
            np.testing.assert_allclose(actual[f"{oc}.attn.in_proj_{leaf}"], np.concatenate(parts), rtol=1e-6)
            for name, (other, _) in REST.items():
                np.testing.assert_allclose(
                    actual[f"{oc}.{other}.{leaf}"], expected[f"{hf}.{name}.{leaf}"], rtol=1e-6
                )


@pytest.mark.parametrize(("name", "layers"), [("CLIP-v2-SD", 24), ("CLIP-XL-SD", 32)])
def test_real_checkpoints(key_list, name, layers):
    index = ModuleIndex({"text_encoder_2": key_list(name)})
    for layer in range(layers):
        stem = f"lora_te2_text_model_encoder_layers_{layer}"
        width = 1024 if layers == 24 else 1280
        for number, projection in enumerate(PROJECTIONS):
            place = index.locate(f"{stem}_self_attn_{projection}")
            assert place.rows == (number * width, (number + 1) * width)
            assert index.shapes[place.tensor("weight")] == (3 * width, width)
        for other in ("self_attn_out_proj", "mlp_fc1", "mlp_fc2", "layer_norm1", "layer_norm2"):
            assert index.shapes[index.locate(f"{stem}_{other}").tensor("weight")][0] in (width, 4 * width)
