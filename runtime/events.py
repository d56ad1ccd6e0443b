"""What a running generation tells its caller, one frozen event after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..backends.base import InForce

PHASES = ("choose", "load", "encode", "denoise", "decode")


@dataclass(frozen=True)
class PhaseStarted:
    """A phase began: choose (a backend), load (a component), encode (the prompt), denoise, decode."""

    phase: str
    detail: str = ""


@dataclass(frozen=True)
class PhaseFinished:
    """A phase ended after ``seconds``."""

    phase: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True, eq=False)
class StepFinished:
    """A denoising step ended; ``latents`` float32 ``(batch, 4, h/8, w/8)`` are the sampler's own."""

    step: int
    steps: int
    seconds: float
    batch: int
    batches: int
    latents: np.ndarray


@dataclass(frozen=True)
class Record:
    """How an image came to be: what the PNG says, what was really in force, and why ``auto`` chose it."""

    seed: int
    width: int
    height: int
    parameters: str
    in_force: dict[str, InForce] = field(default_factory=dict)
    choice: str = ""


@dataclass(frozen=True, eq=False)
class ImageReady:
    """An image, uint8 ``(h, w, 3)`` RGB, and its record; ``index`` counts from 0 within the request."""

    index: int
    image: np.ndarray
    record: Record


@dataclass(frozen=True)
class Warned:
    """Something the user should know and that does not stop the work."""

    text: str


Event = PhaseStarted | PhaseFinished | StepFinished | ImageReady | Warned
