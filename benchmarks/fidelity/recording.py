"""Draw with the reference and write down what each component was asked and what it answered.

Runs in a child process. Inputs are those that components really get: token ids of the workload's prompts,
latents and timesteps of a denoising trajectory, the latents at its end for the VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ...backends.base import Arrays, Availability, Backend, Device, GraphSource, PrepareOptions, Session
from ...backends.registry import get_backend, parse_backend
from ...bundle import Bundle
from ...errors import InvalidOutputError
from ...runtime.pipeline import Pipeline
from ...runtime.sessions import Sessions
from ...runtime.settings import Settings
from ..records.record import Requested, WorkloadFacts
from .calls import Call, CallWriter
from .drawing import draw_prompt, keep_drawn
from .opening import session_of
from .sampling import Sampling


class _RecordingBackend:
    """A backend whose sessions note every call."""

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self._inner = inner
        self.calls: list[tuple[str, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = []

    def probe(self) -> Availability:
        return self._inner.probe()

    def devices(self) -> tuple[Device, ...]:
        return self._inner.devices()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Session:
        return _RecordingSession(self._inner.prepare(source, options), source.component, self)


class _RecordingSession:
    def __init__(self, inner: Session, component: str, log: _RecordingBackend) -> None:
        self.in_force = inner.in_force
        self.close = inner.close
        self._inner, self._component, self._log = inner, component, log

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        outputs = self._inner.run(feeds)
        kept = {name: np.array(array) for name, array in feeds.items()}
        self._log.calls.append((self._component, kept, outputs))
        return outputs


def record(
    bundle: Bundle, reference: Requested, workload: WorkloadFacts, sampling: Sampling, folder: Path
) -> dict[str, object]:
    """Draw and keep the calls in ``folder``.

    Args:
        bundle: the reference's.
        reference: a backend by name, and fp32.
        workload: what is drawn.
        sampling: how much of it.
        folder: made here.

    Returns:
        What was in force, by component.

    Raises:
        BackendError: the engine refused.
        InvalidOutputError: the reference itself gave NaN or a flat image: nothing can be judged by it.
    """
    taken = sampling.of(workload)
    name, device = parse_backend(f"{reference.name}:{reference.device}")
    backend = _RecordingBackend(get_backend(name))
    settings = Settings(precision=reference.precision, threads=reference.threads, cache=False)
    writer = CallWriter(folder)
    with ExitStack() as stack:
        pipeline = stack.enter_context(Pipeline(bundle, Sessions(bundle, settings, backend, device)))
        _draw_all(pipeline, backend, workload, taken, writer)
        in_force = {name: asdict(one) for name, one in pipeline.sessions.in_force.items()}
    facts: dict[str, object] = {"in_force": in_force, "sampling": asdict(taken)}
    writer.close(facts)
    return facts


def _draw_all(
    pipeline: Pipeline,
    backend: _RecordingBackend,
    workload: WorkloadFacts,
    taken: Sampling,
    writer: CallWriter,
) -> None:
    from ...exporters.quantization.trajectories import diagonal

    kept = set(diagonal(taken.prompts, taken.steps, taken.points))
    drawn = []
    for index in range(taken.prompts):
        backend.calls.clear()
        drawn.append(_draw(pipeline, workload, taken, index))
        unet = [call for call in backend.calls if call[0] == "unet"]
        for step in (step for step in range(taken.steps) if index * taken.steps + step in kept):
            # A sampler of second order would call more than once a step: the place in the path counts.
            place = round(step * (len(unet) - 1) / max(taken.steps - 1, 1))
            where = f"prompt {index + 1}, step {step + 1} of {taken.steps}"
            writer.write(Call(*unet[place], where, guided=workload.cfg_scale > 1))
        others = [call for call in backend.calls if call[0] != "unet"]
        for number, call in enumerate(others):  # the VAE decodes image by image
            image = sum(other[0] == call[0] for other in others[: number + 1])
            which = f", image {image}" if call[0] == "vae_decoder" and workload.batch > 1 else ""
            writer.write(Call(*call, f"prompt {index + 1}{which}"))
    keep_drawn(writer.folder, drawn)
    _encode_rest(pipeline, workload, taken, writer)


def _draw(
    pipeline: Pipeline, workload: WorkloadFacts, taken: Sampling, index: int
) -> tuple[np.ndarray, np.ndarray]:
    try:
        return draw_prompt(pipeline, workload, taken, index)
    except InvalidOutputError as error:
        raise InvalidOutputError(f"nothing can be judged by this reference: {error}") from error


def _encode_rest(pipeline: Pipeline, workload: WorkloadFacts, taken: Sampling, writer: CallWriter) -> None:
    """The prompts that were not drawn, through the text encoder only."""
    for number, prompt in enumerate(workload.prompts[taken.prompts :], start=taken.prompts + 1):
        ids, _ = pipeline.tokenizer.encode([workload.negative_prompt, prompt])
        ids = ids if workload.cfg_scale > 1 else ids[1:]
        feeds = {"input_ids": ids}
        session = session_of(pipeline.sessions, "text_encoder", {"input_ids": ids.shape})
        writer.write(Call("text_encoder", feeds, session.run(feeds), f"prompt {number}"))
