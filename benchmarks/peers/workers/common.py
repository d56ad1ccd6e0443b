"""What all workers share: the job, the clock, and a pipeline in diffusers' manner, timed part by part."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...harness.wire import Answers, Message, peak_memory

Sync = Callable[[], None]
# The precision in force of a project that does not tell it.
UNKNOWN = "unknown"


def read_job() -> dict[str, Any]:
    """The job whose path the harness gave."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Stopwatch:
    """Seconds by component of one draw, and of every UNet step; ``sync`` waits for the device first."""

    def __init__(self, sync: Sync = lambda: None) -> None:
        self.sync = sync
        self.clear()

    def clear(self) -> None:
        """Begin a new draw."""
        self.components: dict[str, float] = {}
        self.steps: list[float] = []

    def wrap(self, owner: Any, name: str, component: str) -> None:
        """Time every call of ``owner.name``, on this instance only."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.sync()
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.sync()
            seconds = time.perf_counter() - start
            self.components[component] = self.components.get(component, 0.0) + seconds
            if component == "unet":
                self.steps.append(seconds)
            return result

        setattr(owner, name, timed)


class PipelineWorker:
    """Serves the harness with a pipeline that has the call of diffusers' ``StableDiffusionPipeline``."""

    def __init__(self, job: Mapping[str, Any], sync: Sync = lambda: None) -> None:
        self.job, self.workload = job, job["workload"]
        self.watch = Stopwatch(sync)
        self.pipe: Any = None
        self.noise = np.load(job["noise"]) if job.get("noise") else None

    @property
    def converted(self) -> Path:
        """Where the project's own form of the model lies."""
        return Path(self.job["scratch"]) / "converted"

    def scheduler(self, config: Mapping[str, Any]) -> Any:
        """diffusers' scheduler that takes the steps of the workload's sampler and schedule.

        Raises:
            ValueError: one of which it is not known that both take the same steps.
        """
        from diffusers import EulerDiscreteScheduler

        sampler, schedule = self.workload["sampler"], self.workload["schedule"]
        if sampler != "euler" or schedule not in ("normal", "karras"):
            raise ValueError(f"peers are compared with the sampler euler, not with {sampler} {schedule}")
        karras = schedule == "karras"
        return EulerDiscreteScheduler.from_config(
            config, timestep_spacing="linspace", use_karras_sigmas=karras
        )

    def initial(self, prompt: int) -> Any:
        """The initial noise of one prompt as the pipeline takes it."""
        import torch

        return torch.from_numpy(self._noise(prompt))

    def draw(self, prompt: int, seed: int, save: str | None = None, latents: str | None = None) -> Message:
        """Draw one batch, from the prompt to pixels; files are written after the clock has stopped."""
        kept: list[np.ndarray] = []
        arguments = self.arguments(prompt)
        if latents:
            arguments["callback_on_step_end"] = _keeper(kept)
        self.watch.clear()
        self.watch.sync()
        started, start = time.monotonic_ns(), time.perf_counter()
        pictures = self.pipe(**arguments).images
        self.watch.sync()
        seconds = time.perf_counter() - start
        if save:
            np.save(save, (np.asarray(pictures) * 255).round().clip(0, 255).astype(np.uint8))
        if latents:
            np.save(latents, np.stack(kept))
        return {
            "started_ns": started,
            "seconds": seconds,
            "components": self.watch.components,
            "unet_steps": self.watch.steps,
        }

    def arguments(self, prompt: int) -> dict[str, Any]:
        """What the pipeline is called with."""
        work = self.workload
        return {
            "prompt": [work["prompts"][prompt]] * work["batch"],
            "negative_prompt": [work["negative_prompt"]] * work["batch"],
            "height": work["height"],
            "width": work["width"],
            "num_inference_steps": work["steps"],
            "guidance_scale": work["cfg_scale"],
            "latents": self.initial(prompt),
            "output_type": "np",
        }

    def _noise(self, prompt: int) -> np.ndarray:
        if self.noise is None:
            raise ValueError("the job names no file of initial noise")
        return self.noise[prompt]


def _keeper(kept: list[np.ndarray]) -> Callable[..., dict[str, Any]]:
    """A callback of diffusers' pipelines that keeps the latents after each step."""

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        found = values["latents"]
        kept.append(
            np.array(found.float().numpy(force=True) if hasattr(found, "numpy") else found, np.float32)
        )
        return {}

    return keep


def timed_load(load: Callable[[], Mapping[str, Any]]) -> Callable[[], Message]:
    """The handler of ``load``: its seconds, and what ``load`` says is in force by component."""

    def handler() -> Message:
        start = time.perf_counter()
        effective = load()
        return {"seconds": time.perf_counter() - start, "components": {}, "effective": dict(effective)}

    return handler


def timed_convert(convert: Callable[[], None]) -> Callable[[], Message]:
    """The handler of ``convert``."""

    def handler() -> Message:
        start = time.perf_counter()
        convert()
        return {"seconds": time.perf_counter() - start}

    return handler


def serve(
    load: Callable[[], Mapping[str, Any]],
    draw: Callable[..., Message],
    convert: Callable[[], None] = lambda: None,
    **facts: Any,
) -> None:
    """Tell the harness that everything is imported, and answer it until it has enough."""
    answers = Answers()
    answers.ready(**facts)
    answers.serve(
        {
            "convert": timed_convert(convert),
            "load": timed_load(load),
            "draw": draw,
            "memory": peak_memory,
        }
    )


def effective(backend: str, version: str, precision: str, threads: int, **others: Any) -> dict[str, Any]:
    """One component's facts, as the record has them."""
    provider, device = others.pop("provider", backend), others.pop("device", "CPU")
    return {
        "backend": backend,
        "version": version,
        "provider": provider,
        "device": device,
        "precision": precision,
        "threads": threads,
        "from_cache": False,
        "settings": others,
    }
