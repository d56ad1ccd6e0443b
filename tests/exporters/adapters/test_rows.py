"""A change that is had by rows: blocks of any size give the same weight, as does each way to compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters import blocks, boft
from kiln.exporters.adapters.base import Rows
from kiln.exporters.adapters.updates import PartUpdate, by_rows

LIMIT = THRESHOLDS["baked_weight_relative_l2"]


def test_small_blocks_give_the_same_weight(monkeypatch, bake_one, cases, case):
    weight, tensors = cases.make(case)
    expected, before = bake_one(weight, tensors, 0.7, cases.stem_of(case))
    monkeypatch.setattr(blocks, "BLOCK", 2 * math.prod(weight.shape[1:]))
    actual, after = bake_one(weight, tensors, 0.7, cases.stem_of(case))
    assert LIMIT.holds(relative_l2(actual, expected))
    assert not LIMIT.holds(relative_l2(np.roll(actual, 2, axis=0), expected))
    assert after.changes == pytest.approx(before.changes, rel=1e-4)


@pytest.mark.parametrize("case", ["BOFT", "BOFT constrained", "BOFT conv with rescale"])
@pytest.mark.parametrize("joined", [0, 256])
def test_a_butterfly_in_one_product_and_stage_by_stage(monkeypatch, bake_one, cases, reference, case, joined):
    monkeypatch.setattr(boft, "_JOINED", joined)
    turned, stage_by_stage = [], boft._turned
    monkeypatch.setattr(boft, "_turned", lambda *a: turned.append(a[0]) or stage_by_stage(*a))
    weight, tensors = cases.make(case)
    actual, _ = bake_one(weight, tensors, 0.7)
    assert LIMIT.holds(relative_l2(actual, reference.new_weight(weight, tensors, 0.7)))
    assert not LIMIT.holds(relative_l2(actual, reference.new_weight(weight, tensors, 0.71)))
    assert {rows.shape[1] == weight[0].size for rows in turned} == {not joined}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_lengths_of_weights_whose_squares_leave_float32(bake_one, axis, size):
    """The length is set, whatever it was: squares are summed again where float32 cannot hold them."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((6, 8)) * min(size, 1)).astype(np.float32)
    factors = {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2)}
    tensors = {name: (rng.standard_normal(s) * size**0.5).astype(np.float32) for name, s in factors.items()}
    tensors["dora_scale"] = rng.uniform(1, 2, (1, 8) if axis else (6, 1)).astype(np.float32)
    actual, _ = bake_one(weight, tensors)
    lengths = tensors["dora_scale"].reshape(-1)
    assert LIMIT.holds(relative_l2(np.linalg.norm(actual, axis=1 - axis), lengths))
    assert not LIMIT.holds(relative_l2(np.linalg.norm(actual, axis=1 - axis), 1.01 * lengths))


class _Mirror:
    """Turns every four rows upside down, after it has seen the largest value of all."""

    parameter = "weight"

    def misfit(self, shape):
        return None

    def delta(self, weight, strength):
        return by_rows(self, weight, strength)

    def rows(self, shape, strength):
        largest = [0.0]

        def look(start, stop, running):
            largest[0] = max(largest[0], float(running.max(initial=0)))

        def fill(start, stop, running, out):
            assert start % 4 == 0
            turned = running.reshape(-1, 4, running.shape[1])[:, ::-1].reshape(running.shape)
            out[:] = strength * turned / largest[0]

        return Rows(fill, 4, look)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (4, 12), (6, 14), (8, 16)])
@pytest.mark.parametrize("block", [1, 20, 1000])
def test_a_part_of_the_rows(monkeypatch, start, stop, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    weight = np.random.default_rng(0).uniform(1, 2, (16, 5)).astype(np.float32)
    inner = weight[start:stop]
    expected = np.zeros_like(weight)
    expected[start:stop] = inner.reshape(-1, 4, 5)[:, ::-1].reshape(inner.shape) / inner.max() / 2
    actual = PartUpdate(_Mirror(), start, stop).delta(weight, 0.5)
    np.testing.assert_array_equal(actual, expected)
