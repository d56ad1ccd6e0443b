"""LoRA and LoCon: a weight change of low rank, for linear layers and convolutions.

Formulas: LoRA (Hu et al. 2021, arXiv:2106.09685), its convolutional form of kohya-ss/sd-scripts, the CP
form of KohakuBlueleaf/LyCORIS (``lora_mid``), and the rank-stabilized scale (Kalajdzievski 2023,
arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, WeightUpdate

MAX_RANK = 1024

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


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the trailing ones of a 1x1 kernel: kohya stores linear layers either way."""
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


@dataclass(frozen=True)
class LowRankUpdate:
    """``strength * scale * up @ down``, with ``mid`` between the two in the CP form."""

    module: ModuleTensors
    scale: float
    shape: tuple[int, ...]
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the change has the shape of the weight, kernels of one aside."""
        own, target = _trimmed(self.shape), _trimmed(shape)
        flat = len(own) == 2 and len(target) == 4 and own == (target[0], math.prod(target[1:]))
        if own == target or flat or self._pads(shape):
            return None
        return str(list(self.shape))

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The scaled product, float32, in the shape of ``weight``."""
        up, down = self.module.read("up"), self.module.read("down")
        up = up.reshape(up.shape[:2])
        if "mid" in self.module.keys:
            # dW[o,i,h,w] = sum_ab up[o,a] mid[a,b,h,w] down[b,i]
            core = np.tensordot(up, self.module.read("mid"), axes=(1, 0))
            product = np.moveaxis(np.tensordot(core, down.reshape(down.shape[:2]), axes=(1, 0)), -1, 1)
        else:
            product = up @ down.reshape(down.shape[0], -1)
        product *= np.float32(self.scale * strength)  # in place: it is as large as the weight
        if not self._pads(weight.shape):
            return product.reshape(weight.shape)
        padded = np.zeros(weight.shape, np.float32)
        padded[:, : self.shape[1]] = product.reshape(self.shape)
        return padded

    def _pads(self, shape: tuple[int, ...]) -> bool:
        """Whether this is a change of a 4-channel conv_in for one that also reads a mask or an image.

        Inpainting (9), depth (5) and pix2pix (8) models keep the latent in their first four channels, and
        stable-diffusion-webui pads the change with zeros.
        """
        if len(shape) != 4 or len(self.shape) != 4 or self.shape[1] != 4 or shape[1] not in (5, 8, 9):
            return False
        return self.shape[0] == shape[0] and self.shape[2:] == shape[2:]


@dataclass(frozen=True)
class BiasUpdate:
    """``strength * scale * bias``: what PEFT's ``lora_bias`` adds to the bias of the layer."""

    module: ModuleTensors
    scale: float
    parameter: str = "bias"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the bias has the length of the layer's."""
        own = self.module.shape("up_bias")
        return None if own == shape else str(list(own))

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The scaled bias, float32."""
        return self.module.read("up_bias") * np.float32(self.scale * strength)


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
        missing = [name for name in ("down", "up") if name not in module.keys]
        if missing:
            raise module.error(f"has no lora_{missing[0]} tensor; the file is incomplete")
        rank = module.shape("down")[0] if module.shape("down") else 0
        shape = _product_shape(module, rank)
        if not 1 <= rank <= MAX_RANK:
            raise module.error(f"has the rank {rank}; expected 1 to {MAX_RANK}")
        scale = _scale(module, rank)
        weight: WeightUpdate = LowRankUpdate(module, scale, shape)
        return (weight, BiasUpdate(module, scale)) if "up_bias" in module.keys else (weight,)


def _product_shape(module: ModuleTensors, rank: int) -> tuple[int, ...]:
    """Shape of the weight change, after checking that the factors can be multiplied."""
    down, up = module.shape("down"), module.shape("up")
    kernel = down[2:]
    fits = len(down) in (2, 4) and len(up) in (2, 4) and _trimmed(up) == up[:2] and 0 not in (*down, *up)
    inner = rank
    if fits and "mid" in module.keys:
        mid = module.shape("mid")
        fits = len(mid) == 4 and mid[1] == rank and _trimmed(down) == down[:2]
        inner, kernel = (mid[0], mid[2:]) if fits else (inner, kernel)
    if not fits or up[1] != inner:
        listed = ", ".join(
            f"{name} {list(module.shape(name))}" for name in ("down", "mid", "up") if name in module.keys
        )
        raise module.error(
            f"its factors cannot be multiplied: {listed}; expected down [r, I, ...] and up [O, r, ...]"
        )
    return (up[0], down[1], *kernel)


def _scale(module: ModuleTensors, rank: int) -> float:
    """The factor of the product: a stored scale, else alpha / rank, else 1.

    With rank stabilization the divisor is the square root of the rank.
    """
    if "scale" in module.keys:
        return module.scalar("scale")
    alpha = module.scalar("alpha") if "alpha" in module.keys else module.alpha
    if alpha is None:
        alpha = float(rank)
    return alpha / (math.sqrt(rank) if module.rank_stabilized else rank)


LORA = LoraFormat()
