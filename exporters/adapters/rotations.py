"""Cayley's transform: from the free parameters of OFT and BOFT to rotations.

``R = (I + Q) (I - Q)^-1`` with the skew ``Q = B - B^T`` (Qiu et al. 2023, arXiv:2306.07280), in float64 and
block by block.
"""

from __future__ import annotations

import math

import numpy as np

from .base import Rows

MAX_BLOCK = 5120
"""Half of the widest layer of SD1 and SDXL, which kohya's OFT cuts into two blocks at least."""


_TOGETHER = 1 << 18  # elements


def skew(blocks: np.ndarray) -> np.ndarray:
    """``B - B^T`` of each block, in float64."""
    wide = blocks.astype(np.float64)
    return wide - wide.swapaxes(-1, -2)


def cayley(blocks: np.ndarray, constraint: float | None) -> np.ndarray:
    """Rotations minus the identity.

    Args:
        blocks: B, (..., b, b).
        constraint: the largest norm of all Q together, to which they are scaled down; None leaves them.

    Returns:
        ``R - I``, float32, of the same shape.
    """
    turns = skew(blocks)
    if constraint is not None:
        norm = float(np.linalg.norm(turns))
        if norm > constraint:
            turns *= constraint / norm
    size = blocks.shape[-1]
    flat = turns.reshape(-1, size, size)
    out = np.empty(flat.shape, np.float32)
    # A few at a time: small blocks are many, and of large ones the solver needs several copies.
    step = max(1, _TOGETHER // size**2)
    for start in range(0, len(flat), step):
        some = flat[start : start + step]
        # (I + Q)(I - Q)^-1 - I = 2 Q (I - Q)^-1, and the two factors commute.
        out[start : start + step] = _solved(np.eye(size) - some, 2.0 * some)
    return out.reshape(blocks.shape)


def _solved(matrices: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The solutions; NaN where Q is so large that the identity beside it is lost, which is refused later."""
    try:
        return np.linalg.solve(matrices, values)
    except np.linalg.LinAlgError:
        return np.full(values.shape, np.nan)


def rescaled(turns: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """``F R - I`` from ``R - I``, (k, b, b), and a factor for each row that is turned."""
    each = factors.reshape(*turns.shape[:2], 1)
    return each * turns + (each - 1) * np.eye(turns.shape[-1], dtype=np.float32)


def turned_rows(changes: np.ndarray) -> Rows:
    """The change of a weight whose rows are turned block by block.

    Args:
        changes: what the rows of each block are multiplied with from the left, (k, b, b), float32.
    """
    size = changes.shape[-1]

    def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
        blocks = (-1, size, running.shape[1])
        some = changes[start // size : stop // size]
        np.matmul(some, running.reshape(blocks), out=out.reshape(blocks))

    return Rows(fill, size)


def neumann(vectors: np.ndarray, size: int, terms: int) -> np.ndarray:
    """Rotations of PEFT's OFT minus the identity, by the first terms of Neumann's series or exactly.

    Args:
        vectors: (k, b (b - 1) / 2), the upper triangle of each Q, row by row.
        size: b.
        terms: 5 gives ``2Q + 2Q^2 + 2Q^3 + Q^4``; 0 is PEFT's exact form ``(I - Q)(I + Q)^-1``, which turns
            the other way.

    Returns:
        (k, b, b), float32.
    """
    turns = np.zeros((len(vectors), size, size))
    rows, columns = np.triu_indices(size, 1)
    turns[:, rows, columns] = vectors
    turns -= turns.swapaxes(1, 2)
    if terms == 0:
        identity = np.eye(size)
        return _solved(identity + turns, -2.0 * turns).astype(np.float32)
    last = max(terms, 4) if terms >= 3 else terms  # PEFT's loop gives three terms what it gives four
    total, power = np.zeros_like(turns), turns
    for index in range(1, last):
        total += (1.0 if index >= 3 and index == last - 1 else 2.0) * power
        power = power @ turns
    return total.astype(np.float32)


def block_size(elements: int) -> int | None:
    """b of a triangle of b (b - 1) / 2 elements; None when there is none such."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements and size >= 2 else None
