"""BOFT: rotations of the outputs in several stages, whose blocks lie ever further apart, like a butterfly.

Formula: Liu et al. 2023 (arXiv:2311.06243) as written by KohakuBlueleaf/LyCORIS. Stage i gathers the rows
``(c g j) -> (c j g)`` with g = 2 and j = 2^i b / 2, turns each b of them by R (not by its transpose, as OFT
does), and puts them back. The strength acts on every stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .halves import BLOCK
from .rotations import cayley, turned_rows
from .updates import by_rows

MAX_STAGES = 16
# Up to so many rows, one product with a matrix is faster than stage after stage.
_JOINED = 256


@dataclass(frozen=True)
class ButterflyUpdate:
    """``rescale * R_m ... R_1 W - W`` of the running weight W; the strength draws every R to the identity."""

    module: ModuleTensors
    name: str
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the blocks cover the rows, the last stage fits, and rescale has a factor for each."""
        stages, count, size, _ = self.module.shape(self.name)
        outputs = count * size
        rescale = math.prod(self.module.shape("rescale")) if "rescale" in self.module.keys else outputs
        whole = size % 2 == 0 and outputs % (2 ** (stages - 1) * size) == 0
        if len(shape) >= 2 and shape[0] == outputs == rescale and whole:
            return None
        return f"of {stages} stages of {count} blocks of {size} rows and {rescale} factors"

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of as many as meet in the stages."""
        blocks = self.module.read(self.name)
        alpha = self.module.scalar("alpha") if "alpha" in self.module.keys else 0.0
        turns = cayley(blocks, alpha * shape[0] if alpha > 0 else None) * np.float32(strength)
        stages, _, size, _ = turns.shape
        meeting = 2 ** (stages - 1) * size
        factors = np.ones((shape[0], 1), np.float32)
        if "rescale" in self.module.keys:
            # At strength 1 LyCORIS's; it leaves the factors at full strength for every other.
            factors += np.float32(strength) * (self.module.read("rescale").reshape(-1, 1) - 1)
        if meeting <= _JOINED:
            # All stages of the identity are one matrix for each block of rows that meet.
            identity = np.tile(np.eye(meeting), (shape[0] // meeting, 1))
            joined = _turned(identity, turns, factors) - identity
            return turned_rows(joined.astype(np.float32).reshape(-1, meeting, meeting))

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            some, own = turns[:, start // size : stop // size], factors[start:stop]
            # Columns do not meet, so they are turned a few at a time, which stay in the processor's cache.
            step = max(128, BLOCK // len(running))
            for first in range(0, running.shape[1], step):
                columns = np.ascontiguousarray(running[:, first : first + step])
                np.subtract(_turned(columns, some, own), columns, out=out[:, first : first + step])

        return Rows(fill, meeting)


def _turned(rows: np.ndarray, turns: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Rows after all stages, times their factors."""
    size, turned = turns.shape[-1], rows
    for stage, turn in enumerate(turns):
        apart = 2**stage * size // 2
        gathered = np.ascontiguousarray(_swap(turned, 2, apart)).reshape(-1, size, rows.shape[1])
        gathered = gathered + turn @ gathered  # not in place: it may still be what was given
        turned = np.ascontiguousarray(_swap(gathered.reshape(rows.shape), apart, 2)).reshape(rows.shape)
    return turned * factors


def _swap(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Rows ``(c outer inner)`` in the order ``(c inner outer)``."""
    return rows.reshape(-1, outer, inner, rows.shape[1]).swapaxes(1, 2)


class BoftFormat:
    """BOFT; its tensors have the names of OFT's and one axis more, so OFT hands them over."""

    name = "BOFT"

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """``oft_blocks`` (stages, k, b, b), ``alpha`` the constraint, ``rescale`` (O, 1[, 1, 1]).

        Raises:
            AdapterError: more stages than there are powers of two in any layer.
        """
        name = "oft_blocks" if "oft_blocks" in module.keys else "oft_diag"
        stages = module.shape(name)[0]
        if name == "oft_diag" or stages > MAX_STAGES:
            raise module.error(f"has {stages} stages of {name}; expected up to {MAX_STAGES} of oft_blocks")
        return (ButterflyUpdate(module, name),)


BOFT = BoftFormat()
