"""The sparse remainder against SciPy, which sums values by their places without torch."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

sparse = pytest.importorskip("scipy.sparse")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
CHECKED = ("sparse beside a LoRA", "sparse conv")


def dense(tensors, indices):
    """What the three tensors hold, in the shape of the weight."""
    places = tuple(indices.astype(np.int64))
    shape = tuple(int(n) for n in tensors["bias_size"])
    return sparse.coo_array((tensors["bias_values"], places), shape=shape).toarray()


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_sparse_remainder(bake_one, cases, name, strength):
    weight, tensors = cases.make(name)
    change = dense(tensors, tensors["bias_indices"])
    scale = strength
    if "alpha" in tensors:  # a low rank beside it, by which both are scaled
        change = change + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
        scale *= float(tensors["alpha"]) / 4
    actual, _ = bake_one(weight, tensors, strength)
    assert LIMIT.holds(relative_l2(actual, weight + np.float32(scale) * change))
    moved = tensors | {"bias_values": np.ascontiguousarray(tensors["bias_values"][::-1])}
    wrong, _ = bake_one(weight, moved, strength)
    assert not LIMIT.holds(relative_l2(wrong, weight + np.float32(scale) * change))


def test_values_at_one_place_are_added(cases):
    """Else the case with a place named twice would show nothing."""
    _, tensors = cases.make("sparse beside a LoRA")
    first, second = tensors["bias_values"][1:3]
    assert dense(tensors, tensors["bias_indices"])[3, 2] == first + second
