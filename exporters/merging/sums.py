"""The arithmetic of a merge: what becomes of one tensor, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError, UsageError
from .block_weights import BlockWeights

METHODS: Mapping[str, int] = {"weighted-sum": 2, "add-difference": 3}
"""How many checkpoints each method takes."""


@dataclass(frozen=True)
class Method:
    """``weighted-sum``: (1 - alpha) A + alpha B. ``add-difference``: A + alpha (B - C)."""

    name: str
    alpha: float
    blocks: BlockWeights | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UsageError(f"method {self.name!r}: expected {', '.join(METHODS)}")
        if not math.isfinite(self.alpha):
            raise UsageError(f"alpha {self.alpha}: expected a finite number, such as 0.5")

    def alphas(self, network: str, names: list[str]) -> dict[str, float]:
        """The weight of each tensor of a network."""
        if self.blocks is None:
            return dict.fromkeys(names, self.alpha)
        if network == "unet":
            return self.blocks.by_tensor(names)
        return dict.fromkeys(names, self.alpha if self.blocks.base is None else self.blocks.base)

    def merge(self, alpha: float, what: str, *values: np.ndarray) -> np.ndarray:
        """One tensor, float32; ``values`` are those of A, B and C in any type.

        Raises:
            CheckpointError: the result is not finite.
        """
        one, two, *three = (value.astype(np.float32) for value in values)
        factor = np.float32(alpha)
        with np.errstate(over="ignore", invalid="ignore"):  # checked by value
            # A weighted sum is not A + alpha (B - A), which at 1 would not be B to the last bit.
            change = factor * (two - three[0]) if three else factor * two
            merged = (one if three else np.float32(1 - alpha) * one) + change
        if not np.isfinite(merged).all():
            raise CheckpointError(f"{what} becomes NaN or infinite; one of the checkpoints is damaged")
        return merged
