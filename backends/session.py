"""What every session does around the engine's own run: check inputs, check outputs, refuse when closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..errors import SessionError
from .base import Arrays, GraphSource, InForce, PrepareOptions
from .errors_map import engine_errors
from .feeds import Shape, checked_feeds, contract_of


class CheckedSession:
    """Base of the sessions; a backend writes ``_run`` and ``_release``.

    Args:
        source: the component.
        in_force: what was read back from the engine.
        shapes: the input shapes as the engine has them, None for free axes.
    """

    def __init__(self, source: GraphSource, in_force: InForce, shapes: Mapping[str, Shape]) -> None:
        self.component = source.component
        self.contract = contract_of(source.component)
        self.in_force = in_force
        self._shapes = dict(shapes)
        self._open = True

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: one array per input of the contract; see ``components.CONTRACTS`` for dtypes and axes.

        Returns:
            One new array per output of the contract.

        Raises:
            SessionError: the session is closed, an input is not as expected, or the engine failed.
        """
        if not self._open:
            raise SessionError(f"the session of {self.component} is closed; prepare the component again")
        checked = checked_feeds(self.component, feeds, self._shapes)
        with engine_errors(self.in_force.backend, f"running {self.component}"):
            outputs = self._run(checked)
        for port in self.contract.outputs:
            array = outputs.get(port.name)
            if array is None or array.dtype != np.dtype(port.dtype) or array.ndim != len(port.axes):
                got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise SessionError(
                    f"{self.component} should give {port.name} as {port.dtype} {list(port.axes)}; "
                    f"{self.in_force.backend} gave {got}. Export the bundle again"
                )
        return {port.name: outputs[port.name] for port in self.contract.outputs}

    def close(self) -> None:
        """Free the engine's memory; a second call does nothing."""
        if self._open:
            self._open = False
            self._release()

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError


def fixed_shapes(source: GraphSource, options: PrepareOptions) -> dict[str, Shape]:
    """The shapes fixed by the caller, for engines that do not fix any themselves."""
    ports = contract_of(source.component).inputs
    return {port.name: tuple(options.shapes[port.name]) for port in ports if port.name in options.shapes}


def check_port_names(component: str, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Compare the names that a graph has with the contract.

    Raises:
        SessionError: they differ; the text gives both.
    """
    contract = contract_of(component)
    for kind, names, ports in (("inputs", inputs, contract.inputs), ("outputs", outputs, contract.outputs)):
        have, want = sorted(names), sorted(port.name for port in ports)
        if have != want:
            raise SessionError(f"the graph of {component} has the {kind} {have}, expected {want}")


def refuse_extra(backend: str, options: PrepareOptions) -> None:
    """For backends without options of their own.

    Raises:
        SessionError: ``options.extra`` names something.
    """
    if options.extra:
        raise SessionError(f"the {backend} backend has no options of its own; got {', '.join(options.extra)}")
