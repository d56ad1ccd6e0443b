"""fp16 to fp32 against numpy's own conversion, for every value there is."""

import numpy as np
import pytest

from kiln.exporters.adapters.widen import widen

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def same_bits(actual, expected):
    return np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


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
