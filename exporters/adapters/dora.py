"""DoRA: the direction of the changed weight, with a length of its own for each input or output feature.

Formula: Liu et al. 2024 (arXiv:2402.09353), over the running weight W: ``V = W + change``, and each feature
of V gets the stored length. For strengths other than 1 the readers differ; as in stable-diffusion-webui from
1.10 on, ComfyUI, SD.Next and InvokeAI the way from W to that result is scaled, so strength 0 is the weight
itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import AdapterFormat, ModuleTensors, Rows, WeightUpdate
from .blocks import row_blocks
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .sparse import SPARSE
from .updates import Addend, AddUpdate, SumUpdate, by_rows, matrix, summed

_LENGTHS = ("dora_scale", "magnitude")


@dataclass(frozen=True)
class DecomposedUpdate:
    """``strength * (V * lengths / |V| - W)``, the norm over all of V but the axis of the lengths."""

    module: ModuleTensors
    changes: tuple[Addend, ...]
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when every change has the shape of the weight, and there is a length for each feature."""
        misfit = SumUpdate(self.changes).misfit(shape)
        if misfit is not None:
            return misfit
        if len(shape) >= 2 and self._axis(shape) is not None:
            return None
        return f"of the lengths {self.module.listed(*_LENGTHS)}"

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        if self._axis(weight.shape) == 0:
            return by_rows(self, weight, strength)
        out = np.empty(weight.shape, np.float32)
        sum_of = summed(self.changes, weight.shape)
        running, total = matrix(weight), out.reshape(len(out), -1)
        squares = np.zeros(weight.shape[1], np.float64)
        kernel = math.prod(weight.shape[2:])
        for start, stop in row_blocks(*total.shape):
            block = total[start:stop]
            sum_of(start, stop, block)
            block += running[start:stop]
            cube = block.reshape(stop - start, weight.shape[1], kernel)
            squares += np.einsum("oik,oik->i", cube, cube, dtype=np.float64)
        factors = np.repeat(_factors(self._lengths(), squares), kernel)
        for start, stop in row_blocks(*total.shape):
            block = total[start:stop]
            block *= factors
            block -= running[start:stop]
            block *= np.float32(strength)
        return out

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows | None:
        """Rows for lengths of the outputs; those of the inputs need the norm of whole columns first."""
        if self._axis(shape) != 0:
            return None
        lengths, sum_of, factor = self._lengths(), summed(self.changes, shape), np.float32(strength)

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            sum_of(start, stop, out)
            out += running
            squares = np.einsum("oi,oi->o", out, out, dtype=np.float64)
            out *= _factors(lengths[start:stop], squares)[:, None]
            out -= running
            out *= factor

        return fill

    def _lengths(self) -> np.ndarray:
        name = next(name for name in _LENGTHS if name in self.module.keys)
        return self.module.read(name).reshape(-1)

    def _axis(self, shape: tuple[int, ...]) -> int | None:
        """0 for lengths of the outputs, 1 for those of the inputs, None when their number is neither's.

        (1, I) is of the inputs and (O, 1) of the outputs. PEFT's magnitude vector is of the outputs. A bare
        vector is of the outputs if only they have its length, as SD.Next reads it.
        """
        name = next(name for name in _LENGTHS if name in self.module.keys)
        own = self.module.shape(name)
        count = math.prod(own)
        if name == "magnitude":
            return 0 if count == shape[0] else None
        by_shape = 1 if len(own) == 1 or (len(own) >= 2 and own[0] == 1) else 0
        return next((axis for axis in (by_shape, 1 - by_shape) if shape[axis] == count), None)


def _factors(lengths: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """``lengths / sqrt(squares)`` in float32; 1 where the vector is zero and has no direction."""
    norms = np.sqrt(squares)
    safe = np.where(norms > 0, norms, 1.0)
    return np.where(norms > 0, lengths / safe, 1.0).astype(np.float32)


class DoraFormat:
    """DoRA over LoRA, LoHa or LoKr, with a sparse remainder where there is one."""

    name = "DoRA"
    suffixes: Mapping[str, str] = {
        ".dora_scale": "dora_scale",
        ".lora_magnitude_vector": "magnitude",
        ".magnitude": "magnitude",  # ai-toolkit
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude",
    }
    over: tuple[AdapterFormat, ...] = (LORA, LOHA, LOKR, SPARSE)

    def owns(self, parameters: frozenset[str]) -> bool:
        """Lengths make it a DoRA, whatever gives the direction."""
        return bool(parameters & set(_LENGTHS))

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """The decomposed weight, and what the formats under it do to the bias.

        Raises:
            AdapterError: no change, or one that is no sum; no lengths or both kinds; or as those formats.
        """
        if all(name in module.keys for name in _LENGTHS):
            raise module.error("has both dora_scale and lora_magnitude_vector")
        name = next(name for name in _LENGTHS if name in module.keys)
        shape = module.shape(name)
        if not shape or 0 in shape or max(shape) != math.prod(shape):
            raise module.error(f"its {name} is {list(shape)}; expected a length for each feature")
        present = frozenset(module.keys)
        inner = [u for form in self.over if form.owns(present) for u in form.updates(module)]
        changes = tuple(u.change for u in inner if isinstance(u, AddUpdate) and u.parameter == "weight")
        if not changes:
            raise module.error(f"has {name} but no change that it could give a length to")
        others = tuple(u for u in inner if u.parameter != "weight")
        return (DecomposedUpdate(module, changes), *others)


DORA = DoraFormat()
