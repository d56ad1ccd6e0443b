"""Baking by blocks of rows against numpy on the whole tensor."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import Rows
from kiln.exporters.adapters.blocks import Change, Spare, Workspace, bake_blocks, row_blocks
from kiln.exporters.adapters.halves import BLOCK

SHAPES = [(1, 1), (640, 320), (5, BLOCK + 3), (3, 4, 3, 3), (BLOCK, 3), (7,)]


def change(delta):
    flat = delta.reshape(len(delta), -1)

    def rows(start, stop, running, out):
        out[:] = flat[start:stop]

    return Change(Rows(rows), lambda: AdapterError("overflows"))


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
    assert np.isnan(bake_blocks(base, [], np.empty(base.shape, np.float16), Workspace()))


def test_storing_a_whole_tensor():
    wide = np.random.default_rng(0).standard_normal((3, BLOCK)).astype(np.float32)
    half = np.empty(wide.shape, np.float16)
    assert bake_blocks(wide, [], half, Workspace()) == np.abs(wide).max()
    assert np.array_equal(half, wide.astype(np.float16))


def test_nothing_to_bake():
    base = np.empty((0, 4), np.float16)
    assert bake_blocks(base, [centred()], base, Workspace()) == 0


@pytest.mark.parametrize(
    ("rows", "columns", "together"), [(640, 320, 64), (12, BLOCK, 4), (7, 3, 4), (5, 0, 1)]
)
def test_rows_that_go_together_stay_together(rows, columns, together):
    blocks = list(row_blocks(rows, columns, together))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == rows
    assert all(start % together == 0 for start, _ in blocks)
    assert all((stop - start) * columns <= max(BLOCK, together * columns) for start, stop in blocks)


def flipped(size):
    """The change that turns every ``size`` rows upside down."""

    def rows(start, stop, running, out):
        assert start % size == stop % size == 0
        out[:] = running.reshape(-1, size, running.shape[1])[:, ::-1].reshape(running.shape) - running

    return Change(Rows(rows, size), lambda: AdapterError("overflows"))


def centred():
    """The change that takes the mean of every column away, which needs all rows first."""
    seen = []

    def look(start, stop, running):
        seen.append(running.sum(axis=0, dtype=np.float64))

    def rows(start, stop, running, out):
        out[:] = -sum(seen) / 24

    return Change(Rows(rows, look=look), lambda: AdapterError("overflows"))


@pytest.mark.parametrize("columns", [5, BLOCK // 5, BLOCK + 1])
def test_changes_that_need_more_rows_see_all_that_came_before_them(columns):
    base, (first, last), _ = case((24, columns), np.float16)
    parts = [change(first), flipped(4), flipped(6), centred(), change(last), flipped(2)]

    def flip(values, size):
        return values.reshape(-1, size, columns)[:, ::-1].reshape(24, columns)

    turned = flip(flip(base.astype(np.float32) + first, 4), 6)
    expected = flip(turned - turned.mean(axis=0, dtype=np.float64).astype(np.float32) + last, 2)
    out = np.empty(base.shape, np.float32)
    bake_blocks(base, parts, out, Workspace())
    limit = THRESHOLDS["baked_weight_relative_l2"]
    assert limit.holds(relative_l2(out, expected))
    assert not limit.holds(relative_l2(out, flip(expected, 2))), "one change less is another weight"
    total = np.square(base.astype(np.float64)).sum()
    assert all(part.size.weight == pytest.approx(total, rel=1e-4) for part in parts)  # four digits are told
    assert parts[0].size.change == pytest.approx(np.square(first.astype(np.float64)).sum(), rel=1e-4)
    half = np.empty(base.shape, np.float16)
    bake_blocks(base, [*parts[:3], centred(), *parts[4:]], half, Workspace())
    assert np.array_equal(half, out.astype(np.float16))


def test_threads_share_a_workspace():
    cases = [case((64 + number, 3000), np.float16) for number in range(12)]
    work = Workspace()

    def bake(number):
        base, deltas, _ = cases[number]
        bake_blocks(base, [change(delta) for delta in deltas], base, work)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bake, range(len(cases))))
    assert all(np.array_equal(base, expected.astype(np.float16)) for base, _, expected in cases)


def test_spare_memory_is_the_same_until_it_has_to_grow():
    spare = Spare()
    first = spare.like((3, 4))
    assert first.shape == (3, 4)
    assert np.shares_memory(first, spare.like((2, 5)))
    assert spare.like((5, 5)).shape == (5, 5)
