"""The metrics of parity against scikit-image, and limits that hold on one side only."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, Threshold, psnr_db, relative_l2

IMAGE = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
NOISY = np.clip(IMAGE.astype(int) + np.random.default_rng(2).integers(-9, 10, IMAGE.shape), 0, 255).astype(
    np.uint8
)


def oracle(actual: np.ndarray, expected: np.ndarray) -> float:
    metrics = pytest.importorskip("skimage.metrics")
    return float(metrics.peak_signal_noise_ratio(expected, actual, data_range=255))


def test_psnr_is_that_of_scikit_image() -> None:
    assert psnr_db(NOISY, IMAGE) == pytest.approx(oracle(NOISY, IMAGE), rel=1e-12)


def test_a_planted_error_is_seen() -> None:
    scaled = np.clip(IMAGE * 1.01, 0, 255)
    assert psnr_db(NOISY, scaled) != pytest.approx(oracle(NOISY, IMAGE), rel=1e-4)
    assert psnr_db(NOISY[::-1], IMAGE) < psnr_db(NOISY, IMAGE) - 10


def test_equal_images_and_integers_do_not_wrap() -> None:
    assert psnr_db(IMAGE, IMAGE) == math.inf
    black, white = np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)
    assert psnr_db(black, white) == psnr_db(white, black) == pytest.approx(0)


def test_relative_l2_is_the_share_of_the_error() -> None:
    expected = np.random.default_rng(3).standard_normal((5, 7), np.float32)
    assert relative_l2(expected, expected) == 0
    assert relative_l2(expected * np.float32(1.01), expected) == pytest.approx(0.01, rel=1e-4)
    difference = np.linalg.norm(NOISY.astype(float) - IMAGE) / np.linalg.norm(IMAGE.astype(float))
    assert relative_l2(NOISY, IMAGE) == pytest.approx(difference)


@pytest.mark.parametrize(("at_most", "good", "bad"), [(True, 0.9, 1.1), (False, 1.1, 0.9)])
def test_limits_hold_on_one_side(at_most: bool, good: float, bad: float) -> None:
    limit = Threshold(1.0, at_most, "")
    assert limit.holds(1.0)
    assert limit.holds(good)
    assert not limit.holds(bad)
    assert not limit.holds(math.nan)


def test_every_limit_says_why() -> None:
    assert all(math.isfinite(limit.limit) and limit.why for limit in THRESHOLDS.values())
