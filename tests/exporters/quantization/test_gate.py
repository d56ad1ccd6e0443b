"""The gate and its metrics, and the file that a calibration is kept in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from kiln.errors import ParityError, UsageError
from kiln.exporters.quantization.calibrate import measure_fit
from kiln.exporters.quantization.gate import Parity, check_parity, compare
from kiln.exporters.quantization.limits import INT8_LIMITS
from kiln.exporters.quantization.observe import Observed, observation_names
from kiln.exporters.quantization.quantize import ActivationRange
from kiln.exporters.quantization.store import (
    Calibration,
    check_calibration,
    read_calibration,
    save_calibration,
)
from kiln.exporters.quantization.trajectories import (
    CALIBRATION_PROMPTS,
    GATE_PROMPTS,
    Trajectory,
    diagonal,
)
from kiln.metrics import ssim


def image(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    waves = np.sin(np.linspace(0, 6, 40))[:, None, None] * 80 + 120
    return np.clip(waves + rng.normal(0, 20, (40, 48, 3)), 0, 255).astype(np.uint8)


def test_ssim_is_that_of_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    one = image(0)
    for other in (image(1), one, np.roll(one, 1, axis=0), 255 - one):
        expected = skimage.structural_similarity(other, one, channel_axis=2, data_range=255)
        assert ssim(other, one) == pytest.approx(expected, abs=1e-9)
    shifted = skimage.structural_similarity(np.roll(one, 1, axis=1), one, channel_axis=2, data_range=255)
    assert ssim(one, one) != pytest.approx(shifted, abs=1e-3)


def trajectory(scale: float = 1.0, seed: int = 0) -> Trajectory:
    latents = np.random.default_rng(9).standard_normal((3, 4, 8, 8)).astype(np.float32)
    return Trajectory("p", latents * np.float32(scale), image(seed))


def test_the_worst_pair_counts() -> None:
    reference = [trajectory(), trajectory()]
    same = compare(reference, reference)
    assert (same.latents_relative_l2, same.image_psnr_db, same.image_ssim) == (0, float("inf"), 1)
    found = compare(reference, [trajectory(), trajectory(1.1, 3)])
    assert found.latents_relative_l2 == pytest.approx(0.1, rel=1e-5)
    assert found.path_relative_l2 == pytest.approx(0.1, rel=1e-5)
    assert 10 < found.image_psnr_db < 40
    assert found.image_ssim < 0.9
    assert json.loads(json.dumps(found.facts()))["steps"] == 3
    with pytest.raises(ValueError, match="zip"):
        compare(reference, reference[:1])


GOOD = Parity(0.01, 0.01, 90.0, 1.0, 3, 8)


@pytest.mark.parametrize("precision", ["int8", "int8-full"])
def test_the_limits_let_pass_and_refuse(precision: str) -> None:
    stem = precision.replace("-", "_")
    check_parity(GOOD, precision)
    for field in ("image_psnr_db", "image_ssim"):
        limit = INT8_LIMITS[f"{stem}_{field}"].limit
        check_parity(dataclasses.replace(GOOD, **{field: limit}), precision)
        for wrong in (limit - 0.01, float("nan")):
            with pytest.raises(ParityError, match=rf"{field} for {precision} is {limit:g}.*--no-gate"):
                check_parity(dataclasses.replace(GOOD, **{field: wrong}), precision)


def test_a_limit_of_the_user_replaces_the_table() -> None:
    poor = dataclasses.replace(GOOD, image_psnr_db=11.0, image_ssim=0.1)
    check_parity(poor, "int8", 10.0)
    with pytest.raises(ParityError, match=r"PSNR 11.0 dB.*--min-parity asks for 12 dB"):
        check_parity(poor, "int8", 12.0)


def test_gate_and_calibration_draw_different_prompts() -> None:
    assert not set(GATE_PROMPTS) & set(CALIBRATION_PROMPTS)


def test_points_go_over_all_steps_and_prompts() -> None:
    places = diagonal(4, 8, 8)
    assert [place % 8 for place in places] == list(range(8))
    assert {place // 8 for place in places} == {0, 1, 2, 3}
    assert [place % 8 for place in diagonal(4, 8, 2)] == [0, 7]
    assert diagonal(1, 1, 5) == [0]


def observed(low: float, high: float, values: np.ndarray) -> Observed:
    made = Observed(["t"])
    seen = (np.float32([low]), np.float32([high]), values, np.array([values.size]))
    made.add(dict(zip(observation_names(0), seen, strict=True)))
    return made


def test_a_calibration_that_no_longer_fits_is_said() -> None:
    ranges = {"t": ActivationRange(-1.0, 1.0)}
    values = np.linspace(-1, 1, 1000, dtype=np.float32)
    fits = measure_fit(ranges, observed(-1, 1, values))
    assert fits.misfits() is None
    assert fits.ratio == pytest.approx(1)
    wide = measure_fit(ranges, observed(-1.2, 1.2, values * np.float32(1.2)))
    assert wide.saturated == pytest.approx(1 - 1 / 1.2, abs=0.01)
    assert "values of t lie outside" in str(wide.misfits())
    far = measure_fit(ranges, observed(-1, 9, values))
    assert "t reach 9.0 times its range" in str(far.misfits())


MADE = Calibration(
    "arch",
    "print",
    {"t": ActivationRange(-1.5, 2.25), "q": ActivationRange(-3.0, 2.0, symmetric=True)},
    ("a.weight",),
    {"a": 0.5},
    {"steps": 8},
    {"a": 4096.0},
)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_calibration(MADE, tmp_path / "deep/c.json")
    assert read_calibration(tmp_path / "deep/c.json") == MADE
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"format": "other"},
        {"ranges": {"t": [1]}},
        {"ranges": {"t": [2, 1]}},
        {"ranges": {"t": [0, float("inf")]}},
        {"ranges": {"t": [0, float("nan")]}},
        {"ranges": []},
        {"kept": 3},
        {"symmetric": 3},
        {"sensitivity": {"a": "x"}},
        {"facts": 7},
        {"multiplications": 7},
        {"multiplications": {"a": 0}},
        {"multiplications": {"a": float("nan")}},
    ],
    ids=str,
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(MADE.to_json()) | change))
    with pytest.raises(UsageError, match="is no calibration"):
        read_calibration(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "\x00"], ids=["empty", "list", "cut", "deep", "nul"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UsageError, match="is no calibration"):
        read_calibration(tmp_path / "c.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_calibration(tmp_path / "none.json")


def test_a_calibration_of_another_model_is_refused() -> None:
    check_calibration(MADE, "arch", "print", "c.json")
    with pytest.raises(UsageError, match=r"c.json was measured on another checkpoint"):
        check_calibration(MADE, "arch", "other", "c.json")
    with pytest.raises(UsageError, match=r"another architecture .*leave --calibration out"):
        check_calibration(MADE, "other", "print", "c.json")
