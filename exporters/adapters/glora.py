"""GLoRA: a change of low rank of the weight by itself, and one beside it.

Formula: Chavan et al. 2023 (arXiv:2306.07967) as KohakuBlueleaf/LyCORIS writes it, ``W' = W + s (W A + B)``.
Its first files (June to October 2023) name the two factors of each product the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .blocks import Spare
from .updates import by_rows, check_rank, matrix, require, scale_of, trimmed

_FACTORS = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True)
class SelfUpdate:
    """``strength * scale * (W a_left a_right + b_left b_right)`` of the running weight W."""

    module: ModuleTensors
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the factors fit a weight of this shape in exactly one of the two layouts."""
        layouts = self._layouts(shape)
        if len(layouts) == 1:
            return None
        both = ", which could be either of two layouts" if layouts else ""
        return f"of the factors {self.module.listed(*_FACTORS, 'bm')}{both}"

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of both products."""
        names = self._layouts(shape)[0]
        left, right, own = (_two_axes(self.module.read(name)) for name in names[:3])
        other = self.module.read(names[3])
        if "bm" in self.module.keys:
            other = np.einsum("abhw,bi->aihw", self.module.read("bm"), matrix(other), optimize=True)
        other = matrix(other)
        factor = np.float32(scale_of(self.module, left.shape[1]) * strength)
        left, own = left * factor, own * factor
        kernel = math.prod(shape[2:])
        both, spare = np.concatenate([other, right]) if kernel == 1 else right, Spare()

        def linear(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            np.matmul(np.concatenate([own[start:stop], running @ left], axis=1), both, out=out)

        def convolution(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            np.matmul(own[start:stop], other, out=out)
            # Each row is a matrix of inputs by kernel, which is turned from its left: nothing is transposed.
            weight = running.reshape(stop - start, shape[1], kernel)
            product = np.matmul(right.T, left.T @ weight, out=spare.like(weight.shape))
            np.add(out, product.reshape(out.shape), out=out)

        return Rows(linear if kernel == 1 else convolution)

    def _layouts(self, shape: tuple[int, ...]) -> list[tuple[str, str, str, str]]:
        """The orders of the names in which the factors fit: A's left and right, B's left and right."""
        if len(shape) not in (2, 4):
            return []
        sizes = {name: trimmed(self.module.shape(name)) for name in _FACTORS}
        core = self.module.shape("bm") if "bm" in self.module.keys else None
        kernel = trimmed(shape)[2:]
        found = []
        for names in (("a1", "a2", "b1", "b2"), ("a2", "a1", "b2", "b1")):
            left, right, own, other = (sizes[name] for name in names)
            if any(len(size) != 2 for size in (left, right, own)) or len(other) < 2:
                continue
            rank, inner = left[1], other[0]
            product = kernel if core is None else ()
            spread = core is None or (len(core) == 4 and core[1] == inner and trimmed(core)[2:] == kernel)
            fits = left == (shape[1], rank) and right == (rank, shape[1]) and spread
            fits = (
                fits and own == (shape[0], core[0] if core else inner) and other[1:] == (shape[1], *product)
            )
            if fits:
                found.append(names)
        return found


def _two_axes(value: np.ndarray) -> np.ndarray:
    """A factor without its kernel of one."""
    return value.reshape(value.shape[:2])


class GloraFormat:
    """GLoRA in its new and its old layout."""

    name = "GLoRA"
    suffixes: Mapping[str, str] = {
        **{f".{name}.weight": name for name in (*_FACTORS, "bm")},
        ".alpha": "alpha",
        ".scale": "scale",
    }

    def owns(self, parameters: frozenset[str]) -> bool:
        """Any factor makes it a GLoRA."""
        return bool(parameters & {*_FACTORS, "bm"})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """New: a1 (I, r), a2 (r, I), b1 (O, r), b2 (r, I[, kh, kw]), bm (r, r, kh, kw). Old: 1 and 2 swapped.

        Raises:
            AdapterError: a factor is missing, empty or of too many ranks.
        """
        require(module, *_FACTORS)
        for name in (*_FACTORS, *(("bm",) if "bm" in module.keys else ())):
            shape = module.shape(name)
            if len(shape) not in (2, 4) or 0 in shape:
                raise module.error(f"its factors cannot be multiplied: {module.listed(*_FACTORS, 'bm')}")
        check_rank(module, min(module.shape("a1")[:2]))
        scale_of(module, 1)  # an alpha that is no number is an error now, not while baking
        return (SelfUpdate(module),)


GLORA = GloraFormat()
