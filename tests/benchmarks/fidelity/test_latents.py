"""Latents step by step: what passes, and planted errors that do not."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.fidelity import latent_gates
from kiln.benchmarks.records.record import Gate, Requested
from kiln.errors import UsageError

RNG = np.random.default_rng(0)
WANTED = np.cumsum(RNG.standard_normal((6, 2, 4, 8, 8), np.float32), axis=0)
FP32, BF16 = (Requested("kiln", "openvino", precision=p) for p in ("fp32", "bf16"))


def failed(gates: list[Gate]) -> set[str]:
    return {gate.metric for gate in gates if not gate.passed}


def noisy(share: float) -> np.ndarray:
    noise = RNG.standard_normal(WANTED.shape, np.float32)
    scale = np.linalg.norm(WANTED[-1]) / np.linalg.norm(noise[-1])
    return WANTED + noise * np.float32(share * scale)


def test_equal_latents_pass_with_flat_curves() -> None:
    gates, curves = latent_gates(WANTED, WANTED, FP32)
    assert not failed(gates)
    assert curves == {"relative_l2": (0.0,) * 6, "cosine": pytest.approx((1.0,) * 6)}


def test_limits_are_those_of_the_precision() -> None:
    made = noisy(0.02)
    assert failed(latent_gates(made, WANTED, FP32)[0]) == {"relative_l2", "cosine"}
    assert not failed(latent_gates(made, WANTED, BF16)[0])
    assert not failed(latent_gates(made, WANTED, FP32, precision="reported")[0])


@pytest.mark.parametrize(
    "planted",
    [WANTED[:, :, [1, 0, 2, 3]], np.roll(WANTED, 1, axis=0), WANTED[:, ::-1], WANTED * 1.2, WANTED * 0],
    ids=["swapped channels", "one step late", "images swapped", "scaled", "zeros"],
)
def test_planted_errors_fail_even_in_bf16(planted: np.ndarray) -> None:
    assert "relative_l2" in failed(latent_gates(planted, WANTED, BF16)[0])


def test_nan_in_one_step_fails_though_the_last_is_right() -> None:
    planted = WANTED.copy()
    planted[2, 0, 0, 0, 0] = np.nan
    gates, curves = latent_gates(planted, WANTED, BF16)
    assert failed(gates) == {"nonfinite"}
    assert np.isfinite(curves["relative_l2"]).all()


def test_the_curve_shows_where_runs_part() -> None:
    planted = WANTED.copy()
    planted[3:] += 1
    _, curves = latent_gates(planted, WANTED, BF16)
    assert max(curves["relative_l2"][:3]) == 0
    assert min(curves["relative_l2"][3:]) > 0.1


def test_of_several_prompts_the_worst_counts() -> None:
    both, wanted = np.stack([WANTED, noisy(0.5)]), np.stack([WANTED, WANTED])
    assert "relative_l2" in failed(latent_gates(both, wanted, BF16)[0])


def test_shapes_and_an_unknown_precision_are_refused() -> None:
    with pytest.raises(UsageError, match=r"got \[5, 2, 4, 8, 8\] and \[6, 2, 4, 8, 8\]"):
        latent_gates(WANTED[1:], WANTED, FP32)
    with pytest.raises(UsageError, match="precision auto"):
        latent_gates(WANTED, WANTED, Requested("kiln", "openvino"))
