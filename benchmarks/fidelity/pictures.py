"""Parity of images: PSNR and SSIM against the reference's, and pictures that show nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import UsageError
from ...metrics import psnr_db, ssim
from ...runtime.images import FLAT_RANGE
from ..records.record import Effective, Gate, Requested
from .distance import SAME_DB
from .limits import image_precision, make_gate

Metrics = dict[str, float]


def image_gates(
    images: Sequence[np.ndarray] | np.ndarray,
    reference_images: Sequence[np.ndarray] | np.ndarray,
    requested: Requested,
    effective: Mapping[str, Effective] | None = None,
    *,
    precision: str | None = None,
    learned: Sequence[Mapping[str, float]] | None = None,
) -> tuple[list[Gate], list[Metrics]]:
    """Compare pictures with the reference's, one by one, and judge the worst of each figure.

    Args:
        images: uint8 ``(h, w, 3)`` each, RGB; float pictures of the same range are looked through for NaN.
        reference_images: as many, of the same sizes.
        requested: what was asked for.
        effective: what was in force by component; needed when ``auto`` was asked for.
        precision: whose limits hold, in place of what ``requested`` and ``effective`` say; ``reported``
            judges nothing.
        learned: what ``learned.measure_learned`` told of each image.

    Returns:
        The gates, each naming the image it is of, and per image its metrics: ``psnr_db``, which is
        150 for equal ones, ``ssim``, and those of ``learned``.

    Raises:
        UsageError: numbers or sizes differ, or the precision in force is not known.
    """
    name = precision or image_precision(requested, effective)
    if len(images) != len(reference_images) or not len(images):
        raise UsageError(f"got {len(images)} images and {len(reference_images)} of the reference to compare")
    metrics = []
    for index, (made, wanted) in enumerate(zip(images, reference_images, strict=True)):
        _check(index, made, wanted)
        metrics.append(_compare(made, wanted))
        if learned is not None:
            metrics[-1] |= learned[index]
    return _gates(images, reference_images, metrics, name), metrics


def is_flat(image: np.ndarray) -> bool:
    """Whether a picture shows nothing: it varies by no more than one 8-bit level in every channel."""
    return bool((np.ptp(image.astype(np.float64), axis=(0, 1)) <= FLAT_RANGE).all())


def _compare(made: np.ndarray, wanted: np.ndarray) -> Metrics:
    finite = np.nan_to_num(made.astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0)
    return {"psnr_db": min(psnr_db(finite, wanted), SAME_DB), "ssim": ssim(finite, wanted)}


def _gates(
    images: Sequence[np.ndarray] | np.ndarray,
    wanted: Sequence[np.ndarray] | np.ndarray,
    metrics: list[Metrics],
    precision: str,
) -> list[Gate]:
    gates = []
    for metric in ("psnr_db", "ssim", "lpips", "clip_score", "clip_drop", "clip_image"):
        values = [one[metric] for one in metrics if metric in one]
        if values:
            pick = np.argmax if metric in ("lpips", "clip_drop") else np.argmin
            index = int(pick(values))
            gates.append(make_gate("image", f"image {index + 1}", metric, values[index], precision))
    bad = [int((~np.isfinite(image.astype(np.float64))).sum()) for image in images]
    gates.append(_never("nonfinite", bad))
    # The reference may be flat itself, where a model of random weights draws: only a difference counts.
    flat = [int(is_flat(a) and not is_flat(e)) for a, e in zip(images, wanted, strict=True)]
    gates.append(_never("flat", flat))
    return gates


def _never(metric: str, counts: list[int]) -> Gate:
    """What no precision excuses; judged even where all else is reported."""
    index = int(np.argmax(counts))
    total = sum(counts)
    return Gate("image", f"image {index + 1}" if total else "all", metric, float(total), 0.0, True, not total)


def _check(index: int, made: np.ndarray, wanted: np.ndarray) -> None:
    if made.shape != wanted.shape or made.ndim != 3 or made.shape[2] != 3 or min(made.shape[:2]) < 7:
        raise UsageError(
            f"image {index + 1} is {list(made.shape)}, the reference's {list(wanted.shape)}; expected two of "
            "(height, width, 3), 7 pixels a side or more"
        )
