"""ComfyUI's names against diffusers' converters of checkpoints, whose tensors have the names that it gives.

A LoRA of ComfyUI calls a layer what a checkpoint calls its weight, behind ``diffusion_model.`` and
``text_encoders.``. diffusers reads such LoRAs not (test_known_disagreements.py) but such checkpoints.
"""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.keys import ModuleIndex
from kiln.exporters.ldm_names import ldm_unet_module_map

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
CONFIGS = {
    "sd1": {"layers_per_block": 2},
    "sdxl": {"layers_per_block": 2, "addition_embed_type": "text_time", "num_class_embeds": None},
}


def misplaced(index, network, stems, converted):
    """Those of the stems whose layer is another than diffusers says; ``converted`` has the stems' numbers."""
    paths = {float(number): name.removesuffix(".weight") for name, number in converted.items()}
    found = {stem: index.locate(stem) for stem in stems}
    return [
        stem
        for number, stem in enumerate(stems)
        if not found[stem] or (found[stem].network, found[stem].module) != (network, paths[number])
    ]


def numbered(stems, prefix=""):
    """A checkpoint with these layers, each with a number to know it by."""
    return {f"{prefix}{stem}.weight": torch.tensor(float(number)) for number, stem in enumerate(stems)}


def rotated(converted):
    """The same names, each with the number of another."""
    return dict(zip(converted, [*list(converted.values())[1:], next(iter(converted.values()))], strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_of_a_unet(request, kind):
    shapes = request.getfixturevalue(f"{kind}_shapes")
    index, names = ModuleIndex(shapes), list(ldm_unet_module_map(shapes["unet"]))
    names += ["label_emb.0.0", "label_emb.0.2"] * (kind == "sdxl")
    stems = [f"diffusion_model.{name}" for name in names]
    biases = {key.replace(".weight", ".bias"): value for key, value in numbered(stems, "model.").items()}
    checkpoint = numbered(stems, "model.") | biases
    converted = single_file.convert_ldm_unet_checkpoint(checkpoint, CONFIGS[kind])
    converted = {name: number for name, number in converted.items() if name.endswith(".weight")}
    assert len(converted) == len(stems) > 250
    assert misplaced(index, "unet", stems, converted) == []
    assert len(misplaced(index, "unet", stems, rotated(converted))) == len(stems)


ENCODERS = {"text_encoders.clip_l.transformer.": "text_encoder"}
ENCODERS["text_encoders.clip_g.transformer."] = "text_encoder_2"


@pytest.mark.parametrize("prefix", ENCODERS)
def test_every_layer_of_a_text_encoder(sdxl_shapes, prefix):
    index, network = ModuleIndex(sdxl_shapes), ENCODERS[prefix]
    stems = [prefix + path for path in index.modules(network)]
    converted = single_file.convert_ldm_clip_checkpoint(numbered(stems), prefix)
    assert len(converted) == len(stems) > 72
    assert misplaced(index, network, stems, converted) == []
    assert len(misplaced(index, network, stems, rotated(converted))) == len(stems)


def test_a_file_of_comfyui_is_baked_as_diffusers_fuses_it(tiny, make_lora, spell, save, baked, fused):
    """The same tensors: in ComfyUI's names for Kiln, in kohya's for diffusers."""
    ldm = {path: name for name, path in ldm_unet_module_map(tiny.tensors["unet"]).items()}
    factors = make_lora(lambda network, module: "attn" in module and "encoder_layers" not in module)
    tensors = {}
    for f in factors:
        stem = f"diffusion_model.{ldm.get(f.module)}"
        if f.network == "text_encoder":
            stem = f"text_encoders.clip_l.transformer.{f.module}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = f.down, f.up
        tensors[f"{stem}.alpha"] = np.array(f.alpha, np.float32)
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights({k: torch.from_numpy(v.copy()) for k, v in spell("kohya", factors).items()})
    pipeline.fuse_lora(lora_scale=0.7)
    expected = fused(pipeline)
    actual = baked(tiny, AdapterRef(save(tensors), 0.7))
    assert {network for network, _ in expected} == {f.network for f in factors}
    assert all(LIMIT.holds(relative_l2(actual[key], value)) for key, value in expected.items())
    wrong = baked(tiny, AdapterRef(save(tensors, "again"), 0.71))
    assert sum(not LIMIT.holds(relative_l2(wrong[k], v)) for k, v in expected.items()) == len(factors)
