"""Modules whose tensors contradict each other or the layer: refused, and with the reason."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from kiln.errors import AdapterError

# What one more tensor, or one that is changed, makes of a module that fits: the words of the refusal.
BROKEN = {
    "alpha is infinite": ("LoRA", {"alpha": np.array(np.inf)}, "expected a finite number"),
    "alpha is a list": ("LoRA", {"alpha": np.ones(3)}, "expected a single number"),
    "giant rank": (
        "LoRA",
        {"lora_down.weight": np.zeros((2000, 20)), "lora_up.weight": np.zeros((12, 2000))},
        "rank 2000; expected 1 to 1024",
    ),
    "giant rank of LoHa": (
        "LoHa",
        {"hada_w2_a": np.zeros((12, 2000)), "hada_w2_b": np.zeros((2000, 20))},
        "rank 2000",
    ),
    "giant rank of LoKr": (
        "LoKr both factored",
        {"lokr_w2_a": np.zeros((4, 2000)), "lokr_w2_b": np.zeros((2000, 5))},
        "rank 2000",
    ),
    "halves of LoHa differ": ("LoHa", {"hada_w2_b": np.zeros((4, 21))}, "cannot be multiplied"),
    "a factor of LoHa has no axes": ("LoHa", {"hada_w2_b": np.zeros(())}, "cannot be multiplied"),
    "half of a Tucker core": ("LoHa Tucker", {"hada_t2": np.zeros((4, 5, 3, 3))}, "cannot be multiplied"),
    "LoKr twice": ("LoKr", {"lokr_w2": np.zeros((4, 5))}, "expected lokr_w2, or lokr_w2_a and lokr_w2_b"),
    "LoKr of another size": ("LoKr", {"lokr_w1": np.zeros((3, 5))}, r"has the shape \[12, 25\]"),
    "LoKr turned": ("LoKr", {"lokr_w1": np.zeros((4, 3))}, r"has the shape \[16, 15\]"),
    "LoKr of lokr_t1": ("LoKr", {"lokr_t1": np.zeros((2, 2))}, "an older LoKr"),
    "IA3 on neither side": ("IA3 on the inputs", {"weight": np.zeros(13)}, "of 13 factors"),
    "IA3 matrix": ("IA3 on the inputs", {"weight": np.zeros((4, 5))}, "expected a vector"),
    "IA3 on both sides": ("IA3 on the inputs", {"on_input": np.array(2)}, "expected 0 or 1"),
    "GLoRA half": ("GLoRA", {"a1.weight": np.zeros((21, 4))}, "of the factors"),
    "OFT not square": ("OFT", {"oft_blocks": np.zeros((3, 4, 5))}, "its blocks are"),
    "OFT of another width": ("OFT", {"oft_blocks": np.zeros((2, 4, 4))}, "of 2 blocks of 4 rows"),
    "OFT of giant blocks": ("OFT", {"oft_blocks": np.zeros((1, 5121, 5121), np.float16)}, "at most 5120"),
    "OFT of a negative constraint": ("OFT", {"alpha": np.array(-1.0)}, "expected 0 or more"),
    "OFT with half of a rescale": ("OFT", {"rescale": np.ones((6, 1))}, "and 6 factors"),
    "oft_diag of no rotations": ("old OFT", {"oft_diag": np.full((3, 4, 4), 5.0)}, "away from rotations"),
    "oft_R of no triangle": ("OFT of OneTrainer", {"oft_R.weight": np.zeros((5, 7))}, r"expected \[k, b"),
    "oft_R of too few blocks": ("OFT of OneTrainer", {"oft_R.weight": np.zeros((4, 6))}, "4 blocks of 4"),
    "BOFT of endless stages": ("BOFT", {"oft_blocks": np.zeros((9, 4, 4, 4))}, "of 9 stages"),
    "BOFT of more": ("BOFT", {"oft_blocks": np.zeros((99, 4, 4, 4))}, "99 stages"),
    "BOFT of odd blocks": ("BOFT", {"oft_blocks": np.zeros((1, 16, 1, 1))}, "of 1 stages"),
    "DoRA of neither side": ("DoRA of the inputs", {"dora_scale": np.ones((1, 21))}, "of the lengths"),
    "DoRA by a matrix": (
        "DoRA of the inputs",
        {"dora_scale": np.ones((12, 20))},
        "a length for each feature",
    ),
    "DoRA twice": ("DoRA of the inputs", {"lora_magnitude_vector": np.ones(12)}, "has both"),
    "difference of another shape": ("difference", {"diff": np.zeros((20, 12))}, r"has the shape \[20, 12\]"),
    "difference of nothing": ("difference", {"diff": np.zeros(())}, "expected the shape of a weight"),
    "sparse outside": (
        "sparse conv",
        {"bias_indices": np.array([[12], [0], [0], [0]]), "bias_values": np.ones(1)},
        "contradict each other",
    ),
    "sparse below": (
        "sparse conv",
        {"bias_indices": np.array([[-1], [0], [0], [0]]), "bias_values": np.ones(1)},
        "expected no negative number",
    ),
    "sparse by fractions": ("sparse conv", {"bias_indices": np.ones((4, 3))}, "expected whole numbers"),
    "sparse of a giant": ("sparse conv", {"bias_size": np.array([10**6, 10**6, 3, 3])}, "has the shape"),
    "NaN": ("LoKr", {"lokr_w1": np.full((3, 4), np.nan)}, "holds NaN or infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_contradicts_itself_is_refused(bake_one, cases, name):
    case, changed, message = BROKEN[name]
    weight, tensors = cases.make(case)
    changed = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in changed.items()}
    with pytest.raises(AdapterError, match=message):
        bake_one(weight, tensors | changed, 1.0, cases.stem_of(case))


@pytest.mark.parametrize("name", ["OFT", "BOFT", "OFT of OneTrainer", "OFT of PEFT"])
@pytest.mark.parametrize("value", [1e9, 1e20, 1e38])
def test_rotations_of_giant_generators_are_finite_or_refused(bake_one, cases, name, value):
    """Beside such values the identity is lost, and of an odd number of rows nothing can be solved."""
    weight, tensors = cases.make(name)
    key = "oft_R.weight" if "oft_R.weight" in tensors else "oft_blocks"
    shape = (4, 3, 3) if name == "OFT" else tensors[key].shape
    blocks = np.full(shape, value, np.float32)
    with contextlib.suppress(AdapterError):
        baked, _ = bake_one(
            weight, {key: np.triu(blocks) if blocks.ndim > 2 else blocks}, 1, cases.stem_of(name)
        )
        assert np.isfinite(baked).all()


def test_a_missing_tensor_is_refused(bake_one, cases, case):
    weight, tensors = cases.make(case)
    optional = ("alpha", "scale", "rescale", "oft_R.scaled_oft")
    lengths = ("dora_scale", "lora_magnitude")
    for missing in tensors:
        rest = {key: value for key, value in tensors.items() if key != missing}
        if missing.startswith((*optional, *lengths)) or not rest:
            continue
        with pytest.raises(AdapterError):
            bake_one(weight, rest, 1.0, cases.stem_of(case))
