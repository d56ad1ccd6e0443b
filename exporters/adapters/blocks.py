"""Bake a tensor block of rows by block of rows, so that nothing but the result leaves the processor's cache.

A change of low rank makes every weight cheap to compute and dear to move: widening a whole fp16 tensor,
multiplying, adding and narrowing it again wrote sixteen bytes of fresh memory for each two that are stored.
What is done to a block is a row of stages; a stage that needs more rows at once than the others gets them
without taking from those the blocks that fit into the cache.
"""

from __future__ import annotations

import math
import threading
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


class Spare:
    """Memory for float32 values that is used again for each block; it grows to the largest."""

    def __init__(self, size: int = 0) -> None:
        self._held = np.empty(size, np.float32)

    def like(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of ``shape`` with anything in it; the one that was given before is lost."""
        size = math.prod(shape)
        if self._held.size < size:
            self._held = np.empty(0, np.float32)  # given back first: two would be in memory
            self._held = np.empty(size, np.float32)
        return self._held[:size].reshape(shape)


class Workspace(threading.local):
    """Arrays that all blocks share, each thread having its own."""

    def __init__(self) -> None:
        self.wide, self.delta = Spare(BLOCK), Spare(BLOCK)
        self.bits = np.empty((2, BLOCK), np.int32)


@dataclass(frozen=True)
class _Stage:
    """What is done to each block: to how many rows at once, and whether all before it must be done first.

    ``act(start, stop, wide)`` is given the numbers of the rows and their running values, flat.
    """

    act: Callable[[int, int, np.ndarray], None]
    together: int = 1
    waits: bool = False


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
    for change in changes:
        change.size.set(0.0, 0.0)
    if not tensor.size:
        return 0.0
    rows, columns = len(tensor), math.prod(tensor.shape[1:])
    source, target = np.ascontiguousarray(tensor).reshape(-1), out.reshape(-1)
    weight = largest = 0.0

    def begin(start: int, stop: int, wide: np.ndarray) -> None:
        nonlocal weight
        _widen(source[start * columns : stop * columns], wide)
        weight += squared(wide)

    def end(start: int, stop: int, wide: np.ndarray) -> None:
        nonlocal largest
        largest = _larger(largest, _stored(wide, target[start * columns : stop * columns], work))

    stages = [_Stage(begin), *(s for c in changes for s in _stages(c, columns, work)), _Stage(end)]
    runs = _runs(stages)
    together = rows if any(s.waits for s in stages) else math.lcm(*(s.together for s in stages))
    with np.errstate(over="ignore", invalid="ignore"):  # checked by value
        for start, stop in row_blocks(rows, columns, together):
            # Where the result is float32 too, the sum is made where it belongs.
            direct = target.dtype == np.float32
            block = slice(start * columns, stop * columns)
            wide = target[block] if direct else work.wide.like((block.stop - block.start,))
            for run in runs:
                for low, high in row_blocks(stop - start, columns, run[0].together):
                    for stage in run:
                        stage.act(start + low, start + high, wide[low * columns : high * columns])
    for change in changes:
        change.size.weight = weight
    return largest


def _stages(change: Change, columns: int, work: Workspace) -> Iterator[_Stage]:
    """One change: the look at the weight that it may need, and its addition."""
    rows = change.rows

    def look(start: int, stop: int, wide: np.ndarray) -> None:
        assert rows.look is not None
        rows.look(start, stop, wide.reshape(stop - start, columns))

    def add(start: int, stop: int, wide: np.ndarray) -> None:
        delta = work.delta.like((stop - start, columns))
        rows.fill(start, stop, wide.reshape(delta.shape), delta)
        square = squared(delta)
        if not math.isfinite(square):
            raise change.overflow()
        change.size.change += square
        np.add(wide, delta.reshape(-1), out=wide)

    if rows.look is not None:
        yield _Stage(look)
    yield _Stage(add, rows.together, waits=rows.look is not None)


def _runs(stages: Sequence[_Stage]) -> list[list[_Stage]]:
    """Stages that go over the same blocks one directly after the other, while those are in the cache."""
    runs: list[list[_Stage]] = []
    for stage in stages:
        if not runs or stage.waits or stage.together != runs[-1][0].together:
            runs.append([])
        runs[-1].append(stage)
    return runs


def squared(values: np.ndarray) -> float:
    """Sum of the squares of a float32 array: not finite if, and only if, one of its values is not."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        square = float(np.dot(part, part))
        if not math.isfinite(square):  # of values beyond 1e19, finite though they are
            square = float(np.dot(part.astype(np.float64), part.astype(np.float64)))
        total += square
    return total


def row_blocks(rows: int, columns: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """Starts and stops of the blocks in which a weight of this size is worked on.

    They begin at multiples of ``together``.
    """
    step = max(1, BLOCK // max(1, columns * together)) * together
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _widen(block: np.ndarray, wide: np.ndarray) -> None:
    """Write the block in float32."""
    if block.dtype == np.float16:
        for start in range(0, block.size, BLOCK):  # one row may be longer
            widen_into(block[start : start + BLOCK], wide[start : start + BLOCK])
    else:
        wide[:] = block


def _stored(wide: np.ndarray, target: np.ndarray, work: Workspace) -> float:
    """Cast the block into ``target``; its largest magnitude."""
    if target.dtype == np.float16:
        largest = 0.0
        for start in range(0, wide.size, BLOCK):
            part = slice(start, start + BLOCK)
            largest = _larger(largest, narrow_into(wide[part], target[part], work.bits))
        return largest
    if target.dtype != np.float32:  # else it is where it belongs
        target[:] = wide
    return max(float(wide.max(initial=0)), -float(wide.min(initial=0)))


def _larger(one: float, other: float) -> float:
    return one if other <= one or math.isnan(one) else other  # NaN wins
