"""One layer of a merge: factors side by side, or the largest singular values of the whole change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import AdapterError
from ..adapters.updates import MAX_RANK, matrix
from ..planned_file import Planned, planned
from ..tensors import DTYPES
from .contributions import Contribution, Layer
from .factors import Budget, Factored, factor, refactor
from .spelling import Dialect
from .storing import number


@dataclass(frozen=True)
class Joined:
    """One layer's tensors; the squared norm of its change and of what is kept. ``rank`` is 0 for a whole
    difference.
    """

    label: str
    rank: int
    exact: bool
    total: float = 0.0
    kept: float = 0.0
    tensors: Mapping[str, Planned] = field(default_factory=dict)


def join(layer: Layer, dialect: Dialect, dtype: str, rank: int | None) -> Joined:
    """Merge one layer.

    Factors are put side by side when that fits into ``rank``; their scales go into alpha where they agree,
    else into ``up``. Else the change, or the product of all factors, is cut to ``rank``.

    Raises:
        AdapterError: the change overflows, or has more ranks than a file may have.
    """
    if layer.parameter == "bias" or len(layer.shape) == 1:
        return _whole(layer, dialect)
    if all(one.low_rank for one in layer.contributions):
        ranks = sum(one.low_rank.rank for one in layer.contributions if one.low_rank)
        if rank is None or ranks <= rank:
            return _side_by_side(layer, dialect, dtype, ranks)
        up, down = _products(layer.contributions, 1.0)
        made = refactor(up, down, Budget(rank=rank))
    else:
        made = factor(matrix(layer.change()), Budget(rank=rank), exact=True)
    tensors = _named(layer, dialect, made.up, made.down, float(made.rank), dtype)
    kept = made.total - _lost(layer, made, dtype)
    return Joined(layer.label, made.rank, False, made.total, kept, tensors)


def _side_by_side(layer: Layer, dialect: Dialect, dtype: str, rank: int) -> Joined:
    if rank > MAX_RANK:
        raise AdapterError(
            f"{layer.label}: the adapters have {rank} ranks together, a file may have {MAX_RANK}; cut them "
            f"with --rank N"
        )
    # One magnitude for all goes into alpha, so that factors are copied; else the first one does, and the
    # others are multiplied by what they differ.
    common = abs(layer.contributions[0].scale)
    up, down = _products(layer.contributions, common)
    tensors = _named(layer, dialect, up, down, rank * common, dtype)
    stored = [value.astype(DTYPES[dtype]).astype(np.float32) for value in (up, down)]
    same = np.array_equal(stored[0], up) and np.array_equal(stored[1], down)
    total = _squared(up, down) * common**2
    made = Factored(up, down, total, total)
    lost = 0.0 if same else _lost(layer, made, dtype, common)
    return Joined(layer.label, rank, lost <= 1e-12 * total, total, total - lost, tensors)


def _products(ones: tuple[Contribution, ...], common: float) -> tuple[np.ndarray, np.ndarray]:
    """All ``up``, times the scales over ``common``, and all ``down``, side by side."""
    ups, downs = [], []
    for one in ones:
        up, down = one.factors()
        with np.errstate(over="ignore"):  # checked below
            ups.append(up * np.float32(one.scale / common))
        downs.append(down)
    up = np.ascontiguousarray(np.concatenate(ups, axis=1))
    if not np.isfinite(up).all():
        raise AdapterError(f"{ones[0].label}: the change overflows float32 at these strengths")
    return up, np.ascontiguousarray(np.concatenate(downs))


def _squared(up: np.ndarray, down: np.ndarray) -> float:
    """``|up @ down|^2`` without the product."""
    left, right = up.astype(np.float64), down.astype(np.float64)
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _lost(layer: Layer, made: Factored, dtype: str, common: float = 1.0) -> float:
    """The squared distance of what is stored from the change that was to be kept."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused when it is written
        up, down = (value.astype(DTYPES[dtype]).astype(np.float64) for value in (made.up, made.down))
        rounding = _difference(up, down, made) * common**2
    return (made.total - made.kept) + rounding


def _difference(up: np.ndarray, down: np.ndarray, made: Factored) -> float:
    """``|up @ down - made.up @ made.down|^2`` without either product."""
    stacked = np.concatenate([up - made.up, made.up.astype(np.float64)], axis=1)
    below = np.concatenate([down, down - made.down])
    return max(float(np.sum((stacked.T @ stacked) * (below @ below.T))), 0.0)


def _named(
    layer: Layer, dialect: Dialect, up: np.ndarray, down: np.ndarray, alpha: float, dtype: str
) -> dict[str, Planned]:
    down = down.reshape(len(down), *layer.shape[1:])
    up = up.reshape(*up.shape, *(1,) * len(layer.shape[2:]))
    where = layer.network, layer.module
    return {
        dialect.key(*where, "down"): planned(down, dtype),
        dialect.key(*where, "up"): planned(up, dtype),
        dialect.key(*where, "alpha"): number(alpha),
    }


def _whole(layer: Layer, dialect: Dialect) -> Joined:
    """The difference of a bias or of a norm, as it is."""
    change = layer.change().reshape(-1)
    norm = "norm" in layer.module.rsplit(".", 1)[-1]
    names = {"weight": "w_norm" if norm else "diff", "bias": "b_norm" if norm else "diff_b"}
    total = float(np.vdot(change.astype(np.float64), change.astype(np.float64)))
    key = dialect.key(layer.network, layer.module, names[layer.parameter])
    return Joined(layer.label, 0, True, total, total, {key: planned(change, "F32")})
