"""The gate: an int8 bundle is measured against the same weights in fp32 before anybody gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ParityError
from ...metrics import psnr_db, relative_l2, ssim
from .limits import INT8_LIMITS
from .plan import FULL
from .trajectories import GATE_PROMPTS, Trajectory, Work, denoise

if TYPE_CHECKING:
    from ...bundle import Bundle

GATE_WORK = Work(GATE_PROMPTS)


@dataclass(frozen=True)
class Parity:
    """How near an int8 bundle is to fp32: the worst of the prompts, each drawn with one seed by both.

    ``latents_relative_l2`` is of the last latents, ``path_relative_l2`` the mean over all steps,
    ``image_psnr_db`` in decibels, ``image_ssim`` 1 for equal images.
    """

    latents_relative_l2: float
    path_relative_l2: float
    image_psnr_db: float
    image_ssim: float
    prompts: int
    steps: int

    def __str__(self) -> str:
        return (
            f"PSNR {self.image_psnr_db:.1f} dB, SSIM {self.image_ssim:.4f}, worst of {self.prompts}; "
            f"latents {self.latents_relative_l2:.2%} off after {self.steps} steps, "
            f"{self.path_relative_l2:.2%} on the way"
        )

    def facts(self) -> dict[str, float | int]:
        """For the manifest; figures with five digits."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def compare(reference: Sequence[Trajectory], made: Sequence[Trajectory]) -> Parity:
    """The worst of the pairs, figure by figure."""
    pairs = list(zip(reference, made, strict=True))
    return Parity(
        max(relative_l2(m.latents[-1], r.latents[-1]) for r, m in pairs),
        max(
            float(np.mean([relative_l2(a, e) for a, e in zip(m.latents, r.latents, strict=True)]))
            for r, m in pairs
        ),
        min(psnr_db(m.image, r.image) for r, m in pairs),
        min(ssim(m.image, r.image) for r, m in pairs),
        len(pairs),
        len(pairs[0][0].latents),
    )


def measure_parity(reference: Bundle, made: Bundle, work: Work = GATE_WORK) -> Parity:
    """Draw the same with both, one after the other, in fp32 so that int8 is the only difference.

    Raises:
        BackendError: no engine is here, or it refused.
        InvalidOutputError: a network gave NaN, or an image is flat.
    """
    return compare(denoise(reference, work), denoise(made, work))


def check_parity(found: Parity, precision: str, least_psnr_db: float | None = None) -> None:
    """Let pass or not.

    Args:
        found: what was measured.
        precision: ``int8`` or ``int8-full``, which have limits of their own.
        least_psnr_db: a limit given by the user, in place of those of the table.

    Raises:
        ParityError: the bundle is too far from fp32.
    """
    if least_psnr_db is not None:
        if not found.image_psnr_db >= least_psnr_db:
            raise ParityError(f"too far from fp32: {found}; --min-parity asks for {least_psnr_db:g} dB")
        return
    stem = precision.replace("-", "_")
    figures = {"image_psnr_db": found.image_psnr_db, "image_ssim": found.image_ssim}
    for name, value in figures.items():
        limit = INT8_LIMITS[f"{stem}_{name}"]
        if not limit.holds(value):
            other = "--precision int8 or fp16, keep more with --most-kept" if precision == FULL else "fp16"
            raise ParityError(
                f"too far from fp32: {found}; the limit of {name} for {precision} is {limit.limit:g}. Take "
                f"{other}, lower the limit with --min-parity DB, or export with --no-gate"
            )
