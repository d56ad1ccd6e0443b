"""Factors of a matrix against torch's singular values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.errors import UsageError
from kiln.exporters.lora_tools.factors import Budget, factor, refactor

FEW = settings(max_examples=25, deadline=None, database=None, derandomize=True)


def decaying(rows, columns, seed=0, power=1.0):
    """A random matrix whose singular values fall like those of real differences of checkpoints."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, min(rows, columns))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, min(rows, columns))))[0]
    return ((left / np.arange(1, left.shape[1] + 1) ** power) @ right.T).astype(np.float32)


def best_energy(matrix, rank):
    squares = torch.linalg.svdvals(torch.from_numpy(matrix).double()) ** 2
    return float(squares[:rank].sum() / squares.sum())


def kept(matrix, made):
    rest = matrix.astype(np.float64) - made.up.astype(np.float64) @ made.down.astype(np.float64)
    return 1 - float((rest**2).sum() / (matrix.astype(np.float64) ** 2).sum())


@FEW
@given(rows=st.integers(1, 40), columns=st.integers(1, 60), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_small_matrices_get_the_best_factors(rows, columns, rank, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    made = factor(matrix, Budget(rank=rank))
    assert made.up.shape == (rows, made.rank)
    assert made.down.shape == (made.rank, columns)
    assert made.rank == min(rank, rows, columns)
    assert made.energy == pytest.approx(best_energy(matrix, made.rank), rel=1e-6)
    assert kept(matrix, made) == pytest.approx(made.energy, abs=1e-6)


@FEW
@given(
    energy=st.floats(0.05, 1), rows=st.integers(2, 30), columns=st.integers(2, 30), seed=st.integers(0, 99)
)
def test_the_least_rank_that_keeps_the_energy(energy, rows, columns, seed):
    matrix = decaying(rows, columns, seed)
    made = factor(matrix, Budget(energy=energy))
    assert kept(matrix, made) >= energy - 1e-6
    assert made.rank == 1 or best_energy(matrix, made.rank - 1) < energy + 1e-6


@pytest.mark.parametrize("shape", [(400, 700), (700, 400)])
def test_a_large_matrix_loses_next_to_nothing_by_projection(shape):
    matrix = decaying(*shape, power=0.6)
    for budget in (Budget(rank=24), Budget(energy=0.6)):
        made, exact = factor(matrix, budget), factor(matrix, budget, exact=True)
        assert exact.energy == pytest.approx(best_energy(matrix, exact.rank), rel=1e-6)
        assert kept(matrix, made) == pytest.approx(made.energy, abs=1e-5)
        if budget.rank:
            assert exact.energy * 0.999 < made.energy <= exact.energy * (1 + 1e-9)
        else:
            assert made.energy >= 0.6 * (1 - 1e-9)
            assert made.rank <= exact.rank + 1


def test_a_wrong_factor_is_seen():
    matrix = decaying(30, 40)
    made = factor(matrix, Budget(rank=8))
    swapped = made.up[:, ::-1] @ made.down
    assert 1 - np.sum((matrix - swapped) ** 2) / np.sum(matrix**2) < made.energy - 0.05


def test_both_sides_have_one_length():
    """So that neither leaves the range of float16."""
    made = factor(decaying(30, 40) * 1e-4, Budget(rank=8))
    assert np.linalg.norm(made.up, axis=0) == pytest.approx(np.linalg.norm(made.down, axis=1), rel=1e-4)


def test_a_matrix_of_less_rank_gets_no_more():
    matrix = (np.ones((20, 1)) @ np.ones((1, 30))).astype(np.float32)
    assert factor(matrix, Budget(rank=8)).rank == 1
    assert factor(np.zeros((4, 5), np.float32), Budget(rank=3)).energy == 1.0


@FEW
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), inner=st.integers(1, 20), rank=st.integers(1, 8))
def test_a_product_is_cut_without_being_formed(rows, columns, inner, rank):
    rng = np.random.default_rng(rows * columns)
    up, down = rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))
    made = refactor(up.astype(np.float32), down.astype(np.float32), Budget(rank=rank))
    product = up.astype(np.float32).astype(np.float64) @ down.astype(np.float32).astype(np.float64)
    assert made.energy == pytest.approx(best_energy(product.astype(np.float32), made.rank), rel=1e-5)
    assert kept(product, made) == pytest.approx(made.energy, abs=1e-5)


def test_a_product_cut_to_other_values_is_seen():
    """The second largest in place of the largest."""
    up, down = decaying(30, 12), decaying(12, 40, seed=1)
    product = up.astype(np.float64) @ down.astype(np.float64)
    one, two = refactor(up, down, Budget(rank=1)), refactor(up, down, Budget(rank=2))
    wrong = replace(two, up=two.up[:, 1:], down=two.down[1:])
    assert kept(product, one) == pytest.approx(best_energy(product.astype(np.float32), 1), abs=1e-5)
    assert kept(product, wrong) < best_energy(product.astype(np.float32), 1) - 0.05


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "either a rank"),
        ({"rank": 4, "energy": 0.5}, "either a rank"),
        ({"rank": 0}, "rank 0: expected 1 to 1024"),
        ({"rank": 2000}, "rank 2000"),
        ({"energy": 0.0}, "energy 0"),
        ({"energy": 1.5}, r"energy 1.5.*such as 0\.95"),
        ({"energy": float("nan")}, "energy nan"),
    ],
)
def test_a_budget_that_cannot_be_is_a_usage_error(values, says):
    with pytest.raises(UsageError, match=says):
        Budget(**values)
