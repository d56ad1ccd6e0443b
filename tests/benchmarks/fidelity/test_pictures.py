"""Images: scikit-image's figures, and planted errors that do not pass."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.fidelity import image_gates
from kiln.benchmarks.records.record import Gate, Requested
from kiln.errors import UsageError

RNG = np.random.default_rng(0)
_ROWS, _COLUMNS = np.mgrid[0:48, 0:64]
_CHANNELS = [np.sin(_ROWS / a) + np.cos(_COLUMNS / b) for a, b in ((5, 7), (9, 4), (6, 11))]
WANTED = np.stack([np.stack(_CHANNELS, -1), np.stack(_CHANNELS[::-1], -1)])
WANTED = ((WANTED - WANTED.min()) / np.ptp(WANTED) * 255).astype(np.uint8)
FP32, BF16 = (Requested("kiln", "openvino", precision=p) for p in ("fp32", "bf16"))


def near(levels: int) -> np.ndarray:
    noise = RNG.integers(-levels, levels + 1, WANTED.shape)
    return np.clip(WANTED.astype(int) + noise, 0, 255).astype(np.uint8)


def failed(gates: list[Gate]) -> set[str]:
    return {gate.metric for gate in gates if not gate.passed}


def test_figures_are_those_of_scikit_image() -> None:
    oracle = pytest.importorskip("skimage.metrics")
    made = near(6)
    _, metrics = image_gates(made, WANTED, BF16)
    for a, e, found in zip(made, WANTED, metrics, strict=True):
        psnr = oracle.peak_signal_noise_ratio(e, a, data_range=255)
        ssim = oracle.structural_similarity(e, a, data_range=255, channel_axis=-1)
        assert found == pytest.approx({"psnr_db": psnr, "ssim": ssim})


def test_equal_images_pass_with_a_finite_figure() -> None:
    gates, metrics = image_gates(WANTED, WANTED, FP32)
    assert not failed(gates)
    assert [one["psnr_db"] for one in metrics] == [150, 150]


def test_limits_are_those_of_the_precision() -> None:
    made = near(3)
    assert "psnr_db" in failed(image_gates(made, WANTED, FP32)[0])
    assert not failed(image_gates(made, WANTED, BF16)[0])


@pytest.mark.parametrize(
    "planted",
    [WANTED[::-1], WANTED[..., ::-1], WANTED[:, ::-1], 255 - WANTED, np.roll(WANTED, 2, axis=2)],
    ids=["wrong image", "swapped channels", "upside down", "negative", "two pixels off"],
)
@pytest.mark.parametrize("precision", ["bf16", "int8-full"])
def test_planted_errors_fail(planted: np.ndarray, precision: str) -> None:
    assert {"psnr_db", "ssim"} <= failed(image_gates(planted, WANTED, BF16, precision=precision)[0])


def test_a_black_image_fails_even_where_all_else_is_reported() -> None:
    planted = WANTED.copy()
    planted[1] = 0
    gates, _ = image_gates(planted, WANTED, BF16, precision="reported")
    assert failed(gates) == {"flat"}
    assert next(gate.where for gate in gates if gate.metric == "flat") == "image 2"


def test_a_flat_reference_is_no_fault_of_the_backend() -> None:
    flat = np.full_like(WANTED, 7)
    assert not failed(image_gates(flat, flat, BF16)[0])


def test_nan_fails() -> None:
    planted = WANTED.astype(np.float32)
    planted[0, 3, 4, 1] = np.nan
    gates, metrics = image_gates(planted, WANTED, BF16, precision="reported")
    assert failed(gates) == {"nonfinite"}
    assert np.isfinite(metrics[0]["psnr_db"])


def test_one_bad_image_of_many_is_named() -> None:
    planted = near(1)
    planted[1] = planted[1, ::-1]
    gates, _ = image_gates(planted, WANTED, BF16)
    assert {gate.where for gate in gates if not gate.passed} == {"image 2"}


def test_figures_of_trained_networks_are_joined() -> None:
    gates, metrics = image_gates(WANTED, WANTED, BF16, learned=[{"lpips": 0.1}, {"lpips": 0.3}])
    assert metrics[1]["lpips"] == 0.3
    assert next((g.value, g.limit, g.where) for g in gates if g.metric == "lpips") == (0.3, None, "image 2")


def test_numbers_and_sizes_are_checked() -> None:
    with pytest.raises(UsageError, match="got 1 images and 2"):
        image_gates(WANTED[:1], WANTED, BF16)
    with pytest.raises(UsageError, match=r"image 1 is \[48, 32, 3\], the reference's \[48, 64, 3\]"):
        image_gates(WANTED[:, :, :32], WANTED, BF16)
