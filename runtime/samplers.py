"""Samplers: flat functions that walk a noisy latent down a list of noise levels, one step per yield.

Each is a generator over a denoiser ``denoiser(x, sigma) -> x0 estimate`` in k-diffusion's space
(``x = x0 + sigma * noise``); what a model predicts and how guidance works is the denoiser's business.
Notation: x latent, D denoised, s and t the levels before and after the step, r = t / s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidOutputError, UsageError

Denoiser = Callable[[np.ndarray, float], np.ndarray]
NoiseSampler = Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler reports after a step.

    ``index`` counts from 1 to ``total``; ``sigma`` is the level the step started from; ``x`` is the latent
    after the step (of the last step: the result), ``denoised`` the x0 estimate it used. Both float32
    ``(n, c, h, w)``.
    """

    index: int
    total: int
    sigma: float
    x: np.ndarray
    denoised: np.ndarray


def _denoise(denoiser: Denoiser, x: np.ndarray, sigma: float, index: int, total: int) -> np.ndarray:
    """Call the denoiser; say at which step it failed."""
    try:
        return denoiser(x, sigma)
    except InvalidOutputError as error:
        raise InvalidOutputError(f"{error} (step {index} of {total})") from error


def _levels(sigmas: np.ndarray) -> list[float]:
    """Levels as Python floats: they scale float32 arrays without widening them."""
    return [float(sigma) for sigma in sigmas]


def sample_euler(
    denoiser: Denoiser, x: np.ndarray, sigmas: np.ndarray, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """Euler's method: ``x = r x + (1 - r) D`` (Karras et al. 2206.00364, algorithm 2 without churn).

    Args:
        denoiser: x0 estimate of ``(x, sigma)``.
        x: float32 ``(n, c, h, w)``, noise of level ``sigmas[0]``.
        sigmas: ``(steps + 1,)``, falling.
        noise_sampler: not used.

    Yields:
        One Step after each step.
    """
    levels = _levels(sigmas)
    total = len(levels) - 1
    for i in range(total):
        s, t = levels[i], levels[i + 1]
        denoised = _denoise(denoiser, x, s, i + 1, total)
        x = (t / s) * x + (1 - t / s) * denoised
        yield Step(i + 1, total, s, x, denoised)


def sample_euler_ancestral(
    denoiser: Denoiser, x: np.ndarray, sigmas: np.ndarray, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """Euler's method to a lower level than asked for, then fresh noise up to it (k-diffusion, eta = 1).

    Arguments as for ``sample_euler``; ``noise_sampler`` gives standard normal noise shaped like ``x`` and is
    called once per step except for the last.

    Yields:
        One Step after each step.
    """
    if noise_sampler is None:
        raise UsageError("euler_a adds noise in each step: it needs a noise_sampler")
    levels = _levels(sigmas)
    total = len(levels) - 1
    for i in range(total):
        s, t = levels[i], levels[i + 1]
        denoised = _denoise(denoiser, x, s, i + 1, total)
        up = min(t, t * math.sqrt(s * s - t * t) / s)
        down = math.sqrt(t * t - up * up)
        x = (down / s) * x + (1 - down / s) * denoised
        if t > 0:
            x = x + up * noise_sampler()
        yield Step(i + 1, total, s, x, denoised)


def sample_ddim(
    denoiser: Denoiser, x: np.ndarray, sigmas: np.ndarray, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """DDIM with eta = 0 (Song et al. 2010.02502, equation 12): renoise D with the noise the model saw.

    In the paper's variable ``x / sqrt(1 + s^2)``, with ``alpha = 1 / (1 + s^2)``, this is
    ``sqrt(alpha') D + sqrt(1 - alpha') eps``. Arguments as for ``sample_euler``.

    Yields:
        One Step after each step.
    """
    levels = _levels(sigmas)
    total = len(levels) - 1
    for i in range(total):
        s, t = levels[i], levels[i + 1]
        denoised = _denoise(denoiser, x, s, i + 1, total)
        eps = (x - denoised) / s
        x = denoised + t * eps
        yield Step(i + 1, total, s, x, denoised)


def sample_dpmpp_2m(
    denoiser: Denoiser, x: np.ndarray, sigmas: np.ndarray, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2): D extrapolated linearly in ln(sigma).

    With ``h = ln(s / t)`` and ``g`` the h before it, ``x = r x + (1 - r) (D + h / 2g (D - D_previous))``.
    The first step, and the last one to level 0, are of first order. Arguments as for ``sample_euler``.

    Yields:
        One Step after each step.
    """
    levels = _levels(sigmas)
    total = len(levels) - 1
    previous: np.ndarray | None = None
    for i in range(total):
        s, t = levels[i], levels[i + 1]
        denoised = _denoise(denoiser, x, s, i + 1, total)
        target = denoised
        if previous is not None and t > 0:
            ratio = math.log(s / t) / (2 * math.log(levels[i - 1] / s))
            target = (1 + ratio) * denoised - ratio * previous
        x = (t / s) * x + (1 - t / s) * target
        previous = denoised
        yield Step(i + 1, total, s, x, denoised)


SamplerFunction = Callable[[Denoiser, np.ndarray, np.ndarray, NoiseSampler | None], Iterator[Step]]


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler by its name on the command line and its title in A1111's infotext."""

    name: str
    title: str
    function: SamplerFunction


SAMPLERS: dict[str, SamplerEntry] = {
    "euler": SamplerEntry("euler", "Euler", sample_euler),
    "euler_a": SamplerEntry("euler_a", "Euler a", sample_euler_ancestral),
    "ddim": SamplerEntry("ddim", "DDIM", sample_ddim),
    "dpmpp_2m": SamplerEntry("dpmpp_2m", "DPM++ 2M", sample_dpmpp_2m),
}
_ALIASES = {
    "eulera": "euler_a",
    "eulerancestral": "euler_a",
    "ddim": "ddim",
    "euler": "euler",
    "dpmpp2m": "dpmpp_2m",
}


def resolve_sampler(name: str) -> SamplerEntry:
    """The sampler of a name as A1111, ComfyUI, stable-diffusion.cpp or Kiln write it.

    Case, spaces, ``_`` and ``-`` do not matter, and ``++`` is ``pp``: ``Euler a``, ``dpm++2m``, ``DPM++ 2M``.

    Raises:
        UsageError: the name is unknown.
    """
    key = name.lower().replace("++", "pp").translate({ord(c): None for c in " _-"})
    if key not in _ALIASES:
        raise UsageError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[_ALIASES[key]]
