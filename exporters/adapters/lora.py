"""LoRA and LoCon: a weight change of low rank, for linear layers and convolutions.

Formulas: LoRA (Hu et al. 2021, arXiv:2106.09685), its convolutional form of kohya-ss/sd-scripts, the CP
form of KohakuBlueleaf/LyCORIS (``lora_mid``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, WeightUpdate
from .updates import AddUpdate, Fill, Stored, check_rank, matrix, scale_of, trimmed

# Every way in which trainers have spelt the same few parameters; the separator belongs to the suffix.
_STEMS_DOWN_UP = (
    (".lora_down", ".lora_up"),
    ("_lora_down", "_lora_up"),
    (".lora_A", ".lora_B"),
    (".lora_A.default", ".lora_B.default"),
    (".lora.down", ".lora.up"),
    ("_lora.down", "_lora.up"),
    (".lora_linear_layer.down", ".lora_linear_layer.up"),
)
_SUFFIXES = {
    **{f"{down}.weight": "down" for down, _ in _STEMS_DOWN_UP},
    **{f"{up}.weight": "up" for _, up in _STEMS_DOWN_UP},
    **{f"{up}.bias": "up_bias" for _, up in _STEMS_DOWN_UP},
    ":down": "down",
    ":up": "up",
    ".lora_mid.weight": "mid",
    "_lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".lora.alpha": "alpha",
    "_lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    ".scale": "scale",
}


@dataclass(frozen=True)
class LowRank:
    """``up @ down``, with ``mid`` between the two in the CP form, cut to the first ``rank`` of its ranks."""

    module: ModuleTensors
    scale: float
    shape: tuple[int, ...]
    rank: int

    def fill(self, factor: float) -> Fill:
        """Rows of ``up`` times all the rest."""
        up, down = self.module.read("up"), self.module.read("down")
        up, down = up.reshape(up.shape[:2]), matrix(down)
        if "mid" in self.module.keys:
            # dW[o,i,h,w] = sum_ab up[o,a] mid[a,b,h,w] down[b,i]; the last two once for all rows
            down = matrix(np.einsum("abhw,bi->aihw", self.module.read("mid"), down, optimize=True))
        elif self.rank < len(down):
            up, down = np.ascontiguousarray(up[:, : self.rank]), down[: self.rank]
        up = up * np.float32(factor)

        def fill(start: int, stop: int, out: np.ndarray) -> None:
            np.matmul(up[start:stop], down, out=out)

        return fill


class LoraFormat:
    """LoRA, LoCon, LoRA-FA, DyLoRA: one format on disk."""

    name = "LoRA"
    suffixes: Mapping[str, str] = _SUFFIXES

    def owns(self, parameters: frozenset[str]) -> bool:
        """Any factor makes it a LoRA; what is missing is said by ``updates``."""
        return bool(parameters & {"down", "up", "mid"})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """Check the factors of one module against each other and give its updates.

        ``down`` is (r, I[, kh, kw]), ``up`` (O, r[, 1, 1]), ``mid`` (r, r, kh, kw) with 1x1 neighbours.

        Raises:
            AdapterError: a factor is missing, ranks differ or exceed ``MAX_RANK``, or a scalar is not finite.
        """
        for name in ("down", "up"):
            if name not in module.keys:
                raise module.error(f"has no lora_{name} tensor; the file is incomplete")
        stored = module.shape("down")[0] if module.shape("down") else 0
        shape = _product_shape(module, stored)
        rank = check_rank(module, stored)
        # DyLoRA (Valipour et al. 2022, arXiv:2210.07558) trains the first ranks to do without the others;
        # alpha and its divisor stay, as in stable-diffusion-webui.
        keep = min(rank, module.keep_rank or rank)
        if keep < rank and "mid" in module.keys:
            raise module.error(f"is in CP form, which cannot be cut to the rank {keep}")
        weight = AddUpdate(LowRank(module, scale_of(module, rank), shape, keep))
        if "up_bias" not in module.keys:
            return (weight,)
        return (weight, AddUpdate(Stored(module, "up_bias", scale_of(module, rank)), "bias"))


def _product_shape(module: ModuleTensors, rank: int) -> tuple[int, ...]:
    """Shape of the weight change, after checking that the factors can be multiplied."""
    down, up = module.shape("down"), module.shape("up")
    kernel = down[2:]
    fits = len(down) in (2, 4) and len(up) in (2, 4) and trimmed(up) == up[:2] and 0 not in (*down, *up)
    inner = rank
    if fits and "mid" in module.keys:
        mid = module.shape("mid")
        fits = len(mid) == 4 and mid[1] == rank and trimmed(down) == down[:2]
        inner, kernel = (check_rank(module, mid[0]), mid[2:]) if fits else (inner, kernel)
    if not fits or up[1] != inner:
        listed = module.listed("down", "mid", "up")
        raise module.error(
            f"its factors cannot be multiplied: {listed}; expected down [r, I, ...] and up [O, r, ...]"
        )
    return (up[0], down[1], *kernel)


LORA = LoraFormat()
