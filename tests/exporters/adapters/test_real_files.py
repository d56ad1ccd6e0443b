"""Files that strangers trained: all of their modules are applied, to the architecture that they are for."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.open import open_adapter
from kiln.exporters.adapters.plan import plan_bake

LIMIT = THRESHOLDS["baked_weight_relative_l2"]
# file -> family, modules by network, keys that change no layer
REAL = {
    "sd-pokemon-model-lora_pytorch_lora_weights.safetensors": ("sd1", {"unet": 128}, 0),
    "attn_procs_sd1.safetensors": ("sd1", {"unet": 128}, 0),
    "analog_svd_rank4.safetensors": ("sd1", {"unet": 144, "text_encoder": 48}, 0),
    "lora_disney.safetensors": ("sd1", {"unet": 144, "text_encoder": 48}, 2),
    "peft_sd15_text_encoder": ("sd1", {"text_encoder": 24}, 0),
    "smart_falcon_4_lokr.safetensors": ("sd1", {"unet": 278, "text_encoder": 72}, 0),
    "smart_falcon_16_lokr.safetensors": ("sd1", {"unet": 278, "text_encoder": 72}, 0),
    "lora_disney.pt": ("sd2", {"unet": 128}, 0),
    "lora_illust.pt": ("sd2", {"unet": 128}, 0),
    "analog_svd_distill.text_encoder.pt": ("sd1", {"text_encoder": 48}, 0),
    "lora_kiriko.pt": ("sd2", {"unet": 128}, 0),
    "lora_kiriko.text_encoder.pt": ("sd2", {"text_encoder": 92}, 0),
}


@pytest.fixture
def shapes_of(sd1_shapes, sd2_shapes):
    return {"sd1": sd1_shapes, "sd2": sd2_shapes}


@pytest.mark.parametrize("name", REAL)
def test_every_module_is_applied(shapes_of, shared, name):
    family, modules, loose = REAL[name]
    shapes = shapes_of[family]
    path = shared / "adapters" / name
    adapter = open_adapter(path)
    adapter.source.close()
    with plan_bake(shapes, [AdapterRef(path, 0.5)]) as plan:
        touched = [(n, k) for n, tensors in shapes.items() for k in tensors if plan.is_touched(n, k)]
        for network, tensor in touched[::40]:
            value = plan.bake(network, tensor, np.ones(shapes[network][tensor], np.float16))
            assert value.dtype == np.float32
            assert np.isfinite(value).all()
        (report,) = plan.reports
    assert max(report.changes.values()) > 1e-6
    assert dict(report.matched_modules) == modules
    assert len(touched) == sum(modules.values()) == len(adapter.modules)
    assert len(report.unmatched_keys) == loose
    assert report.matched_keys + loose == len(adapter.source.infos)
    assert all("embedding" in reason for reason in report.reasons.values())


@pytest.mark.parametrize("name", ["smart_falcon_4_lokr.safetensors", "smart_falcon_16_lokr.safetensors"])
def test_a_real_lokr_is_the_reference(sd1_shapes, shared, reference, name):
    """A few modules of each kind of layer; the large ones take float64 kron too long for all of them."""
    path = shared / "adapters" / name
    adapter = open_adapter(path)
    seen = set()
    with plan_bake(sd1_shapes, [AdapterRef(path)]) as plan:
        names = {
            k.replace(".", "_").removesuffix("_weight"): k
            for k in sd1_shapes["unet"]
            if k.endswith(".weight")
        }
        for module in adapter.modules:
            tensor = names.get(module.stem.removeprefix("lora_unet_"))
            shape = sd1_shapes["unet"].get(tensor)
            if shape is None or shape in seen or np.prod(shape) > 2_000_000:
                continue
            seen.add(shape)
            parts = {parameter: adapter.source.read(key) for parameter, key in module.keys.items()}
            weight = np.zeros(shape, np.float32)
            expected = reference.new_weight(weight, parts)
            assert LIMIT.holds(relative_l2(plan.bake("unet", tensor, weight), expected)), tensor
    adapter.source.close()
    assert len(seen) > 15


def test_the_order_of_a_list_is_that_of_the_layers(shared, sd2_shapes):
    """The trainer never reached the output projections, so every fourth pair of this file is zero."""
    shapes = {k: v for k, v in sd2_shapes["unet"].items() if "down_blocks.0" in k or "mid_block" in k}
    with plan_bake(sd2_shapes, [AdapterRef(shared / "adapters" / "lora_kiriko.pt")]) as plan:
        for name, shape in shapes.items():
            if plan.is_touched("unet", name):
                plan.bake("unet", name, np.ones(shape, np.float32))
        changes = plan.reports[0].changes
    assert len(changes) == 24
    assert all((size == 0) == ("to_out.0" in name) for name, size in changes.items())


NEGATIVE = {
    "lora_kiriko.pt": ("sd1", "for SD2"),
    "lora_kiriko.text_encoder.pt": ("sd1", "for SD2"),
    "lora_disney.pt": ("sd1", "for SD2"),
    "analog_svd_distill.text_encoder.pt": ("sd2", "for SD1"),
    "smart_falcon_4_lokr.safetensors": ("sd2", "for SD1"),
    "lora_kiriko2.ti.pt": ("sd2", "is a textual inversion embedding"),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_files_for_something_else_are_refused(shapes_of, shared, name):
    family, message = NEGATIVE[name]
    with pytest.raises(AdapterError, match=message):
        plan_bake(shapes_of[family], [AdapterRef(shared / "adapters" / name)])


def test_every_real_file_is_in_a_table(shared):
    known = set(REAL) | set(NEGATIVE)
    assert {path.name for path in (shared / "adapters").iterdir()} <= known
