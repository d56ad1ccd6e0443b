"""LoHa: the elementwise product of two changes of low rank.

Formulas: FedPara (Hyeon-Woo et al. 2021, arXiv:2108.06098) as written by KohakuBlueleaf/LyCORIS, with its
Tucker form for convolutions (``hada_t1``, ``hada_t2``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, WeightUpdate
from .blocks import Spare
from .updates import AddUpdate, Fill, check_rank, matrix, require, scale_of

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class Hadamard:
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``, each half with a core between its factors in the Tucker form."""

    module: ModuleTensors
    scale: float
    shape: tuple[int, ...]

    def fill(self, factor: float) -> Fill:
        """Rows of both halves, multiplied."""
        left1, right1 = self._half(1)
        left1 = left1 * np.float32(factor)
        left2, right2 = self._half(2)
        spare = Spare()

        def fill(start: int, stop: int, out: np.ndarray) -> None:
            np.matmul(left1[start:stop], right1, out=out)
            other = np.matmul(left2[start:stop], right2, out=spare.like(out.shape))
            np.multiply(out, other, out=out)

        return fill

    def _half(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Two matrices whose product is one half: (O, r) and (r, columns)."""
        left, right = self.module.read(f"hada_w{number}_a"), self.module.read(f"hada_w{number}_b")
        if "hada_t1" not in self.module.keys:
            return matrix(left), matrix(right)
        # half[p,q,k,l] = sum_ij core[i,j,k,l] left[i,p] right[j,q]
        core = np.einsum("ijkl,jq->iqkl", self.module.read(f"hada_t{number}"), right, optimize=True)
        return np.ascontiguousarray(left.T), matrix(core)


class LohaFormat:
    """LoHa, plain and Tucker."""

    name = "LoHa"
    suffixes: Mapping[str, str] = {
        **{f".{name}": name for name in (*_FACTORS, *_CORES)},
        ".alpha": "alpha",
        ".scale": "scale",
    }

    def owns(self, parameters: frozenset[str]) -> bool:
        """Any factor makes it a LoHa; what is missing is said by ``updates``."""
        return bool(parameters & {*_FACTORS, *_CORES})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """Plain: ``w*_a`` (O, r), ``w*_b`` (r, I kh kw). Tucker: (r, O), (r, I), cores (r, r, kh, kw).

        Raises:
            AdapterError: a factor is missing, or they do not fit each other.
        """
        tucker = bool(set(_CORES) & module.keys.keys())
        require(module, *_FACTORS, *(_CORES if tucker else ()))
        shapes = [_half_shape(module, number, tucker) for number in (1, 2)]
        if None in shapes or shapes[0] != shapes[1]:
            listed = module.listed(*_FACTORS, *_CORES)
            raise module.error(f"its factors cannot be multiplied: {listed}; expected w_a [O, r], w_b [r, I]")
        rank = check_rank(module, module.shape("hada_w1_b")[0])
        check_rank(module, module.shape("hada_w2_b")[0])
        shape = shapes[0]
        assert shape is not None
        return (AddUpdate(Hadamard(module, scale_of(module, rank), shape)),)


def _half_shape(module: ModuleTensors, number: int, tucker: bool) -> tuple[int, ...] | None:
    """Shape of one half, or None when its factors cannot be multiplied."""
    left, right = module.shape(f"hada_w{number}_a"), module.shape(f"hada_w{number}_b")
    if len(left) != 2 or len(right) < 2 or 0 in (*left, *right):
        return None
    if not tucker:
        return (left[0], *right[1:]) if left[1] == right[0] else None
    core = module.shape(f"hada_t{number}")
    fits = len(core) == 4 and 0 not in core and len(right) == 2 and core[:2] == (left[0], right[0])
    return (left[1], right[1], *core[2:]) if fits else None


LOHA = LohaFormat()
