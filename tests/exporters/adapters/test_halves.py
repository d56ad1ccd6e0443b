"""fp16 to fp32 and back against numpy's own conversion, for every value there is and between them."""

import numpy as np
import pytest

from kiln.exporters.adapters.halves import BLOCK, narrow_into, widen

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def same_bits(actual, expected):
    bits = np.dtype(f"u{actual.itemsize}")
    return actual.dtype == expected.dtype and np.array_equal(actual.view(bits), expected.view(bits))


def narrow(wide):
    out = np.full(wide.size, 7, np.float16)
    largest = narrow_into(wide, out, np.empty((2, wide.size), np.int32))
    return out, largest


def test_every_finite_value():
    wide = widen(FINITE)
    assert wide.dtype == np.float32
    assert same_bits(wide, FINITE.astype(np.float32))
    assert not same_bits(wide * np.float32(1.01), FINITE.astype(np.float32))


def test_infinity_and_nan():
    assert np.array_equal(widen(EVERY), EVERY.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (70000,), (2, 300, 200)])
def test_shapes(shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    assert widen(values).shape == shape
    assert same_bits(np.atleast_1d(widen(values)), np.atleast_1d(values.astype(np.float32)))


def test_transposed():
    values = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float16).T
    assert same_bits(widen(values), np.ascontiguousarray(values.astype(np.float32)))


def test_other_types_are_copied():
    values = np.ones(4, np.float32)
    assert widen(values) is not values
    assert np.array_equal(widen(values), values)


def test_every_value_comes_back():
    narrowed, largest = narrow(FINITE.astype(np.float32))
    assert same_bits(narrowed, FINITE)
    assert largest == 65504


def test_rounding_at_every_tie_and_beside_it():
    """Halfway between two neighbours, and one fp32 step to either side, subnormals and zeros included."""
    wide = np.sort(np.abs(FINITE.astype(np.float32)))
    ties = ((wide[:-1].astype(np.float64) + wide[1:]) / 2).astype(np.float32)
    beside = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    values = np.concatenate([beside, -beside])
    values = values[np.abs(values) <= 65504]
    assert same_bits(narrow(values)[0], values.astype(np.float16))
    truncated = values.view(np.uint32) & ~np.uint32(0x1FFF)
    assert not same_bits(narrow(values)[0], truncated.view(np.float32).astype(np.float16))


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-5, 1e-2, 1, 100])
def test_rounding_of_random_values(scale):
    values = np.random.default_rng(1).standard_normal(BLOCK).astype(np.float32) * np.float32(scale)
    narrowed, largest = narrow(values)
    assert same_bits(narrowed, values.astype(np.float16))
    assert largest == np.abs(values).max()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65519.0, 65520.0, -1e6])
def test_what_does_not_fit_is_cast_as_numpy_does(value):
    values = np.array([1.0, value, 2.0], np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    narrowed, largest = narrow(values)
    assert np.array_equal(narrowed, expected, equal_nan=True)
    assert np.isnan(value) == np.isnan(largest)
    assert np.isnan(value) or largest == abs(value)


def test_nothing_to_narrow():
    assert narrow(np.empty(0, np.float32))[1] == 0
