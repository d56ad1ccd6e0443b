"""A compiled model of OpenVINO as a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import SessionError
from .base import GraphSource, InForce
from .feeds import Shape
from .mapped_pages import trim_heap
from .openvino_guidance import PROMPT
from .openvino_prompt import HANDED, Prompt
from .openvino_timestep import COSINE, SINE, timestep_feeds
from .session import CheckedSession


class OpenVINOSession(CheckedSession):
    """One compiled model and its one inference request; what depends on the prompt alone may be another's.

    Args:
        source: the component.
        in_force: what was read back.
        compiled: ``openvino.CompiledModel``.
        request: its ``InferRequest``.
        prompt: what computes the inputs of the model that depend on the prompt, None if it has none.
        shared_sample: whether the model takes one half of the latents for both.
        settle: waits until the compiled model is in the cache; called when the session is closed.
    """

    def __init__(
        self,
        source: GraphSource,
        in_force: InForce,
        compiled: Any,
        request: Any,
        *,
        prompt: Prompt | None = None,
        shared_sample: bool,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        shapes = _input_shapes(compiled, shared_sample=shared_sample)
        super().__init__(source, in_force, shapes if prompt is None else shapes | {PROMPT: prompt.shape})
        self._compiled = compiled
        self._request = request
        self._prompt = prompt
        self._config = source.config
        self._shared = shared_sample
        self._settle = settle
        self._cut = any(SINE in port.get_names() for port in compiled.inputs)
        self._outputs = {port.any_name: index for index, port in enumerate(compiled.outputs)}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._shared:
            feeds = feeds | {"sample": _one_half(feeds["sample"])}
        if self._cut:
            feeds = feeds | timestep_feeds(feeds["timestep"], len(feeds["sample"]), self._config)
        if self._prompt is not None:
            self._prompt.update(feeds[PROMPT])
            feeds = {name: array for name, array in feeds.items() if name != PROMPT}
        # Inputs are read in place; outputs are copied, because the request writes over its own next time.
        results = self._request.infer(feeds, share_inputs=True, share_outputs=False)
        return {name: np.asarray(results[index]) for name, index in self._outputs.items()}

    def _release(self) -> None:
        self._request = None
        self._prompt = None
        self._compiled = None
        self._settle()
        trim_heap()


def _one_half(sample: np.ndarray) -> np.ndarray:
    """The half that stands for both.

    Raises:
        SessionError: the halves differ.
    """
    half = len(sample) // 2
    if not np.array_equal(sample[:half], sample[half:], equal_nan=True):
        raise SessionError(
            "the unet was prepared with SHARED_SAMPLE, but the halves of sample differ; "
            "prepare it without, or give both prompts the same latents"
        )
    return sample[:half]


def _input_shapes(compiled: Any, *, shared_sample: bool) -> dict[str, Shape]:
    """The input shapes of the compiled model as the caller sees them, None where an axis is dynamic."""
    shapes: dict[str, Shape] = {
        port.any_name: tuple(axis.get_length() if axis.is_static else None for axis in port.partial_shape)
        for port in compiled.inputs
        if not port.get_names() & {SINE, COSINE} and not port.any_name.startswith(HANDED)
    }
    if shared_sample:
        half, *rest = shapes["sample"]
        shapes["sample"] = (2 * (half or 0), *rest)
    return shapes
