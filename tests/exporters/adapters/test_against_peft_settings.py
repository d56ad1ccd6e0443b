"""Baked weights against settings of PEFT's layers: a scale that is stored, a rotation that is held still."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CHECKED = ("LoRA with scale", "OFT of kohya with alpha 0")


def wrapped(weight, config):
    """PEFT's layer around a linear weight, and the model that holds it."""
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(torch.from_numpy(np.array(weight)))
    model = peft.get_peft_model(torch.nn.Sequential(made), config)
    return model, model.base_model.model[0]


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_stored_scale(bake_one, cases, strength):
    """PEFT keeps the factor of a layer as ``scaling``; the file's stands there, and alpha has no say."""
    weight, tensors = cases.make("LoRA with scale")
    model, inner = wrapped(weight, peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=999))
    for part, name in ((inner.lora_A, "down"), (inner.lora_B, "up")):
        part["default"].weight.data.copy_(torch.from_numpy(tensors[f"lora_{name}.weight"]))
    inner.scaling["default"] = float(tensors["scale"]) * strength
    expected = model.merge_and_unload()[0].weight.detach().numpy()
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, strength)[0], expected))
    without = {key: value for key, value in tensors.items() if key != "scale"}
    assert not LIMIT.holds(relative_l2(bake_one(weight, without, strength)[0], expected))


def test_kohya_rotates_nothing_with_alpha_0(bake_one, cases):
    """Its alpha is a constraint, the ``eps`` of PEFT's constrained OFT; with 0 no generator is left."""
    weight, tensors = cases.make("OFT of kohya with alpha 0")
    blocks = tensors["oft_blocks"]
    size = blocks.shape[-1]
    config = peft.OFTConfig(
        target_modules=["0"], oft_block_size=size, coft=True, eps=0.0, use_cayley_neumann=False
    )
    model, inner = wrapped(weight.T, config)
    rows, columns = np.triu_indices(size, 1)
    generators = torch.from_numpy((blocks - blocks.swapaxes(1, 2))[:, rows, columns])
    inner.oft_R["default"].weight.data.copy_(generators)
    expected = model.merge_and_unload()[0].weight.detach().numpy().T
    stem = cases.stem_of("OFT of kohya with alpha 0")
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, 1.0, stem)[0], expected))
    loose = tensors | {"alpha": np.array(1e-3, np.float32)}
    assert not LIMIT.holds(relative_l2(bake_one(weight, loose, 1.0, stem)[0], expected))
    assert not LIMIT.holds(relative_l2(bake_one(weight, tensors)[0], expected)), "LyCORIS's 0 is none at all"
