"""What to generate: a frozen request, checked before anything is loaded."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from ..errors import UsageError
from .samplers import resolve_sampler
from .schedules import resolve_schedule

SIZE_STEP = 8
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEED = 2**64 - 1
RNGS = ("cpu", "cuda")


@dataclass(frozen=True)
class Request:
    """One prompt and how to draw it.

    ``width`` and ``height`` are pixels, multiples of 8; None takes the model's own size. ``seed`` None
    draws one; image i of ``count`` uses ``seed + i``. ``batch_size`` images are denoised together.
    ``rng`` is whose noise is reproduced, torch's on the CPU or on a GPU. ``cfg_scale`` 1 and below
    leaves the negative prompt out and halves the work; None takes the model's own, else 7.
    ``typed_prompt`` is what images remember as their prompt, with tags that were taken out before; None is
    ``prompt`` itself.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 20
    cfg_scale: float | None = None
    seed: int | None = None
    count: int = 1
    batch_size: int = 1
    sampler: str = "euler"
    schedule: str = "normal"
    rng: str = "cpu"
    typed_prompt: str | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: naming the field, what it is and what it may be.
        """
        for side in ("width", "height"):
            pixels = getattr(self, side)
            if pixels is not None and (pixels % SIZE_STEP or not SIZE_STEP <= pixels <= MAX_SIDE):
                near = max(SIZE_STEP, min(MAX_SIDE, round(pixels / SIZE_STEP) * SIZE_STEP))
                raise UsageError(
                    f"{side} {pixels} is not a multiple of {SIZE_STEP} between {SIZE_STEP} and {MAX_SIDE}; "
                    f"the nearest is {near}"
                )
        _between("steps", self.steps, 1, MAX_STEPS)
        _between("count", self.count, 1, 100_000)
        _between("batch_size", self.batch_size, 1, 64)
        if self.seed is not None:
            _between("seed", self.seed, 0, MAX_SEED)
        if self.cfg_scale is not None and not 0 <= self.cfg_scale <= 100:
            raise UsageError(f"cfg_scale {self.cfg_scale} is out of range; expected 0 to 100, usually 5 to 9")
        if self.rng not in RNGS:
            raise UsageError(f"unknown rng {self.rng!r}; expected one of {', '.join(RNGS)}")
        resolve_sampler(self.sampler)
        resolve_schedule(self.schedule)

    def with_seed(self) -> Request:
        """The same request with a seed: its own, or one drawn now."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32 - 1))


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} {value!r} is out of range; expected a whole number from {low} to {high}")
