"""Distances against torch's, and what NaN and infinity do to them."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.fidelity.distance import Distance, cosine, distance, worst

RNG = np.random.default_rng(0)
WANTED = RNG.standard_normal((2, 4, 8, 8), np.float32)
MADE = WANTED + RNG.standard_normal(WANTED.shape, np.float32) * np.float32(0.1)


def test_figures_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    made, wanted = torch.from_numpy(MADE).double().ravel(), torch.from_numpy(WANTED).double().ravel()
    found = distance(MADE, WANTED)
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(made, wanted, 0)))
    assert found.relative_l2 == pytest.approx(float((made - wanted).norm() / wanted.norm()))
    assert found.max_abs == pytest.approx(float((made - wanted).abs().max()))
    assert (found.nans, found.infs) == (0, 0)


@pytest.mark.parametrize(
    "planted",
    [MADE * 1.01, MADE[:, [1, 0, 2, 3]], np.roll(MADE, 1, axis=-1)],
    ids=["scaled", "swapped channels", "shifted"],
)
def test_a_planted_error_is_seen(planted: np.ndarray) -> None:
    assert distance(planted, MADE).relative_l2 > 9e-3


def test_the_cosine_does_not_see_a_factor_and_the_error_does() -> None:
    found = distance(WANTED * 2, WANTED)
    assert found.cosine == pytest.approx(1)
    assert found.relative_l2 == pytest.approx(1)


def test_bad_values_are_counted_and_do_not_hide_the_rest() -> None:
    planted = MADE.copy()
    planted.flat[:3] = np.nan, np.inf, -np.inf
    found = distance(planted, WANTED)
    assert (found.nans, found.infs, found.nonfinite) == (1, 2, 3)
    assert found.relative_l2 == pytest.approx(distance(MADE, WANTED).relative_l2, rel=0.05)
    assert distance(np.full_like(WANTED, np.nan), WANTED).relative_l2 == np.inf


def test_a_reference_that_is_not_finite_or_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="the reference holds NaN"):
        distance(MADE, np.full_like(WANTED, np.nan))
    with pytest.raises(ValueError, match=r"\[2, 4, 8, 8\], expected \[1, 4, 8, 8\]"):
        distance(MADE, WANTED[:1])


def test_zeros_have_an_angle_only_to_zeros() -> None:
    zeros = np.zeros(3)
    assert cosine(zeros, zeros) == 1
    assert cosine(zeros, np.ones(3)) == 0


def test_the_worst_is_told_figure_by_figure() -> None:
    found = worst([Distance(0.1, 0.99, 3, 1, 0), Distance(0.2, 0.999, 2, 0, 1)])
    assert found == Distance(0.2, 0.99, 3, 1, 1)
    with pytest.raises(ValueError, match="no outputs"):
        worst([])
