"""Bake a tensor block of rows by block of rows, so that nothing but the result leaves the processor's cache.

A change of low rank makes every weight cheap to compute and dear to move: widening a whole fp16 tensor,
multiplying, adding and narrowing it again wrote sixteen bytes of fresh memory for each two that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import AdapterError
from .base import Rows
from .halves import BLOCK, narrow_into, widen_into


@dataclass
class Size:
    """Sums of squares, over what was baked: of the change, and of the weight before any change."""

    change: float = 0.0
    weight: float = 0.0
    seen: bool = False

    def set(self, change: float, weight: float) -> None:
        """Begin again with these sums."""
        self.change, self.weight, self.seen = change, weight, True

    @property
    def relative(self) -> float:
        """Length of the change over that of the weight; infinity for a change of a weight of zeros."""
        if self.weight > 0:
            return math.sqrt(self.change / self.weight) if self.change < math.inf else math.inf
        return math.inf if self.change > 0 else 0.0


@dataclass(frozen=True)
class Change:
    """One change of a tensor: what fills a block with it, the error for one that is not finite, its size."""

    rows: Rows
    overflow: Callable[[], AdapterError]
    size: Size = field(default_factory=Size)


@dataclass
class Workspace:
    """Arrays that all blocks share; they grow to the widest row."""

    wide: np.ndarray = field(default_factory=lambda: np.empty(BLOCK, np.float32))
    delta: np.ndarray = field(default_factory=lambda: np.empty(BLOCK, np.float32))
    bits: np.ndarray = field(default_factory=lambda: np.empty((2, BLOCK), np.int32))

    def fit(self, size: int) -> None:
        """Make room for blocks of ``size`` elements."""
        if self.wide.size < size:
            self.wide, self.delta = np.empty(size, np.float32), np.empty(size, np.float32)
            self.bits = np.empty((2, size), np.int32)


def bake_blocks(tensor: np.ndarray, changes: Sequence[Change], out: np.ndarray, work: Workspace) -> float:
    """Write ``tensor`` plus all changes into ``out``: summed in float32, cast once.

    Args:
        tensor: the weight, of any floating type; the first axis is the rows.
        changes: in the order in which they are added.
        out: contiguous, of the same shape; may be ``tensor`` itself.
        work: is overwritten.

    Returns:
        The largest magnitude of the new weight, in float32; NaN when one is NaN.

    Raises:
        AdapterError: a change holds NaN or infinity.
    """
    columns = tensor[0].size
    for change in changes:
        change.size.set(0.0, 0.0)
    source, target = np.ascontiguousarray(tensor).reshape(-1), out.reshape(-1)
    work.fit(columns)
    largest = 0.0
    for start, stop in row_blocks(len(tensor), columns):
        span = slice(start * columns, stop * columns)
        wide = _widened(source[span], target[span], work)
        delta = work.delta[: wide.size]
        weight = squared(wide)
        for change in changes:
            block = (stop - start, columns)
            with np.errstate(over="ignore", invalid="ignore"):  # checked by value
                change.rows(start, stop, wide.reshape(block), delta.reshape(block))
            square = squared(delta)
            if not math.isfinite(square):
                raise change.overflow()
            change.size.weight += weight
            change.size.change += square
            np.add(wide, delta, out=wide)
        largest = _larger(largest, _stored(wide, target[span], work))
    return largest


def add_whole(
    weight: np.ndarray, delta: np.ndarray, overflow: Callable[[], AdapterError], size: Size
) -> None:
    """Add a change of a whole float32 weight in place, and measure it.

    Raises:
        AdapterError: what ``overflow`` gives, for a change with NaN or infinity; the weight is then spoilt.
    """
    size.set(0.0, 0.0)
    target, source = weight.reshape(-1), np.ascontiguousarray(delta).reshape(-1)
    for start in range(0, source.size, BLOCK):
        part = source[start : start + BLOCK]
        square = squared(part)
        if not math.isfinite(square):
            raise overflow()
        size.change += square
        target[start : start + BLOCK] += part


def store(wide: np.ndarray, out: np.ndarray, work: Workspace) -> float:
    """Cast a whole float32 tensor into ``out``; returns the largest magnitude as ``bake_blocks`` does."""
    source, target = np.ascontiguousarray(wide).reshape(-1), out.reshape(-1)
    largest = 0.0
    for start in range(0, source.size, BLOCK):
        span = slice(start, start + BLOCK)
        largest = _larger(largest, _stored(source[span], target[span], work))
    return largest


def squared(values: np.ndarray) -> float:
    """Sum of the squares of a float32 array: not finite if, and only if, one of its values is not."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.dot(part, part))
        if not math.isfinite(square):  # of values beyond 1e19, finite though they are
            square = float(np.dot(part.astype(np.float64), part.astype(np.float64)))
        total += square
    return total


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of the blocks in which a weight of this size is worked on."""
    step = max(1, BLOCK // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _widened(block: np.ndarray, target: np.ndarray, work: Workspace) -> np.ndarray:
    """The block in float32: in the work space, or where it belongs if that is float32 too."""
    wide = target if target.dtype == np.float32 else work.wide[: block.size]
    if block.dtype == np.float16:
        widen_into(block, wide)
    else:
        wide[:] = block
    return wide


def _stored(wide: np.ndarray, target: np.ndarray, work: Workspace) -> float:
    if target.dtype == np.float16:
        return narrow_into(wide, target, work.bits)
    largest = max(float(wide.max(initial=0)), -float(wide.min(initial=0)))
    if target is not wide:
        target[:] = wide
    return largest


def _larger(one: float, other: float) -> float:
    return one if other <= one or math.isnan(one) else other  # NaN wins
