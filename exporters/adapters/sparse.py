"""The sparse remainder that LyCORIS's extraction leaves beside a LoRA: what its rank could not hold.

``bias_indices`` (axes, n), ``bias_values`` (n,) and ``bias_size`` are a tensor of the weight's shape in
coordinates; it is not a bias. It is summed with the LoRA's product before that is scaled, as in
stable-diffusion-webui.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, WeightUpdate
from .updates import AddUpdate, Fill, require, scale_of

_PARTS = ("bias_indices", "bias_values", "bias_size")


@dataclass(frozen=True)
class Scattered:
    """A change that is zero but for the values given."""

    module: ModuleTensors
    scale: float
    shape: tuple[int, ...]

    def fill(self, factor: float) -> Fill:
        """Rows of zeros with the values among them; those of one place are summed."""
        indices = self.module.integers("bias_indices")
        rows = indices[0]
        columns = np.ravel_multi_index(tuple(indices[1:]), self.shape[1:])
        order = np.argsort(rows, kind="stable")
        rows, columns = rows[order], columns[order]
        values = self.module.read("bias_values").reshape(-1)[order] * np.float32(factor)

        def fill(start: int, stop: int, out: np.ndarray) -> None:
            low, high = np.searchsorted(rows, (start, stop))
            out[:] = 0.0
            np.add.at(out, (rows[low:high] - start, columns[low:high]), values[low:high])

        return fill


class SparseFormat:
    """The sparse remainder, alone or beside a LoRA."""

    name = "sparse remainder"
    suffixes: Mapping[str, str] = {f".{name}": name for name in _PARTS}

    def owns(self, parameters: frozenset[str]) -> bool:
        """Any of its three tensors."""
        return bool(parameters & set(_PARTS))

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """The one update.

        Raises:
            AdapterError: a tensor is missing, or an index lies outside of the weight.
        """
        require(module, *_PARTS)
        shape = tuple(int(n) for n in module.integers("bias_size").reshape(-1))
        indices, count = module.integers("bias_indices"), math.prod(module.shape("bias_values"))
        fits = len(shape) in (2, 4) and 0 not in shape and indices.shape == (len(shape), count)
        if not fits or (count and (indices.max(axis=1) >= np.array(shape)).any()):
            raise module.error(
                f"its parts contradict each other: {module.listed(*_PARTS)}, size {list(shape)}"
            )
        down = module.shape("down") if "down" in module.keys else ()
        scale = scale_of(module, down[0]) if down and down[0] else 1.0
        return (AddUpdate(Scattered(module, scale, shape)),)


SPARSE = SparseFormat()
