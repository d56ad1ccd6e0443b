"""How far one array is from another: the figures that parity is judged by, and what makes them worthless."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...metrics import relative_l2

# PSNR of equal images, which has no finite value and JSON no word for infinity. Two 8-bit images that differ
# by one level in one of n values have 48.13 + 10 log10(n) dB: 150 would take 15 thousand million values.
SAME_DB = 150.0


@dataclass(frozen=True)
class Distance:
    """One output against the reference's.

    ``relative_l2`` is ``||a - e|| / ||e||``, ``cosine`` ``a.e / (||a|| ||e||)``, both in float64 over all
    elements, ``max_abs`` the largest difference; NaN and infinity are counted in the output and left out of
    the three figures, so that one bad value does not hide how the rest is. All bad: these are infinite,
    and the cosine is -1.
    """

    relative_l2: float
    cosine: float
    max_abs: float
    nans: int
    infs: int

    @property
    def nonfinite(self) -> int:
        """How many values are no numbers."""
        return self.nans + self.infs


def distance(actual: np.ndarray, expected: np.ndarray) -> Distance:
    """Compare an output with the reference's.

    Args:
        actual: float array.
        expected: of the same shape, all finite.

    Raises:
        ValueError: the shapes differ, or the reference itself is not finite.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the output has the shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not np.isfinite(expected).all():
        raise ValueError("the reference holds NaN or infinity; nothing can be compared with it")
    good = np.isfinite(actual)
    nans = int(np.isnan(actual).sum())
    infs = actual.size - int(good.sum()) - nans
    a, e = actual[good].astype(np.float64), expected[good].astype(np.float64)
    if not a.size:
        return Distance(float("inf"), -1.0, float("inf"), nans, infs)
    return Distance(relative_l2(a, e), cosine(a, e), float(np.abs(a - e).max()), nans, infs)


def cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    """``a.e / (||a|| ||e||)`` in float64; 1 for two arrays of zeros, 0 if only one is."""
    a, e = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(e))
    if norms == 0:
        return 1.0 if np.array_equal(a, e) else 0.0
    return float(np.clip(a @ e / norms, -1, 1))


def worst(found: list[Distance]) -> Distance:
    """Figure by figure the worst; counts are added.

    Raises:
        ValueError: there is nothing to judge.
    """
    if not found:
        raise ValueError("no outputs were compared")
    return Distance(
        max(one.relative_l2 for one in found),
        min(one.cosine for one in found),
        max(one.max_abs for one in found),
        sum(one.nans for one in found),
        sum(one.infs for one in found),
    )
