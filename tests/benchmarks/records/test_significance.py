"""Rank tests against scipy's, exact and normal, with and without ties."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.records.significance import mann_whitney_p, wilcoxon_p

stats = pytest.importorskip("scipy.stats")


def sides(m: int, n: int, shift: float, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    return list(rng.lognormal(0, 0.03, m)), list(rng.lognormal(shift, 0.03, n))


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.1])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (5, 5), (10, 7), (20, 20), (30, 30)])
def test_u_test_is_scipys_exact_one(m: int, n: int, shift: float) -> None:
    x, y = sides(m, n, shift)
    expected = stats.mannwhitneyu(x, y, method="exact").pvalue
    assert mann_whitney_p(x, y) == pytest.approx(expected, rel=1e-9)
    assert mann_whitney_p(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("digits", [1, 2, 12])
def test_u_test_is_scipys_normal_one(digits: int) -> None:
    x, y = sides(40, 35, 0.01)
    x, y = [round(v, digits) for v in x], [round(v, digits) for v in y]
    assert mann_whitney_p(x, y) == pytest.approx(
        stats.mannwhitneyu(x, y, method="asymptotic").pvalue, rel=1e-9
    )


def test_ties_in_small_samples_take_the_normal_form() -> None:
    x, y = [1.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 6.0, 6.0]
    assert mann_whitney_p(x, y) == pytest.approx(
        stats.mannwhitneyu(x, y, method="asymptotic").pvalue, rel=1e-9
    )
    assert mann_whitney_p([1.0] * 5, [1.0] * 5) == 1.0


@pytest.mark.parametrize("count", [1, 5, 6, 12, 30, 50])
def test_signed_ranks_are_scipys_exact_ones(count: int) -> None:
    d = list(np.random.default_rng(count).normal(0.2, 1, count))
    assert wilcoxon_p(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-9)


@pytest.mark.parametrize("digits", [1, 12])
def test_signed_ranks_are_scipys_normal_ones(digits: int) -> None:
    d = [round(float(v), digits) for v in np.random.default_rng(3).normal(0.3, 1, 70)]
    expected = stats.wilcoxon(d, method="asymptotic", correction=True, zero_method="wilcox").pvalue
    assert wilcoxon_p(d) == pytest.approx(expected, rel=1e-9)


def test_a_shifted_sample_is_another_p() -> None:
    x, y = sides(12, 12, 0.02)
    expected = stats.mannwhitneyu(x, y, method="exact").pvalue
    assert mann_whitney_p([1.01 * v for v in x], y) != pytest.approx(expected, rel=1e-3)


def test_nothing_is_refused_and_no_difference_is_one() -> None:
    with pytest.raises(ValueError, match="got 0 and 1 values"):
        mann_whitney_p([], [1.0])
    assert wilcoxon_p([0.0, 0.0]) == 1.0
