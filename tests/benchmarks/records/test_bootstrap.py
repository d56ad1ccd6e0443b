"""The bootstrap's closed form against every resample there is, and against scipy's random ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kiln.benchmarks.records.bootstrap import interval, median_distribution, ratio_interval

stats = pytest.importorskip("scipy.stats")


def values(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(4, size=count)


def enumerated(x: np.ndarray) -> dict[float, float]:
    """Medians of all ``n**n`` resamples, and how often each comes out."""
    drawn = np.array(list(itertools.product(x, repeat=x.size)))
    found, counts = np.unique(np.median(drawn, axis=1), return_counts=True)
    return dict(zip(found.tolist(), (counts / counts.sum()).tolist(), strict=True))


def gathered(x: np.ndarray) -> dict[float, float]:
    made = median_distribution(list(x))
    found: dict[float, float] = {}
    for value, mass in zip(made.values, made.mass, strict=True):
        found[float(value)] = found.get(float(value), 0.0) + float(mass)
    return found


def assert_same(found: dict[float, float], expected: dict[float, float]) -> None:
    assert sum(found.values()) == pytest.approx(1)
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-12)
    np.testing.assert_allclose(
        [found[k] for k in sorted(found)], [expected[k] for k in sorted(expected)], atol=1e-12
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_distribution_is_that_of_all_resamples(count: int) -> None:
    x = values(count)
    assert_same(gathered(x), enumerated(x))


def test_ties_are_counted_together() -> None:
    x = np.array([1.0, 1.0, 2.0, 3.0])
    assert_same(gathered(x), enumerated(x))


def test_another_distribution_is_found() -> None:
    x = values(5)
    expected = enumerated(x)
    x[0] *= 1.01
    with pytest.raises(AssertionError):
        assert_same(gathered(x), expected)


@pytest.mark.parametrize("count", [5, 8, 30, 31, 200])
def test_interval_is_scipys(count: int) -> None:
    x = values(count)
    found = interval(median_distribution(list(x)))
    drawn = stats.bootstrap(
        (x,), np.median, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    spread = drawn.high - drawn.low
    assert found == pytest.approx((drawn.low, drawn.high), abs=0.08 * spread)
    shifted = interval(median_distribution(list(x + 0.2 * spread)))
    assert shifted != pytest.approx((drawn.low, drawn.high), abs=0.08 * spread)


def test_ratio_is_that_of_all_pairs_of_resamples() -> None:
    above, below = enumerated(values(4, 1)), enumerated(values(5, 2))
    pairs = sorted((a / b, p * q) for (a, p), (b, q) in itertools.product(above.items(), below.items()))
    reached = np.cumsum([mass for _, mass in pairs])
    expected = [pairs[int(np.searchsorted(reached, at - 1e-12))][0] for at in (0.025, 0.975)]
    found = ratio_interval(list(values(4, 1)), list(values(5, 2)))
    assert found == pytest.approx(expected, rel=1e-9)
    swapped = ratio_interval(list(values(5, 2)), list(values(4, 1)))
    assert swapped == pytest.approx([1 / expected[1], 1 / expected[0]], rel=1e-9)


def test_ratio_of_equal_values_is_one() -> None:
    assert ratio_interval([2.0] * 6, [2.0] * 5) == pytest.approx((1.0, 1.0), abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [2000, 2001, 20_000])
def test_many_values_neither_overflow_nor_take_long(count: int) -> None:
    low, high = interval(median_distribution(list(values(count))))
    assert low < np.median(values(count)) < high
    # The asymptotic standard error of a median: 1 / (2 f sqrt(n)), with the density of gamma(4).
    density = stats.gamma(4).pdf(stats.gamma(4).median())
    assert high - low == pytest.approx(2 * 1.96 / (2 * density * np.sqrt(count)), rel=0.25)


def test_nothing_and_times_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_distribution([])
    with pytest.raises(ValueError, match=r"least value is 0\.0"):
        ratio_interval([1.0], [0.0])
