"""Parity of latents: how two runs from the same noise part, step by step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...errors import UsageError
from ..records.record import Effective, Gate, Requested
from .distance import Distance, distance
from .limits import image_precision, make_gate

Curves = dict[str, tuple[float, ...]]


def latent_gates(
    latents: np.ndarray,
    reference_latents: np.ndarray,
    requested: Requested,
    effective: Mapping[str, Effective] | None = None,
    *,
    precision: str | None = None,
) -> tuple[list[Gate], Curves]:
    """Compare the latents after every step, and judge the last.

    Args:
        latents: float32 ``(steps, batch, 4, h/8, w/8)``, or with a leading axis of prompts: curves then hold
            the worst of the prompts.
        reference_latents: of the same shape, of the reference from the same noise.
        requested: what was asked for.
        effective: what was in force by component; needed when ``auto`` was asked for.
        precision: whose limits hold, in place of what ``requested`` and ``effective`` say; ``reported``
            judges nothing.

    Returns:
        The gates of the last step, and the curves ``relative_l2`` and ``cosine`` over the steps.

    Raises:
        UsageError: the shapes differ, or the precision in force is not known.
        ValueError: the reference holds NaN or infinity.
    """
    name = precision or image_precision(requested, effective)
    if latents.shape != reference_latents.shape or latents.ndim not in (5, 6) or not latents.size:
        raise UsageError(
            "latents are compared step by step: expected two arrays (steps, batch, 4, h, w), "
            f"got {list(latents.shape)} and {list(reference_latents.shape)}"
        )
    made = latents if latents.ndim == 6 else latents[None]
    wanted = reference_latents if latents.ndim == 6 else reference_latents[None]
    found = [[distance(a, e) for a, e in zip(*pair, strict=True)] for pair in zip(made, wanted, strict=True)]
    steps = list(zip(*found, strict=True))
    curves = {
        "relative_l2": tuple(_finite(max(one.relative_l2 for one in row)) for row in steps),
        "cosine": tuple(min(one.cosine for one in row) for row in steps),
    }
    return _gates([row[-1] for row in found], [one for row in found for one in row], name), curves


def _gates(last: list[Distance], every: list[Distance], precision: str) -> list[Gate]:
    return [
        make_gate("latents", "last step", "relative_l2", max(one.relative_l2 for one in last), precision),
        make_gate("latents", "last step", "cosine", min(one.cosine for one in last), precision),
        make_gate("latents", "all steps", "max_abs", max(one.max_abs for one in every), precision),
        make_gate("latents", "all steps", "nonfinite", sum(one.nonfinite for one in every), precision),
    ]


def _finite(value: float) -> float:
    """A curve is drawn and goes into JSON, which has no infinity."""
    return min(value, float(np.finfo(np.float32).max))
