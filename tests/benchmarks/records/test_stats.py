"""Figures against numpy and scipy; outliers and modes by simulation, with seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest

from kiln.benchmarks.records.bootstrap import interval, median_distribution
from kiln.benchmarks.records.record import Sample, Stats
from kiln.benchmarks.records.stats import (
    INTERVAL_LEAST,
    OUTLIER_LIMIT,
    count_modes,
    derive,
    outliers_of,
    stats_of,
)

scipy_stats = pytest.importorskip("scipy.stats")
RUNS = 400
Draw = Callable[[np.random.Generator, int], np.ndarray]


def said(values: object) -> Stats:
    found = stats_of(list(values))  # type: ignore[call-overload]
    assert found is not None
    return found


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(1, 0.02, n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(0, 0.3, n)


def gamma(rng: np.random.Generator, n: int) -> np.ndarray:
    return 1 + 0.05 * rng.gamma(2, size=n)


def uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(0.9, 1.1, n)


def two_modes(rng: np.random.Generator, n: int, share: float = 0.5, apart: float = 0.2) -> np.ndarray:
    """Two groups whose own spread is 2 %, in any order."""
    made = rng.normal(1, 0.02, n)
    made[: round(n * share)] += apart
    return rng.permutation(made)


@pytest.mark.parametrize("count", [2, 9, 20, 100])
def test_figures_are_numpys(count: int) -> None:
    x = np.random.default_rng(count).gamma(4, size=count)
    found = said(x)
    assert found.count == count
    assert found.median == pytest.approx(np.median(x))
    assert found.mean == pytest.approx(x.mean())
    assert found.sd == pytest.approx(x.std(ddof=1))
    assert found.cv == pytest.approx(scipy_stats.variation(x, ddof=1))
    assert found.mad == pytest.approx(scipy_stats.median_abs_deviation(x))
    assert (found.min, found.max) == (x.min(), x.max())
    for name, at, least in (("p90", 90, 10), ("p95", 95, 20), ("p99", 99, 100)):
        expected = pytest.approx(np.percentile(x, at)) if count >= least else None
        assert getattr(found, name) == expected
    assert said(1.01 * x).median != pytest.approx(np.median(x))


def test_a_tail_is_never_made_up() -> None:
    assert said(range(1, 10)).p90 is None
    assert said(range(1, 20)).p95 is None
    assert said(range(1, 100)).p99 is None
    assert said(range(1, 101)).p99 is not None


def test_few_samples_have_few_figures() -> None:
    assert stats_of([]) is None
    one = said([2.0])
    assert (one.sd, one.cv, one.interval, one.mad) == (None, None, None, 0.0)
    assert said([1.0] * (INTERVAL_LEAST - 1)).interval is None
    assert said([1.0, 2.0, 3.0, 4.0, 5.0]).interval is not None
    with pytest.raises(ValueError, match="sample 1 is nan"):
        stats_of([1.0, float("nan")])


def test_the_same_samples_give_the_same_figures() -> None:
    x = np.random.default_rng(0).gamma(4, size=60).tolist()
    assert asdict(said(x)) == asdict(said(x))


@pytest.mark.parametrize(("count", "least"), [(5, 0.91), (10, 0.92), (30, 0.93)])
def test_the_interval_covers_the_median(count: int, least: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = interval(median_distribution(list(rng.lognormal(0, 0.03, count))))
        hits += low <= 1.0 <= high
    assert least <= hits / 1000 <= 0.985


@pytest.mark.parametrize("slow", [1.5, 0.5])
def test_a_planted_outlier_is_flagged_and_kept(slow: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.lognormal(0, 0.02, 30)
        x[11] = slow
        found = said(x)
        assert found.outliers == (11,)
        assert found.count == 30


@pytest.mark.parametrize("draw", [normal, uniform])
def test_quiet_samples_have_no_outliers(draw: Draw) -> None:
    rng = np.random.default_rng(0)
    flagged = sum(bool(outliers_of(draw(rng, 30).tolist())) for _ in range(RUNS))
    assert flagged <= RUNS * 0.01


def test_equal_samples_have_no_outliers_but_the_one_that_differs() -> None:
    assert outliers_of([1.0] * 20) == ()
    assert outliers_of([1.0] * 19 + [1.1]) == (19,)
    assert outliers_of([0.0] * 5 + [1.0]) == (5,)
    spread = [1.0 - 0.01, 1.0, 1.0 + 0.01] * 5
    assert outliers_of([*spread, 1.0 + 0.01 * (OUTLIER_LIMIT - 0.5)]) == ()


@pytest.mark.parametrize("count", [10, 15, 20, 30, 60, 200])
@pytest.mark.parametrize("draw", [normal, skewed, gamma, uniform])
def test_one_mode_is_one(draw: Draw, count: int) -> None:
    rng = np.random.default_rng(count)
    found = sum(count_modes(draw(rng, count).tolist()) > 1 for _ in range(RUNS))
    assert found <= RUNS * 0.025


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("count", [20, 30, 100, 400])
def test_two_modes_are_found(count: int, share: float) -> None:
    rng = np.random.default_rng(count)
    found = sum(count_modes(two_modes(rng, count, share).tolist()) == 2 for _ in range(100))
    assert found >= 95


def test_a_few_outliers_and_small_steps_are_no_mode() -> None:
    rng = np.random.default_rng(0)
    spiky = rng.normal(1, 0.02, 30)
    spiky[:2] = 2.0
    assert count_modes(spiky.tolist()) == 1
    assert count_modes([1.0, 1.001] * 20) == 1
    assert count_modes([1.0] * 5 + [2.0] * 4) == 1  # too few to tell


def test_figures_of_a_record_are_per_image(make_samples: Callable[..., tuple[Sample, ...]]) -> None:
    found = derive(make_samples([2.0, 4.0, 6.0], 2), 2)
    assert found.image is not None
    assert found.image.median == 2.0
    assert found.components["unet"].median == pytest.approx(0.8 * 2.0)
    assert found.unet_step is not None
    assert found.unet_step.count == 12
    assert found.unet_step.median == pytest.approx(0.8 * 4.0 / 4)
    assert found.unattributed == pytest.approx(0.01)


def test_what_cannot_be_told_apart_is_not() -> None:
    found = derive([Sample(0, 0, 0, 2.0)], 1)
    assert (found.components, found.unet_step, found.unattributed) == ({}, None, None)
    assert derive([], 1).image is None
    with pytest.raises(ValueError, match="batch of 0"):
        derive([], 0)
