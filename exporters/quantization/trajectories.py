"""Denoise with a bundle and look on: the latents of every step, the images, and what the UNet was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...backends.base import Arrays, Backend, GraphSource, InForce, PrepareOptions, Session
from ...errors import BackendUnavailable

if TYPE_CHECKING:
    from ...bundle import Bundle

# Subjects, styles and lengths that differ; short ones are in the vocabulary of the bundled model too.
CALIBRATION_PROMPTS = (
    "a red apple",
    "portrait of an old sailor, oil painting, dramatic light, highly detailed",
    "cat face",
    "a castle on a hill at dawn, mist, wide angle photograph",
)
# Others than those the ranges come from. A large network, of which a step takes seconds, draws the first few.
GATE_PROMPTS = (
    "blue car",
    "a bowl of fruit on a wooden table, still life, soft window light",
    "dog",
    "pizza",
    "a lighthouse in a storm, oil painting",
    "tiger face",
    "birthday cake",
    "portrait of a young woman, pencil sketch",
)
FEW = 3
SEED = 1000

Compute = Callable[[Arrays], Mapping[str, np.ndarray]]
Open = Callable[[Mapping[str, tuple[int, ...]]], Compute]
"""Given the shapes of the inputs, what computes a component."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One image and the way to it: latents ``(steps, 4, h, w)`` float32, image uint8 ``(h, w, 3)``."""

    prompt: str
    latents: np.ndarray
    image: np.ndarray


class _WatchingBackend:
    """A backend of which some components are computed by something else, which sees what goes in and out."""

    def __init__(self, inner: Backend, openers: Mapping[str, Open]) -> None:
        self.name = inner.name
        self._inner, self._openers = inner, openers
        self.probe, self.devices = inner.probe, inner.devices

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Session:
        opener = self._openers.get(source.component)
        if opener is None:
            return self._inner.prepare(source, options)
        return _WatchedSession(opener(options.shapes), InForce(self.name, "", "", "CPU", "fp32", 0))


class _WatchedSession:
    def __init__(self, compute: Compute, in_force: InForce) -> None:
        self.in_force = in_force
        self._compute: Compute | None = compute

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        assert self._compute is not None
        return dict(self._compute(feeds))

    def close(self) -> None:
        self._compute = None


@dataclass(frozen=True)
class Work:
    """What is drawn to look on: prompts, steps, side in pixels (None is the model's own), threads."""

    prompts: tuple[str, ...]
    steps: int = 8
    size: int | None = None
    threads: int = 0


def denoise(bundle: Bundle, work: Work, openers: Mapping[str, Open] | None = None) -> list[Trajectory]:
    """Draw every prompt with guidance, Euler over the whole schedule, in fp32, seed by seed.

    Args:
        bundle: what to draw with.
        work: what to draw.
        openers: what computes components in place of the backend, by their names.

    Raises:
        BackendError: no engine is here, or it refused.
        InvalidOutputError: a network gave NaN, or an image is flat.
    """
    from ...runtime.pipeline import Pipeline
    from ...runtime.sessions import Sessions
    from ...runtime.settings import Settings

    inner, device = _processor()
    backend = _WatchingBackend(inner, openers) if openers else inner
    settings = Settings(precision="fp32", threads=work.threads, cache=False)
    with Pipeline(bundle, Sessions(bundle, settings, backend, device)) as pipeline:
        return [_draw(pipeline, work, prompt, SEED + i) for i, prompt in enumerate(work.prompts)]


def _processor() -> tuple[Backend, str]:
    """The engine to measure with, and its name for the processor: the same on every machine."""
    from ...backends.registry import get_backend

    for name, device in (("openvino", "CPU"), ("onnxruntime", "cpu")):
        backend = get_backend(name)
        if backend.probe().available:
            return backend, device
    raise BackendUnavailable("measuring int8 runs the networks: pip install 'kiln-diffusion[cpu]'")


def _draw(pipeline: object, work: Work, prompt: str, seed: int) -> Trajectory:
    from ...runtime.events import ImageReady, StepFinished
    from ...runtime.pipeline import Pipeline
    from ...runtime.request import Request

    assert isinstance(pipeline, Pipeline)
    latents: list[np.ndarray] = []
    image: np.ndarray | None = None
    request = Request(prompt, steps=work.steps, seed=seed, width=work.size, height=work.size)
    for event in pipeline.generate(request):
        if isinstance(event, StepFinished):
            latents.append(event.latents[0].copy())
        elif isinstance(event, ImageReady):
            image = event.image
    return Trajectory(prompt, np.stack(latents), np.asarray(image))


def diagonal(prompts: int, steps: int, count: int) -> list[int]:
    """Which of ``prompts * steps`` calls to look at again: ``count`` steps, first and last among them.

    Prompts take turns, so that every one counts. Calls are numbered prompt by prompt.
    """
    chosen = np.unique(np.linspace(0, steps - 1, min(count, steps)).round().astype(int)).tolist()
    return [(turn % prompts) * steps + step for turn, step in enumerate(chosen)]
