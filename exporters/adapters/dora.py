"""DoRA: the direction of the changed weight, with a length of its own for each input or output feature.

Formula: Liu et al. 2024 (arXiv:2402.09353), over the running weight W: ``V = W + change``, and each feature
of V gets the stored length. For strengths other than 1 the readers differ; as in stable-diffusion-webui from
1.10 on, ComfyUI, SD.Next and InvokeAI the way from W to that result is scaled, so strength 0 is the weight
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from .base import AdapterFormat, ModuleTensors, Rows, WeightUpdate
from .blocks import Spare
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .sparse import SPARSE
from .updates import Addend, AddUpdate, Fill, SumUpdate, by_rows, summed

_LENGTHS = ("dora_scale", "magnitude")
_LEAST = 1e-30  # a sum of squares below this may have lost some to float32's smallest numbers


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
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows; for lengths of the inputs the squares of whole columns are summed first."""
        lengths, sum_of, factor = self._lengths(), summed(self.changes, shape), np.float32(strength)
        look, factors = None, _of_outputs(lengths)
        if self._axis(shape) == 1:
            look, factors = _of_inputs(lengths, shape, sum_of)

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            sum_of(start, stop, out)
            out += running
            out *= factors(start, stop, out)
            out -= running
            out *= factor

        return Rows(fill, look=look)

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


def _of_outputs(lengths: np.ndarray) -> Callable[[int, int, np.ndarray], np.ndarray]:
    """What gives the factors of some rows of V from these rows."""

    def factors(start: int, stop: int, total: np.ndarray) -> np.ndarray:
        sums = np.vecdot(total, total)
        if not _is_safe(sums):
            sums = np.square(total, dtype=np.float64).sum(axis=1)
        return _factors(lengths[start:stop], sums.astype(np.float64))[:, None]

    return factors


def _of_inputs(
    lengths: np.ndarray, shape: tuple[int, ...], sum_of: Fill
) -> tuple[Callable[[int, int, np.ndarray], None], Callable[[int, int, np.ndarray], np.ndarray]]:
    """What sums the squares of V's columns, and what gives their factors once all rows have been seen."""
    kernel = math.prod(shape[2:])
    squares, total_of, square_of = np.zeros(shape[1] * kernel), Spare(), Spare()

    def look(start: int, stop: int, running: np.ndarray) -> None:
        total, square = total_of.like(running.shape), square_of.like(running.shape)
        sum_of(start, stop, total)
        total += running
        sums = np.ones(len(total), np.float32) @ np.square(total, out=square)
        squares[:] += sums if _is_safe(sums) else np.square(total, dtype=np.float64).sum(axis=0)

    @cache
    def found() -> np.ndarray:
        return np.repeat(_factors(lengths, squares.reshape(shape[1], kernel).sum(axis=1)), kernel)

    return look, lambda start, stop, total: found()


def _is_safe(sums: np.ndarray) -> bool:
    """Whether sums of squares are right in float32, which is many times as fast: none leaves its range."""
    return bool(((sums > _LEAST) & (sums < math.inf)).all())


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
