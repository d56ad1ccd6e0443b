"""Low-rank factors of a matrix by its singular values, and of a product of factors without forming it.

A best approximation of rank r keeps the r largest singular values (Eckart and Young 1936); the *energy* kept
is the sum of their squares over that of all, which is 1 minus the squared relative error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ..adapters.updates import MAX_RANK

_COLUMNS = 4096  # columns that are widened to float64 at once
_ALWAYS_EXACT = 384  # the smaller side up to which all singular values are found in no time
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3
_FIRST_GUESS = 48  # ranks, where only the energy is given
_WORTH_IT = 4  # how much smaller than the matrix a projection has to be


@dataclass(frozen=True)
class Budget:
    """How much to keep: a rank, or the least rank that keeps a part of the energy."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("expected either a rank (--rank N) or a part of the energy (--energy 0.95)")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise UsageError(f"rank {self.rank}: expected 1 to {MAX_RANK}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy:g}: expected more than 0 and at most 1, such as 0.95")

    def choose(self, squares: np.ndarray, total: float) -> int:
        """The rank for singular values whose squares are given, the largest first; at least 1.

        ``total`` is the sum of the squares of all, also of those that are not given.
        """
        if self.rank is not None:
            return min(self.rank, len(squares))
        assert self.energy is not None
        # A sum of rounded squares may end a little below itself.
        enough = int(np.searchsorted(np.cumsum(squares), self.energy * total * (1 - 1e-9))) + 1
        return min(enough, len(squares), MAX_RANK)


@dataclass(frozen=True)
class Factored:
    """``up @ down`` (O, r) and (r, I), float32; the squared norms of the matrix and of what is kept of it."""

    up: np.ndarray
    down: np.ndarray
    total: float
    kept: float

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return int(self.up.shape[1])

    @property
    def energy(self) -> float:
        """The part of the squared norm that is kept; 1 for a zero matrix."""
        return self.kept / self.total if self.total else 1.0


def factor(matrix: np.ndarray, budget: Budget, *, exact: bool = False) -> Factored:
    """Factors of a float32 matrix (O, I) within a budget.

    Small matrices, and all with ``exact``, get the best factors there are. Of a large one a part of its
    singular vectors is found by random projection with power iterations (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061), with a fixed seed; what is kept is measured and never more than the best.
    """
    total = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    smaller = min(matrix.shape)
    if not exact and smaller > _ALWAYS_EXACT and total:
        count = (budget.rank or _FIRST_GUESS) + _OVERSAMPLING
        while count * _WORTH_IT < smaller:
            found = _truncated(matrix, _range(matrix, count), budget, total)
            if budget.energy is None or found.energy >= budget.energy * (1 - 1e-9):
                return found
            count *= 2
    return _truncated(matrix, None, budget, total)


def _truncated(matrix: np.ndarray, basis: np.ndarray | None, budget: Budget, total: float) -> Factored:
    """The best factors of ``basis basis^T M``, or of the matrix itself.

    The eigenvectors of the smaller of ``M M^T`` and ``M^T M``, in float64, are the singular vectors of one
    side; the other is the projection of the matrix on them, so what is kept is right whatever their rounding.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    inner = wide if basis is None else basis.T @ wide
    values, vectors = np.linalg.eigh(_gram(inner))
    squares = np.maximum(values[::-1], 0.0)
    rank = _rank(squares, budget, total)
    own = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    # The root of each singular value on both sides, so that neither runs out of float16.
    roots = np.sqrt(np.sqrt(squares[:rank])) if squares[0] > 0 else np.ones(rank)
    other = _projected(inner, own) / roots[:, None]
    if basis is not None:
        own = basis.astype(np.float64) @ own
    own = own * roots
    up, down = (other.T, own.T) if tall else (own, other)
    kept = float(squares[:rank].sum())
    return Factored(
        np.ascontiguousarray(up, np.float32), np.ascontiguousarray(down, np.float32), total, min(kept, total)
    )


def _range(matrix: np.ndarray, count: int) -> np.ndarray:
    """An orthonormal basis (n, count) of where the smaller side of a matrix has most of its energy."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = wide @ np.random.default_rng(0).standard_normal((wide.shape[1], count), np.float32)
    for _ in range(_POWER_ITERATIONS):
        found = wide @ (wide.T @ np.linalg.qr(found)[0])
    return np.linalg.qr(found)[0]


def _rank(squares: np.ndarray, budget: Budget, total: float) -> int:
    """The rank to keep; what is lost in rounding beside the largest singular value is no direction."""
    if not squares[0] > 0:
        return 1
    real = int((squares > squares[0] * np.finfo(np.float64).eps * len(squares)).sum())
    return min(budget.choose(squares, total), real)


def _gram(matrix: np.ndarray) -> np.ndarray:
    """``M M^T`` in float64, by blocks of columns."""
    gram = np.zeros((len(matrix), len(matrix)), np.float64)
    for start in range(0, matrix.shape[1], _COLUMNS):
        block = matrix[:, start : start + _COLUMNS].astype(np.float64)
        gram += block @ block.T
    return gram


def _projected(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """``basis^T M`` in float64, by blocks of columns."""
    out = np.empty((basis.shape[1], matrix.shape[1]), np.float64)
    for start in range(0, matrix.shape[1], _COLUMNS):
        block = matrix[:, start : start + _COLUMNS].astype(np.float64)
        out[:, start : start + _COLUMNS] = basis.T @ block
    return out


def refactor(up: np.ndarray, down: np.ndarray, budget: Budget) -> Factored:
    """The best factors of ``up @ down`` within a budget, without the product: by QR of both, in float64."""
    left, inner_left = np.linalg.qr(up.astype(np.float64))
    right, inner_right = np.linalg.qr(down.T.astype(np.float64))
    core_left, values, core_right = np.linalg.svd(inner_left @ inner_right.T)
    squares = values**2
    rank = _rank(squares, budget, float(squares.sum()))
    roots = np.sqrt(values[:rank])
    new_up = (left @ core_left[:, :rank]) * roots
    new_down = roots[:, None] * (core_right[:rank] @ right.T)
    return Factored(
        np.ascontiguousarray(new_up, np.float32),
        np.ascontiguousarray(new_down, np.float32),
        float(squares.sum()),
        float(squares[:rank].sum()),
    )
