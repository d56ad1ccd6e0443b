"""How near two outputs are: the metrics that benchmarks, tests and the gate of int8 share, and limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SSIM_WINDOW = 7  # pixels a side, the default of scikit-image
_SSIM_K1, _SSIM_K2 = 0.01, 0.03  # Wang, Bovik, Sheikh & Simoncelli 2004


@dataclass(frozen=True)
class Threshold:
    """A limit, whether it bounds from above or below, and the run that justified it."""

    limit: float
    at_most: bool
    why: str

    def holds(self, value: float) -> bool:
        """Whether ``value`` is on the right side; NaN never is."""
        return value <= self.limit if self.at_most else value >= self.limit


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """``||actual - expected|| / ||expected||`` in float64 over all elements."""
    a, e = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), np.finfo(np.float64).tiny))


def psnr_db(actual: np.ndarray, expected: np.ndarray, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal images."""
    mse = np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def ssim(actual: np.ndarray, expected: np.ndarray, data_range: float = 255.0) -> float:
    """Structural similarity (Wang et al., IEEE TIP 13(4), 2004), mean over pixels and channels.

    Args:
        actual: ``(h, w, channels)``, each side at least 7.
        expected: of the same shape.
        data_range: the difference of white and black.

    Returns:
        1 for equal images; with a uniform window of 7 by 7 and the sample covariance, as scikit-image has it.
    """
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    count = _SSIM_WINDOW**2
    unbiased = count / (count - 1)
    mean_a, mean_e = _window_mean(a), _window_mean(e)
    var_a = unbiased * (_window_mean(a * a) - mean_a**2)
    var_e = unbiased * (_window_mean(e * e) - mean_e**2)
    covariance = unbiased * (_window_mean(a * e) - mean_a * mean_e)
    c1, c2 = (_SSIM_K1 * data_range) ** 2, (_SSIM_K2 * data_range) ** 2
    likeness = (2 * mean_a * mean_e + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_e**2 + c1) * (var_a + var_e + c2))).mean())


def _window_mean(values: np.ndarray) -> np.ndarray:
    """Means over all whole windows, by sums along one axis and then the other."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, _SSIM_WINDOW, axis=axis)
        values = windows.mean(axis=-1)
    return values
