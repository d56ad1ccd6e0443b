"""Bootstrap intervals of medians and of their ratios, exact: the distribution over all resamples, not over
some.

The bootstrap (Efron, Bootstrap Methods: Another Look at the Jackknife, 1979) resamples ``n`` values with
replacement. For the median the distribution of what comes out has a closed form, which the same paper gives
for odd ``n`` and which is extended to even ``n`` below. So there is no seed, and no figure that another
version of numpy would draw otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
# Order statistics further from the middle than this many standard deviations (sqrt(n) / 2 each) are left
# out: they carry 1e-12 of the mass.
_REACH = 7.0


@dataclass(frozen=True)
class Distribution:
    """Values in ascending order and the probability of each, float64 ``(m,)``."""

    values: np.ndarray
    mass: np.ndarray


def median_distribution(values: Sequence[float]) -> Distribution:
    """The bootstrap distribution of the median.

    Args:
        values: at least one, all finite.
    """
    x = np.sort(np.asarray(values, np.float64))
    if x.size == 0:
        raise ValueError("no values; expected at least one")
    points, mass = _odd(x) if x.size % 2 else _even(x)
    order = np.argsort(points, kind="stable")
    return Distribution(points[order], mass[order] / mass.sum())


def interval(found: Distribution, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval: the least values that ``(1 - level) / 2``, and the rest, lie below."""
    reached = np.cumsum(found.mass)
    tail = (1 - level) / 2
    # Sums of thousands of products are off by some 1e-13; what hits the tail exactly shall count as reached.
    low, high = np.searchsorted(reached, (tail - 1e-12, 1 - tail - 1e-12))
    last = found.values.size - 1
    return float(found.values[min(low, last)]), float(found.values[min(high, last)])


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of two medians, each side resampled by itself.

    A side with one sample has no spread of its own; the interval then only shows that of the other.

    Args:
        above: values above 0.
        below: values above 0.

    Raises:
        ValueError: a value is 0 or less.
    """
    if min(*above, *below) <= 0:
        raise ValueError(f"the least value is {min(*above, *below)}; a ratio of times needs values above 0")
    a, b = median_distribution(above), median_distribution(below)
    tail = (1 - LEVEL) / 2
    return _ratio_quantile(a, b, tail), _ratio_quantile(a, b, 1 - tail)


def _odd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``P(median <= x_k)`` is that at least half of ``n`` draws are among the first ``k``: a binomial's
    tail.
    """
    n = x.size
    m = (n + 1) // 2
    k = _near(n, m)
    at_most = np.array([_binomial_tail(n, i / n, m) for i in (k[0] - 1, *k)])
    return x[k - 1], np.diff(at_most)


def _even(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the two middle order statistics ``x_i <= x_j`` of a resample of ``n = 2m``.

    For ``i < j`` one half of the draws has its greatest at ``i``, the other its least at ``j``::

        P(i, j) = C(2m, m) ((i/n)^m - ((i-1)/n)^m) (((n-j+1)/n)^m - ((n-j)/n)^m)

    and ``P(i, i)`` is what is left of ``P(m-th draw = i)``, again a binomial's tail.
    """
    n = x.size
    m = n // 2
    k = _near(n, m)
    # In logarithms, because the powers and the binomial overflow each by itself.
    lower = _log_difference(_log_power(k, n, m), _log_power(k - 1, n, m))
    upper = _log_difference(_log_power(n - k + 1, n, m), _log_power(n - k, n, m))
    logs = np.where(k[:, None] < k[None, :], lower[:, None] + upper[None, :], -np.inf)
    pairs = np.exp(_log_choose(n, m) + logs)
    at_most = np.array([_binomial_tail(n, i / n, m) for i in (k[0] - 1, *k)])
    same = np.clip(np.diff(at_most) - pairs.sum(axis=1), 0, None)
    pairs += np.diag(same)
    i, j = np.nonzero(pairs > 1e-15)
    return (x[k[i] - 1] + x[k[j] - 1]) / 2, pairs[i, j]


def _ratio_quantile(a: Distribution, b: Distribution, at: float) -> float:
    """The least ``r`` with ``P(A / B <= r) >= at``, by halving: both may have tens of thousands of values."""
    cumulated = np.concatenate([[0.0], np.cumsum(a.mass)])

    def reached(ratio: float) -> bool:
        below = np.searchsorted(a.values, b.values * ratio * (1 + 1e-15), side="right")
        return float(b.mass @ cumulated[below]) >= at - 1e-12

    low, high = a.values[0] / b.values[-1], a.values[-1] / b.values[0]
    if reached(low):
        return float(low)
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if reached(middle) else (middle, high)
    return float(high)


def _near(n: int, m: int) -> np.ndarray:
    """Ranks (from 1) that a middle order statistic of a resample can have."""
    reach = int(_REACH * np.sqrt(n) / 2) + 2
    return np.arange(max(1, m - reach), min(n, m + reach) + 1)


def _binomial_tail(n: int, p: float, least: int) -> float:
    """``P(at least `least` of n)`` with the probability ``p`` each."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    k = np.arange(least, n + 1)
    logs = _log_factorials(n)
    terms = logs[n] - logs[k] - logs[n - k] + k * np.log(p) + (n - k) * np.log1p(-p)
    return float(np.exp(terms).sum())


def _log_power(k: np.ndarray, n: int, m: int) -> np.ndarray:
    """``log((k/n)^m)``, minus infinity for ``k = 0``."""
    with np.errstate(divide="ignore"):
        return m * np.log(k / n)


def _log_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``log(exp(a) - exp(b))`` for ``a > b``."""
    return a + np.log1p(-np.exp(b - a))


def _log_choose(n: int, k: int) -> float:
    logs = _log_factorials(n)
    return float(logs[n] - logs[k] - logs[n - k])


def _log_factorials(n: int) -> np.ndarray:
    """``log(k!)`` for ``k`` from 0 to ``n``, float64 ``(n + 1,)``."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
