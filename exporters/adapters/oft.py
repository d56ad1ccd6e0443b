"""OFT: rotations of the outputs of a layer, block by block, in the four forms that rotate them.

Formulas: Qiu et al. 2023 (arXiv:2306.07280) as written by kohya-ss/sd-scripts (``oft_unet_``), by
KohakuBlueleaf/LyCORIS (diag-oft), and by LyCORIS's first builds, which stored the rotation itself
(``oft_diag``, from November 2023) or the rotation without the identity (October 2023). ``alpha`` is a
constraint here, not a scale. Four axes are BOFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .boft import BOFT
from .rotations import MAX_BLOCK, cayley, rescaled, turned_rows
from .updates import by_rows

TOLERANCE = 0.2
"""Twice what eight-bit floating point makes of rotations, and far less than the way to what is none."""


@dataclass(frozen=True)
class RotateUpdate:
    """``strength * (rescale * R^T W - W)`` of the running weight W, R of blocks along the rows.

    The strength scales the whole way, as in stable-diffusion-webui; LyCORIS leaves ``rescale`` at full
    strength.
    """

    module: ModuleTensors
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the blocks cover the rows, and rescale has a factor for each."""
        blocks = self.module.shape(_name(self.module))
        outputs = blocks[0] * blocks[1]
        rescale = math.prod(self.module.shape("rescale")) if "rescale" in self.module.keys else outputs
        if len(shape) >= 2 and shape[0] == outputs == rescale:
            return None
        return f"of {blocks[0]} blocks of {blocks[1]} rows" + (
            f" and {rescale} factors" * (rescale != outputs)
        )

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the running weight."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of whole blocks, turned."""
        turns = self._turns(shape[0]).swapaxes(1, 2)
        if "rescale" in self.module.keys:
            turns = rescaled(turns, self.module.read("rescale"))
        return turned_rows(turns * np.float32(strength))

    def _turns(self, outputs: int) -> np.ndarray:
        """R - I of every block."""
        blocks = self.module.read(_name(self.module))
        if "oft_diag" in self.module.keys:
            identity = np.eye(blocks.shape[-1], dtype=np.float32)
            return blocks - identity if _distance(blocks) <= _distance(blocks + identity) else blocks
        alpha = self.module.scalar("alpha") if "alpha" in self.module.keys else None
        # kohya clamps with every alpha, so its 0 is no rotation at all; LyCORIS's 0 is no constraint.
        if alpha is None or (alpha == 0 and not self.module.stem.startswith("oft_")):
            return cayley(blocks, None)
        return cayley(blocks, alpha * outputs)


def _distance(blocks: np.ndarray) -> float:
    """How far blocks are from rotations, for each row: 0 for rotations."""
    error = blocks @ blocks.swapaxes(1, 2) - np.eye(blocks.shape[-1], dtype=np.float32)
    return float(np.linalg.norm(error)) / math.sqrt(blocks.shape[0] * blocks.shape[1])


def _check_rotations(module: ModuleTensors) -> None:
    """Raise an AdapterError when ``oft_diag`` is neither rotations nor rotations without the identity."""
    blocks = module.read("oft_diag")
    nearest = min(_distance(blocks), _distance(blocks + np.eye(blocks.shape[-1], dtype=np.float32)))
    if nearest > TOLERANCE:
        raise module.error(
            f"its oft_diag is {nearest:.2g} away from rotations; expected at most {TOLERANCE:g}"
        )


def _name(module: ModuleTensors) -> str:
    return "oft_blocks" if "oft_blocks" in module.keys else "oft_diag"


class OftFormat:
    """OFT of kohya and of LyCORIS, old and new; with four axes BOFT."""

    name = "OFT"
    suffixes: Mapping[str, str] = {
        ".oft_blocks": "oft_blocks",
        ".oft_diag": "oft_diag",
        ".rescale": "rescale",
        ".alpha": "alpha",
    }

    def owns(self, parameters: frozenset[str]) -> bool:
        """Blocks under either name."""
        return bool(parameters & {"oft_blocks", "oft_diag"})

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """``oft_blocks`` or ``oft_diag`` (k, b, b); (stages, k, b, b) is BOFT.

        Raises:
            AdapterError: the blocks are not square, are too large, are there twice, or alpha is negative.
        """
        if "oft_blocks" in module.keys and "oft_diag" in module.keys:
            raise module.error("has both oft_blocks and oft_diag")
        shape = module.shape(_name(module))
        if len(shape) not in (3, 4) or shape[-1] != shape[-2] or 0 in shape or shape[-1] > MAX_BLOCK:
            raise module.error(
                f"its blocks are {list(shape)}; expected [k, b, b] or [stages, k, b, b], "
                f"b at most {MAX_BLOCK}"
            )
        if "alpha" in module.keys and module.scalar("alpha") < 0:
            raise module.error(f"its constraint alpha is {module.scalar('alpha'):g}; expected 0 or more")
        if len(shape) == 4:
            return BOFT.updates(module)
        if "oft_diag" in module.keys:
            _check_rotations(module)
        return (RotateUpdate(module),)


OFT = OftFormat()
