"""Two rank tests: whether times of one configuration tend to be greater than those of another.

Ranks, because times have long tails and no normal distribution. Own code because scipy is no dependency;
tests hold both against scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

# Up to here the exact distribution counts subsets in int64: C(60, 30) is 1e17.
_EXACT_BOTH = 60
_EXACT_PAIRS = 50


def mann_whitney_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided p-value of the U test (Mann and Whitney 1947) of two independent samples.

    Exact for 60 values or fewer without ties, else by the normal distribution, corrected for ties and
    continuity.

    Args:
        x: at least one value.
        y: at least one value.
    """
    m, n = len(x), len(y)
    if not m or not n:
        raise ValueError(f"got {m} and {n} values; expected at least one of each")
    ranks, ties = _ranks(np.concatenate([np.asarray(x, np.float64), np.asarray(y, np.float64)]))
    u = float(ranks[:m].sum()) - m * (m + 1) / 2
    greater = max(u, m * n - u)
    if m + n <= _EXACT_BOTH and not ties.size:
        counts = _subset_sums(m + n, m)[:, m]
        # Sums of ranks start at m (m + 1) / 2, where U is 0.
        tail = counts[m * (m + 1) // 2 + round(greater) :].sum()
        return min(1.0, 2 * float(tail) / math.comb(m + n, m))
    total = m + n
    tied = float((ties**3 - ties).sum()) / (total * (total - 1)) if total > 1 else 0.0
    variance = m * n / 12 * (total + 1 - tied)
    return _normal_p(greater - m * n / 2, variance)


def wilcoxon_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the signed-rank test (Wilcoxon 1945) of paired samples.

    Exact for 50 pairs or fewer without ties, else by the normal distribution, corrected for ties and
    continuity. Pairs without a difference are left out, as in the paper.

    Args:
        differences: one for each pair.
    """
    values = np.asarray(differences, np.float64)
    values = values[values != 0]
    n = values.size
    if n == 0:
        return 1.0
    ranks, ties = _ranks(np.abs(values))
    positive = float(ranks[values > 0].sum())
    greater = max(positive, n * (n + 1) / 2 - positive)
    if n <= _EXACT_PAIRS and not ties.size:
        tail = _subset_sums(n, n).sum(axis=1)[round(greater) :].sum()
        return min(1.0, 2 * float(tail) / 2.0**n)
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((ties**3 - ties).sum()) / 48
    return _normal_p(greater - n * (n + 1) / 4, variance)


def _ranks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1, ties sharing their mean, and the sizes of the groups that are tied."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse], counts[counts > 1].astype(np.float64)


@cache
def _subset_sums(n: int, most: int) -> np.ndarray:
    """How many subsets of ``1..n`` have a sum and a size: int64 ``(n (n + 1) / 2 + 1, most + 1)``."""
    counts = np.zeros((n * (n + 1) // 2 + 1, most + 1), np.int64)
    counts[0, 0] = 1
    for value in range(1, n + 1):
        counts[value:, 1:] += counts[:-value, :-1].copy()
    return counts


def _normal_p(distance: float, variance: float) -> float:
    if variance <= 0:
        return 1.0
    z = max(0.0, distance - 0.5) / math.sqrt(variance)
    return min(1.0, math.erfc(z / math.sqrt(2)))
