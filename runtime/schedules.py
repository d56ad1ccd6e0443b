"""Noise levels: the training table of a Stable Diffusion model, and the steps a sampler takes through it.

Levels are k-diffusion's sigma: ``x = x0 + sigma * noise``. Between two trained timesteps ln(sigma) is linear
in the timestep (k-diffusion, A1111), so a schedule may ask for timesteps such as 916.28.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import BundleError, UsageError


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The trained noise levels: float64 ``sigmas[t]`` for t = 0 .. T-1, rising."""

    sigmas: np.ndarray

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> NoiseSchedule:
        """Make the table from diffusers' ``scheduler_config.json``.

        ``beta_t`` runs linearly (``linear``) or with a linear square root (``scaled_linear``, Rombach et al.
        2112.10752) from ``beta_start`` to ``beta_end``; ``sigma_t = sqrt(1 / prod(1 - beta) - 1)``.

        Raises:
            BundleError: a noise schedule of another kind.
        """
        steps = int(_number(config, "num_train_timesteps", 1000))
        start, end = _number(config, "beta_start", 0.0001), _number(config, "beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
            raise BundleError(
                "scheduler_config.json has trained_betas or rescale_betas_zero_snr: not supported yet"
            )
        if kind not in ("linear", "scaled_linear") or steps < 2 or not 0 < start <= end < 1:
            raise BundleError(
                f"scheduler_config.json has beta_schedule {kind!r} from {start} to {end} in {steps} steps: "
                "expected 'linear' or 'scaled_linear', at least 2 steps, 0 < beta_start <= beta_end < 1"
            )
        power = 1.0 if kind == "linear" else 0.5
        betas = np.linspace(start**power, end**power, steps) ** (1 / power)
        kept = np.cumprod(1 - betas)
        sigmas = np.sqrt((1 - kept) / kept)
        sigmas.flags.writeable = False
        return cls(sigmas)

    @property
    def sigma_min(self) -> float:
        """The lowest trained level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest trained level; initial noise is multiplied by it."""
        return float(self.sigmas[-1])

    def sigma_to_timestep(self, sigma: float) -> float:
        """The (fractional) timestep of a level, held within the table."""
        return float(np.interp(np.log(sigma), np.log(self.sigmas), np.arange(self.sigmas.size)))

    def timestep_to_sigma(self, timestep: float | np.ndarray) -> np.ndarray:
        """Levels of (fractional) timesteps, float64, held within the table."""
        return np.exp(np.interp(timestep, np.arange(self.sigmas.size), np.log(self.sigmas)))


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BundleError(f"scheduler_config.json has {key} = {value!r}: expected a number")
    return float(value)


def sigmas_normal(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Evenly spaced timesteps from the last to the first (k-diffusion ``get_sigmas``; A1111 "Uniform").

    Args:
        schedule: the trained table.
        steps: number of steps, at least 1.

    Returns:
        float64 ``(steps + 1,)``, falling, the last one 0.
    """
    timesteps = np.linspace(schedule.sigmas.size - 1, 0, _checked(steps))
    return np.append(schedule.timestep_to_sigma(timesteps), 0.0)


def sigmas_karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced ``sigma ** (1 / rho)`` (Karras et al. 2206.00364, equation 5).

    Args:
        schedule: the trained table; its ends are the ends of the range.
        steps: number of steps, at least 1.
        rho: how strongly steps crowd towards low noise.

    Returns:
        float64 ``(steps + 1,)``, falling, the last one 0.
    """
    roots = np.linspace(schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho), _checked(steps))
    return np.append(roots**rho, 0.0)


def _checked(steps: int) -> int:
    if steps < 1:
        raise UsageError(f"steps {steps} is too few: give at least 1")
    return steps


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule by its name on the command line and its title in A1111's infotext."""

    name: str
    title: str
    function: Callable[[NoiseSchedule, int], np.ndarray]


SCHEDULES: dict[str, ScheduleEntry] = {
    "normal": ScheduleEntry("normal", "Normal", sigmas_normal),
    "karras": ScheduleEntry("karras", "Karras", sigmas_karras),
}
_ALIASES = {"uniform": "normal", "discrete": "normal"}


def resolve_schedule(name: str) -> ScheduleEntry:
    """The schedule of a name, whatever its case; ``uniform`` and ``discrete`` are other programs' ``normal``.

    Raises:
        UsageError: the name is unknown.
    """
    key = name.strip().lower()
    key = _ALIASES.get(key, key)
    if key not in SCHEDULES:
        raise UsageError(f"schedule {name!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[key]
