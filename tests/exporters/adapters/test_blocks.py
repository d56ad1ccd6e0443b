"""Baking by blocks of rows against numpy on the whole tensor."""

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.blocks import Change, Workspace, bake_blocks, store
from kiln.exporters.adapters.halves import BLOCK

SHAPES = [(1, 1), (640, 320), (5, BLOCK + 3), (3, 4, 3, 3), (BLOCK, 3), (7,)]


def change(delta):
    flat = delta.reshape(len(delta), -1)

    def rows(start, stop, running, out):
        out[:] = flat[start:stop]

    return Change(rows, lambda: AdapterError("overflows"))


def case(shape, dtype, changes=2):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape).astype(dtype)
    deltas = [rng.standard_normal(shape).astype(np.float32) for _ in range(changes)]
    return base, deltas, base.astype(np.float32) + deltas[0] + deltas[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", [np.float16, np.float32])
@pytest.mark.parametrize("target", [np.float16, np.float32])
def test_equals_the_whole(shape, source, target):
    base, deltas, expected = case(shape, source)
    out = np.empty(shape, target)
    largest = bake_blocks(base, [change(delta) for delta in deltas], out, Workspace())
    assert np.array_equal(out, expected.astype(target))
    assert largest == np.abs(expected).max()
    wrong = np.empty(shape, target)
    bake_blocks(base, [change(deltas[0])], wrong, Workspace())
    assert not THRESHOLDS["baked_weight_relative_l2"].holds(relative_l2(wrong, expected))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_in_place(dtype):
    base, deltas, expected = case((640, 320), dtype)
    bake_blocks(base, [change(delta) for delta in deltas], base, Workspace())
    assert np.array_equal(base, expected.astype(dtype))


def test_bfloat16():
    import ml_dtypes

    base, deltas, expected = case((64, 32), ml_dtypes.bfloat16)
    out = np.empty(base.shape, ml_dtypes.bfloat16)
    bake_blocks(base, [change(delta) for delta in deltas], out, Workspace())
    assert np.array_equal(out, expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_change_that_is_not_finite_is_refused(value):
    base, deltas, _ = case((4, BLOCK), np.float16)
    deltas[1][3, 17] = value
    with pytest.raises(AdapterError, match="overflows"):
        bake_blocks(base, [change(delta) for delta in deltas], base.copy(), Workspace())


def test_nan_of_the_base_is_reported_as_the_largest():
    base = np.ones((4, BLOCK), np.float32)
    base[1, 5] = np.nan
    assert np.isnan(bake_blocks(base, [], base.copy(), Workspace()))
    assert np.isnan(store(base, np.empty(base.shape, np.float16), Workspace()))


def test_storing_a_whole_tensor():
    wide = np.random.default_rng(0).standard_normal((3, BLOCK)).astype(np.float32)
    half = np.empty(wide.shape, np.float16)
    assert store(wide, half, Workspace()) == np.abs(wide).max()
    assert np.array_equal(half, wide.astype(np.float16))
