"""Draw what a workload asks for and keep the latents of every step. Runs in a child process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import InvalidOutputError, StorageError
from ...runtime.events import ImageReady, StepFinished
from ...runtime.pipeline import Pipeline
from ...runtime.request import Request
from ..records.record import Requested, WorkloadFacts
from .opening import open_sessions
from .sampling import Sampling

LATENTS, IMAGES = "latents.npy", "images.npy"


def draw(
    bundle: Bundle,
    requested: Requested,
    workload: WorkloadFacts,
    sampling: Sampling,
    folder: Path,
    *,
    cache: bool,
) -> dict[str, Any]:
    """Draw the prompts of ``sampling`` and keep latents and images in ``folder``, see ``read_drawn``.

    Raises:
        BackendError: the engine refused.
        InvalidOutputError: a network gave NaN, or an image is flat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Pipeline(bundle, open_sessions(bundle, requested, cache=cache)) as pipeline:
        drawn = [draw_prompt(pipeline, workload, sampling, index) for index in range(sampling.prompts)]
        keep_drawn(folder, drawn)
        return {"effective": {name: asdict(one) for name, one in pipeline.sessions.in_force.items()}}


def draw_prompt(
    pipeline: Pipeline, workload: WorkloadFacts, sampling: Sampling, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """One prompt of a workload.

    Returns:
        Latents after each step, float32 ``(steps, batch, 4, h/8, w/8)``, and images, uint8
        ``(batch, h, w, 3)``.

    Raises:
        InvalidOutputError: a network gave NaN, or an image is flat; names the prompt.
    """
    request = Request(
        workload.prompts[index],
        workload.negative_prompt,
        width=workload.width,
        height=workload.height,
        steps=sampling.steps,
        cfg_scale=workload.cfg_scale,
        seed=workload.seed + index,
        count=workload.batch,
        batch_size=workload.batch,
        sampler=workload.sampler,
        schedule=workload.schedule,
    )
    latents: list[np.ndarray] = []
    images: list[np.ndarray] = []
    try:
        for event in pipeline.generate(request):
            if isinstance(event, StepFinished):
                latents.append(event.latents.copy())
            elif isinstance(event, ImageReady):
                images.append(event.image)
    except InvalidOutputError as error:
        raise InvalidOutputError(f"drawing {workload.prompts[index]!r} failed: {error}") from error
    return np.stack(latents), np.stack(images)


def keep_drawn(folder: Path, drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write what was drawn: latents float32 ``(prompts, steps, batch, 4, ...)`` and images uint8."""
    np.save(folder / LATENTS, np.stack([latents for latents, _ in drawn]))
    np.save(folder / IMAGES, np.concatenate([images for _, images in drawn]))


def read_drawn(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What ``draw`` kept: latents ``(prompts, steps, batch, 4, h/8, w/8)``, images ``(n, h, w, 3)``.

    Raises:
        StorageError: it is not there.
    """
    try:
        return np.load(folder / LATENTS), np.load(folder / IMAGES)
    except (OSError, ValueError) as exc:
        raise StorageError(f"{folder} holds no drawn latents and images ({exc}); run again") from exc
