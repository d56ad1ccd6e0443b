"""Baked weights against InvokeAI's layers, which are no dependency: skipped where they cannot be imported.

InvokeAI is wrong for IA3 of convolutions and ``dora_scale`` of the outputs, and reads neither OFT nor GLoRA.
"""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

torch = pytest.importorskip("torch")
utils = pytest.importorskip("invokeai.backend.patches.layers.utils", reason="InvokeAI is not installed")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
NAMES = [
    *("LoRA", "LoRA without alpha", "LoRA 1x1 as linear", "LoCon", "CP"),
    *("LoHa", "LoHa without alpha", "LoHa conv", "LoHa 1x1", "LoHa Tucker"),
    *(
        "LoKr",
        "LoKr both factored",
        "LoKr first factored",
        "LoKr both whole",
        "LoKr larger first",
        "LoKr conv",
    ),
    *("LoKr conv factored", "LoKr of 2023", "LoKr Tucker"),
    *("IA3 on the inputs", "IA3 on the outputs", "difference", "difference conv"),
    *("DoRA of the inputs", "DoRA conv of the inputs", "DoRA of PEFT"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_new_weight(bake_one, cases, name, strength):
    weight, tensors = cases.make(name)
    actual, _ = bake_one(weight, tensors, strength)
    names = {"lora_magnitude_vector": "dora_magnitude"}
    state = {names.get(key, key): torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    layer = utils.any_lora_layer_from_state_dict(state)
    change = layer.get_parameters({"weight": torch.from_numpy(weight)}, strength)["weight"]
    assert LIMIT.holds(relative_l2(actual, weight + change.detach().numpy()))
