"""OFT of PEFT and OneTrainer: rotations of the inputs of a layer, given by triangles of generators.

Formula: Qiu et al. 2025 (OFTv2, arXiv:2506.19847), huggingface/peft and Nerogar/OneTrainer, whose code agrees
on ``y = (x R) W^T`` for linear layers, so W becomes ``W R^T``. Over the columns of a convolution PEFT merges
``W R^T`` too; OneTrainer turns the kernel itself, ``W R``. OneTrainer's scaled form divides the generators:
by the square root of their number where the flag is a whole number (its first builds), else by ``2 sqrt(b -
1)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .rotations import MAX_BLOCK, block_size, neumann
from .updates import by_rows, require

_TERMS = 5


@dataclass(frozen=True)
class InputRotateUpdate:
    """``strength * (W D)`` of the running weight W; D is R - I along the columns, or its transpose."""

    module: ModuleTensors
    size: int
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the blocks, or one block for all, cover the columns."""
        count, columns = self.module.shape("oft_R")[0], math.prod(shape[1:])
        if len(shape) >= 2 and columns % self.size == 0 and count in (1, columns // self.size):
            return None
        return f"of {count} blocks of {self.size} columns"

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of the running weight, turned."""
        terms = _TERMS if self.module.peft_terms is None else self.module.peft_terms
        turns = neumann(self.module.read("oft_R").astype(np.float64) / self._divisor(), self.size, terms)
        if len(shape) == 2 or self.module.peft_terms is not None:
            turns = turns.swapaxes(1, 2)
        turns = turns * np.float32(strength)

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            blocks = running.reshape(stop - start, -1, self.size).swapaxes(0, 1)
            out.reshape(stop - start, -1, self.size)[:] = (blocks @ turns).swapaxes(0, 1)

        return Rows(fill)

    def _divisor(self) -> float:
        if "scaled" not in self.module.keys:
            return 1.0
        whole = self.module.source.infos[self.module.keys["scaled"]].dtype.startswith(("I", "U"))
        return math.sqrt(self.module.shape("oft_R")[1]) if whole else 2 * math.sqrt(self.size - 1)


class InputOftFormat:
    """``oft_R``, the rotation of the inputs."""

    name = "OFT of the inputs"
    suffixes: Mapping[str, str] = {
        ".oft_R.weight": "oft_R",
        ".oft_R.default.weight": "oft_R",
        ".oft_R.scaled_oft": "scaled",
        ".oft_R.default.scaled_oft": "scaled",
    }

    def owns(self, parameters: frozenset[str]) -> bool:
        """The generators, or the flag alone, which is then an incomplete file."""
        return bool(parameters & {"oft_R", "scaled"})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """``oft_R`` (k, b (b - 1) / 2), or (1, ...) for one block everywhere.

        Raises:
            AdapterError: the generators are no triangles, or the blocks are too large.
        """
        require(module, "oft_R")
        shape = module.shape("oft_R")
        size = block_size(shape[1]) if len(shape) == 2 and shape[0] else None
        if size is None or size > MAX_BLOCK:
            raise module.error(
                f"oft_R is {list(shape)}; expected [k, b (b - 1) / 2] with b at most {MAX_BLOCK}"
            )
        return (InputRotateUpdate(module, size),)


INPUT_OFT = InputOftFormat()
