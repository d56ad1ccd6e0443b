"""Whole differences and whole values: of weights, of biases, of normalisations.

Names of KohakuBlueleaf/LyCORIS (``diff``, ``diff_b``, ``w_norm``, ``b_norm``) and of ComfyUI
(``set_weight``). None of them has an alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .updates import AddUpdate, Stored, by_rows, fits, matrix


@dataclass(frozen=True)
class SetUpdate:
    """``strength * (value - W)``: at strength 1 the running weight W becomes the value."""

    module: ModuleTensors
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the value has the shape of the weight."""
        own = self.module.shape("set_weight")
        return None if fits(own, shape) else str(list(own))

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The way from the running weight to the value."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of that."""
        value, factor = matrix(self.module.read("set_weight")), np.float32(strength)

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            np.subtract(value[start:stop], running, out=out)
            np.multiply(out, factor, out=out)

        return Rows(fill)


@dataclass(frozen=True)
class DifferenceFormat:
    """Tensors that are added to the weight, and tensors that are added to the bias, as they are."""

    name: str
    weight: str
    bias: str

    @property
    def suffixes(self) -> Mapping[str, str]:
        """The two names behind a dot."""
        return {f".{self.weight}": self.weight, f".{self.bias}": self.bias}

    def owns(self, parameters: frozenset[str]) -> bool:
        """Either may stand alone."""
        return bool(parameters & {self.weight, self.bias})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """An update for each of the two that is there.

        Raises:
            AdapterError: one is empty.
        """
        pairs = ((self.weight, "weight"), (self.bias, "bias"))
        found = [(name, parameter) for name, parameter in pairs if name in module.keys]
        for name, _ in found:
            if not module.shape(name) or 0 in module.shape(name):
                raise module.error(
                    f"its {name} is {list(module.shape(name))}; expected the shape of a weight"
                )
        return tuple(AddUpdate(Stored(module, name), parameter) for name, parameter in found)


class SetFormat:
    """ComfyUI's ``set_weight``."""

    name = "set weight"
    suffixes: Mapping[str, str] = {".set_weight": "set_weight"}

    def owns(self, parameters: frozenset[str]) -> bool:
        """Its only tensor."""
        return "set_weight" in parameters

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """The one update."""
        return (SetUpdate(module),)


DIFFERENCE = DifferenceFormat("full difference", "diff", "diff_b")
NORM = DifferenceFormat("norm difference", "w_norm", "b_norm")
SET = SetFormat()
