"""LoKr: the Kronecker product of two small matrices, each of which may itself be factored.

Formulas: KohakuBlueleaf/LyCORIS (Yeh et al. 2023, arXiv:2309.14859). How a trainer factored the sizes of a
layer changed over time and is never derived again: the product and its reshaping say it all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, WeightUpdate
from .updates import AddUpdate, Fill, check_rank, matrix, scale_of

_HALVES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True)
class Kronecker:
    """``kron(w1, w2)``: w1 (l, m), w2 (k, n[, kh, kw]) give (l k, m n[, kh, kw])."""

    module: ModuleTensors
    scale: float
    shape: tuple[int, ...]

    def fill(self, factor: float) -> Fill:
        """Rows of the product: row ``a * k + b`` holds every ``w1[a] * w2[b]``."""
        first, second = self._first() * np.float32(factor), self._second()
        k = len(second)

        def fill(start: int, stop: int, out: np.ndarray) -> None:
            block = out.reshape(stop - start, first.shape[1], second.shape[1])
            for a in range(start // k, (stop - 1) // k + 1):  # no copy of either half is made for a row
                low, high = max(start, a * k), min(stop, (a + 1) * k)
                np.multiply(
                    first[a][None, :, None],
                    second[low - a * k : high - a * k, None, :],
                    out=block[low - start : high - start],
                )

        return fill

    def _first(self) -> np.ndarray:
        if "lokr_w1" in self.module.keys:
            return self.module.read("lokr_w1")
        return self.module.read("lokr_w1_a") @ self.module.read("lokr_w1_b")

    def _second(self) -> np.ndarray:
        """w2 as (k, n kh kw)."""
        if "lokr_w2" in self.module.keys:
            return matrix(self.module.read("lokr_w2"))
        left, right = self.module.read("lokr_w2_a"), self.module.read("lokr_w2_b")
        if "lokr_t2" not in self.module.keys:
            return left @ matrix(right)
        # w2[p,q,k,l] = sum_ij t2[i,j,k,l] w2_a[i,p] w2_b[j,q]
        core = np.einsum("ijkl,jq->iqkl", self.module.read("lokr_t2"), right, optimize=True)
        return np.ascontiguousarray(left.T @ matrix(core))


class LokrFormat:
    """LoKr with both halves whole or factored, and the second in Tucker form."""

    name = "LoKr"
    suffixes: Mapping[str, str] = {
        **{f".{name}": name for name in _HALVES},
        ".alpha": "alpha",
        ".scale": "scale",
    }

    def owns(self, parameters: frozenset[str]) -> bool:
        """Any part of a half makes it a LoKr; what is missing is said by ``updates``."""
        return bool(parameters & set(_HALVES))

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """The one update.

        Raises:
            AdapterError: a half is missing or there twice, or its factors do not fit each other.
        """
        first, second = _first_shape(module), _second_shape(module)
        shape = (first[0] * second[0], first[1] * second[1], *second[2:])
        return (AddUpdate(Kronecker(module, _scale(module), shape)),)


def _forms(module: ModuleTensors, half: str) -> bool:
    """Whether a half is stored whole; an error unless it is stored in exactly one form."""
    whole = half in module.keys
    factors = [f"{half}_a" in module.keys, f"{half}_b" in module.keys]
    if (
        whole == any(factors)
        or any(factors) != all(factors)
        or (whole and f"lokr_t{half[-1]}" in module.keys)
    ):
        raise module.error(f"expected {half}, or {half}_a and {half}_b; it has {module.listed(*_HALVES)}")
    return whole


def _bad(module: ModuleTensors) -> Exception:
    return module.error(f"its factors cannot be multiplied: {module.listed(*_HALVES)}")


def _first_shape(module: ModuleTensors) -> tuple[int, ...]:
    if _forms(module, "lokr_w1"):
        shape = module.shape("lokr_w1")
    else:
        left, right = module.shape("lokr_w1_a"), module.shape("lokr_w1_b")
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise _bad(module)
        check_rank(module, right[0])
        shape = (left[0], right[1])
    if len(shape) != 2 or 0 in shape:
        raise _bad(module)
    return shape


def _second_shape(module: ModuleTensors) -> tuple[int, ...]:
    if _forms(module, "lokr_w2"):
        shape = module.shape("lokr_w2")
    else:
        left, right = module.shape("lokr_w2_a"), module.shape("lokr_w2_b")
        if len(left) != 2 or len(right) < 2:
            raise _bad(module)
        check_rank(module, right[0])
        if "lokr_t2" in module.keys:
            core = module.shape("lokr_t2")
            if len(core) != 4 or len(right) != 2 or core[:2] != (left[0], right[0]):
                raise _bad(module)
            shape = (left[1], right[1], *core[2:])
        elif left[1] == right[0]:
            shape = (left[0], *right[1:])
        else:
            raise _bad(module)
    if len(shape) not in (2, 4) or math.prod(shape) == 0:
        raise _bad(module)
    return shape


def _scale(module: ModuleTensors) -> float:
    """alpha by the rank of the second half, else of the first; 1 when both are whole, whatever alpha says.

    LyCORIS writes any alpha there, 1e10 among them. PEFT divides by the rank of its configuration instead.
    """
    if "lokr_w2_b" in module.keys:
        return scale_of(module, module.shape("lokr_w2_b")[0])
    if "lokr_w1_b" in module.keys:
        return scale_of(module, module.shape("lokr_w1_b")[0])
    if "scale" in module.keys:
        return module.scalar("scale")
    if "alpha" not in module.keys and module.alpha is not None and module.config_rank:
        return module.alpha / module.config_rank
    return 1.0


LOKR = LokrFormat()
