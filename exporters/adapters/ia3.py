"""IA3: a factor for each input or output feature of a layer.

Formula: Liu et al. 2022 (arXiv:2205.05638) as KohakuBlueleaf/LyCORIS merges it, ``W' = W (1 + strength w)``.
The bias is left alone: only LyCORIS's bypass mode, which no file records, scales it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .updates import by_rows, require


@dataclass(frozen=True)
class FactorUpdate:
    """``strength * w * W``, w along the inputs or along the outputs of the running weight W."""

    module: ModuleTensors
    on_input: bool
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when there is a factor for each feature of one side."""
        if len(shape) >= 2 and self._axis(shape) is not None:
            return None
        return f"of {math.prod(self.module.shape('weight'))} factors"

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of the running weight, each value times its factor."""
        factors = self.module.read("weight").reshape(-1) * np.float32(strength)
        kernel = math.prod(shape[2:])
        along_inputs = self._axis(shape) == 1
        columns = np.repeat(factors, kernel) if along_inputs else factors

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            np.multiply(running, columns if along_inputs else columns[start:stop, None], out=out)

        return Rows(fill)

    def _axis(self, shape: tuple[int, ...]) -> int | None:
        """The axis of the factors: the one that the file says, unless only the other has their number.

        Some versions of LyCORIS always wrote on_input 0 (its issue 187).
        """
        count, said = math.prod(self.module.shape("weight")), int(self.on_input)
        return next((axis for axis in (said, 1 - said) if shape[axis] == count), None)


class Ia3Format:
    """IA3 of LyCORIS; that of PEFT has names and a meaning of its own."""

    name = "IA3"
    suffixes: Mapping[str, str] = {".weight": "weight", ".on_input": "on_input"}

    def owns(self, parameters: frozenset[str]) -> bool:
        """``on_input`` alone makes it one: every layer of a checkpoint has a ``weight``."""
        return "on_input" in parameters

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """``weight`` (n,) or (1, n, 1, 1), ``on_input`` 0 or 1.

        Raises:
            AdapterError: the factors are missing or no vector, or on_input is neither 0 nor 1.
        """
        require(module, "weight", "on_input")
        shape, side = module.shape("weight"), module.scalar("on_input")
        if not shape or max(shape) != math.prod(shape) or math.prod(shape) == 0:
            raise module.error(f"its factors are {list(shape)}; expected a vector")
        if side not in (0.0, 1.0):
            raise module.error(f"on_input is {side:g}; expected 0 or 1")
        return (FactorUpdate(module, side == 1.0),)


IA3 = Ia3Format()
