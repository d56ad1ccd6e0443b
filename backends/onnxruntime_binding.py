"""A session whose inputs and outputs stay in memory of the GPU from run to run.

With fixed shapes there is one buffer for each input and output, made once: inputs are written into it,
outputs are copied out of it. That saves an allocation for each run, and is what a CUDA graph needs: it
records the addresses of its first runs, and reads and writes there again whatever is bound or passed later.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from .base import GraphSource
from .errors_map import engine_errors
from .onnxruntime_session import Opened
from .session import CheckedSession


class BoundSession(CheckedSession):
    """One InferenceSession behind an IO binding.

    Args:
        module: onnxruntime.
        source: the component.
        opened: the session.
        kind: ONNX Runtime's name of the kind of device: ``cuda``, or ``cpu`` in tests.
        index: which of them.
    """

    def __init__(
        self, module: ModuleType, source: GraphSource, opened: Opened, kind: str, index: int
    ) -> None:
        super().__init__(source, opened.in_force, opened.shapes)
        self._module = module
        self._native = opened.native
        self._place = (kind, index)
        self._binding = opened.native.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        if self._is_static():
            with engine_errors(self.in_force.backend, f"reserving memory for {source.component}"):
                self._bind_once()

    def _is_static(self) -> bool:
        ports = [*self._native.get_inputs(), *self._native.get_outputs()]
        return all(isinstance(axis, int) for port in ports for axis in port.shape)

    def _bind_once(self) -> None:
        make = self._module.OrtValue.ortvalue_from_shape_and_type
        shapes = {port.name: port.shape for port in [*self._native.get_inputs(), *self._native.get_outputs()]}
        for port in self.contract.inputs:
            value = make(shapes[port.name], np.dtype(port.dtype), *self._place)
            self._inputs[port.name] = value
            self._binding.bind_ortvalue_input(port.name, value)
        for port in self.contract.outputs:
            value = make(shapes[port.name], np.dtype(port.dtype), *self._place)
            self._outputs[port.name] = value
            self._binding.bind_ortvalue_output(port.name, value)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._inputs:
            for name, array in feeds.items():
                self._inputs[name].update_inplace(array)
            self._native.run_with_iobinding(self._binding)
            # On the processor ``numpy`` is a view of the buffer, which the next run writes over.
            return {name: np.array(value.numpy()) for name, value in self._outputs.items()}
        return self._run_dynamic(feeds)

    def _run_dynamic(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sizes differ from run to run: the engine makes the outputs, on the device."""
        held = [self._module.OrtValue.ortvalue_from_numpy(array, *self._place) for array in feeds.values()]
        for name, value in zip(feeds, held, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        for port in self.contract.outputs:
            self._binding.bind_output(port.name, *self._place)
        self._native.run_with_iobinding(self._binding)
        arrays = [np.array(array) for array in self._binding.copy_outputs_to_cpu()]
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        return {port.name: array for port, array in zip(self.contract.outputs, arrays, strict=True)}

    def _release(self) -> None:
        # The binding holds buffers of the session's allocator, so it goes first.
        self._binding = None
        self._inputs.clear()
        self._outputs.clear()
        self._native = None
