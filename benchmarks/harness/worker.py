"""Kiln's own worker: one bundle on one backend in a process of its own, driven over ``wire``.

    python -m kiln.benchmarks.harness.worker JOB

Components are timed at their sessions. What a session gives are arrays in the machine's memory, so an engine
that works asynchronously has finished when the clock is read. Time between the text encoder and the decoder
that is not the UNet's is the ``sampler``'s: noise, schedule, guidance, steps.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .wire import Answers, Message, peak_memory

if TYPE_CHECKING:
    import numpy as np

    from ...backends.base import Arrays, InForce, Session
    from ...runtime.events import Event
    from ...runtime.pipeline import Pipeline
    from ...runtime.request import Request
    from .jobs import Job

_LOG_EVERY_S = 5.0


class Stopwatch:
    """Notes when each session ran, on one clock."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, float, float]] = []

    def wrap(self, component: str, session: Session) -> TimedSession:
        """The session, watched."""
        return TimedSession(component, session, self)

    def components(self) -> dict[str, float]:
        """Seconds by component, and the sampler's."""
        totals: dict[str, float] = {}
        for component, start, end in self.runs:
            totals[component] = totals.get(component, 0.0) + end - start
        encoded = [end for component, _, end in self.runs if component == "text_encoder"]
        decoding = [start for component, start, _ in self.runs if component == "vae_decoder"]
        if encoded and decoding:
            totals["sampler"] = min(decoding) - max(encoded) - totals.get("unet", 0.0)
        return totals

    def unet_steps(self) -> list[float]:
        """Seconds of each run of the UNet."""
        return [end - start for component, start, end in self.runs if component == "unet"]


class TimedSession:
    """A session that tells the stopwatch when it ran."""

    def __init__(self, component: str, session: Session, watch: Stopwatch) -> None:
        self.component, self.session, self.watch = component, session, watch
        self.in_force = session.in_force

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run once, and note when."""
        start = time.perf_counter()
        outputs = self.session.run(feeds)
        self.watch.runs.append((self.component, start, time.perf_counter()))
        return outputs

    def close(self) -> None:
        """Close the session."""
        self.session.close()


class KilnWorker:
    """Answers what the harness asks."""

    def __init__(self, job: Job, answers: Answers) -> None:
        self.job, self.answers = job, answers
        self.watch = Stopwatch()
        self.pipeline: Pipeline | None = None

    def load(self) -> Message:
        """Open the bundle, and prepare every component for the workload's shapes."""
        from ...bundle import open_bundle
        from ...runtime.events import PhaseFinished
        from ...runtime.images import check_images
        from ...runtime.pipeline import Pipeline
        from ...runtime.sessions import Sessions

        start = time.perf_counter()
        bundle = open_bundle(self.job.bundle)
        opened = time.perf_counter()
        # The process that measures is a child already and may crash, so the engine runs in it.
        sessions = Sessions(bundle, self._settings(), wrap=self.watch.wrap)
        # Weights that are known to be random show nothing; those of a real model have to.
        check = _any_picture if self.job.workload.model.random_weights else check_images
        self.pipeline = Pipeline(bundle, sessions, check)
        seconds = {}
        for event in self.pipeline.prepare(self.request(0, self.job.workload.seed)):
            if isinstance(event, PhaseFinished) and event.phase == "load":
                seconds[event.detail] = event.seconds
        done = time.perf_counter()
        return {
            "open": opened - start,
            "seconds": done - opened,
            "components": seconds,
            "effective": self.effective(),
        }

    def draw(self, prompt: int, seed: int, save: str | None = None, latents: str | None = None) -> Message:
        """Draw one batch; the clock stops when the pixels are there, before anything is written."""
        import numpy as np

        from ...runtime.events import ImageReady, StepFinished

        pipeline = self._loaded()
        request = self.request(prompt, seed)
        self.watch.runs.clear()
        images, curve = [], []
        started_ns, start = time.monotonic_ns(), time.perf_counter()
        said = start
        for event in pipeline.generate(request):
            if isinstance(event, ImageReady):
                images.append(event.image)
            elif isinstance(event, StepFinished):
                if latents:
                    curve.append(np.array(event.latents, np.float32))
                said = self._say(event, said)
        seconds = time.perf_counter() - start
        if save:
            np.save(save, np.stack(images))
        if latents:
            np.save(latents, np.stack(curve))
        return {
            "started_ns": started_ns,
            "seconds": seconds,
            "components": self.watch.components(),
            "unet_steps": self.watch.unet_steps(),
            "effective": self.effective(),
        }

    def memory(self) -> Message:
        """Peaks of this process; of torch's allocator too where it has a device."""
        found = peak_memory()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            peak = int(torch.cuda.max_memory_reserved())
            found["device"] = {"value": peak, "method": "torch.cuda.max_memory_reserved"}
        return found

    def request(self, prompt: int, seed: int) -> Request:
        """One batch of the workload."""
        from ...runtime.request import Request

        load = self.job.workload
        return Request(
            prompt=load.prompts[prompt],
            negative_prompt=load.negative_prompt,
            width=load.width,
            height=load.height,
            steps=load.steps,
            cfg_scale=load.cfg_scale,
            seed=seed,
            count=load.batch,
            batch_size=load.batch,
            sampler=load.sampler,
            schedule=load.schedule,
        )

    def effective(self) -> dict[str, Any]:
        """What each component reports."""
        return {name: _plain(in_force) for name, in_force in self._loaded().sessions.in_force.items()}

    def _settings(self) -> Any:
        from ...runtime.settings import Settings

        asked = self.job.requested
        backend = asked.name if asked.device == "auto" else f"{asked.name}:{asked.device}"
        # ``auto`` takes the first of its order: measuring which is fastest is this harness's own business.
        return Settings(backend, asked.precision, asked.threads, tune=False, isolate="never")

    def _loaded(self) -> Pipeline:
        if self.pipeline is None:
            raise RuntimeError("draw was asked before load")
        return self.pipeline

    def _say(self, event: Event, said: float) -> float:
        now = time.perf_counter()
        if now - said < _LOG_EVERY_S:
            return said
        self.answers.send({"kind": "log", "text": f"step {event.step} of {event.steps}"})  # type: ignore[union-attr]
        return now


def _any_picture(pixels: np.ndarray, component: str) -> None:
    """Accept pixels whatever they show."""


def _plain(in_force: InForce) -> dict[str, Any]:
    row = asdict(in_force)
    # What is no plain value keeps its text: engines report objects of their own.
    row["settings"] = {str(k): _value(v) for k, v in row["settings"].items()}
    return row


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Serve one job until told to stop."""
    answers = Answers()
    from ...backends import registry
    from .jobs import read_job

    (path,) = arguments if arguments is not None else sys.argv[1:]
    job = read_job(Path(path))
    from ...runtime import pipeline  # noqa: F401  # imported here so that it counts as import, not as load

    if job.requested.name != registry.AUTO:
        registry.get_backend(
            job.requested.name
        ).devices()  # loads the engine, as a peer's imports load theirs
    worker = KilnWorker(job, answers)
    answers.ready()
    answers.serve({"load": worker.load, "draw": worker.draw, "memory": worker.memory})
    return 0


if __name__ == "__main__":
    sys.exit(main())
