"""The model as a denoiser: scaling, classifier-free guidance and what the network predicts.

Samplers ask for an estimate of the clean latent at a noise level; this turns that into network calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from ..errors import BundleError, InvalidOutputError, UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction")
UNet = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@final
@dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """A UNet with its prompts, callable as ``denoiser(x, sigma)``.

    Attributes:
        unet: ``(sample, timestep, encoder_hidden_states) -> out_sample``, all float32, timestep a scalar.
        cond: hidden states of the prompts, ``(n, length, hidden)``.
        uncond: hidden states of the negative prompts, of the same shape.
        cfg_scale: guidance scale (Ho & Salimans 2207.12598); at most 1 leaves ``uncond`` out.
        sigma_to_timestep: usually ``NoiseSchedule.sigma_to_timestep``.
        prediction_type: ``epsilon`` or ``v_prediction`` (Salimans & Ho 2202.00512), as diffusers names them.

    Raises:
        BundleError: the prediction type is unknown.
        UsageError: ``cond`` and ``uncond`` differ in shape while guidance is on.
    """

    unet: UNet
    cond: np.ndarray
    uncond: np.ndarray | None
    cfg_scale: float
    sigma_to_timestep: Callable[[float], float]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            known = " or ".join(PREDICTION_TYPES)
            raise BundleError(f"prediction_type {self.prediction_type!r} is not supported: expected {known}")
        if not self.guided:
            return
        if self.uncond is None or self.uncond.shape != self.cond.shape:
            got = None if self.uncond is None else self.uncond.shape
            raise UsageError(f"guidance needs a negative prompt encoded to {self.cond.shape}, got {got}")

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is used, which doubles the batch."""
        return self.cfg_scale > 1

    def __call__(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """The x0 estimate at a noise level.

        Args:
            x: float32 ``(n, c, h, w)``, ``x0 + sigma * noise``.
            sigma: the level, above 0.

        Returns:
            float32 ``(n, c, h, w)``.

        Raises:
            InvalidOutputError: the UNet gave NaN or infinity.
        """
        norm = float(np.sqrt(sigma * sigma + 1))
        output = self._predict((x / norm).astype(np.float32, copy=False), sigma)
        if self.prediction_type == "epsilon":
            return x - sigma * output
        return x / (norm * norm) - (sigma / norm) * output

    def _predict(self, sample: np.ndarray, sigma: float) -> np.ndarray:
        """The network's output after guidance; negative prompts come first in the batch, as in diffusers."""
        timestep = np.array(self.sigma_to_timestep(sigma), np.float32)
        if not self.guided or self.uncond is None:
            return self._checked(self.unet(sample, timestep, self.cond), timestep)
        states = np.concatenate([self.uncond, self.cond])
        both = self._checked(self.unet(np.concatenate([sample, sample]), timestep, states), timestep)
        without, with_prompt = np.split(both, 2)
        return without + self.cfg_scale * (with_prompt - without)

    def _checked(self, output: np.ndarray, timestep: np.ndarray) -> np.ndarray:
        finite = np.isfinite(output)
        if not finite.all():
            bad = output.size - int(finite.sum())
            raise InvalidOutputError(
                f"unet gave {bad} values of {output.size} that are NaN or infinite at "
                f"timestep {float(timestep):.1f}: its weights are damaged, or do not fit the precision "
                "(try --precision fp32)"
            )
        return output.astype(np.float32, copy=False)
