"""Check what goes into a session against ``components.CONTRACTS``, the same way for every backend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..components import CONTRACTS, Contract, Port
from ..errors import SessionError
from .base import Arrays, PrepareOptions

Shape = tuple[int | None, ...]


def contract_of(component: str) -> Contract:
    """The contract of a component.

    Raises:
        SessionError: no such component.
    """
    try:
        return CONTRACTS[component]
    except KeyError:
        raise SessionError(f"there is no component {component!r}; known are {', '.join(CONTRACTS)}") from None


def check_options(component: str, options: PrepareOptions) -> None:
    """Check the shapes and the number of threads asked for, before an engine sees them.

    Raises:
        SessionError: a shape is for an unknown input, has the wrong rank or an axis below 1, or the
            number of threads is negative.
    """
    ports = {port.name: port for port in contract_of(component).inputs}
    for name, shape in options.shapes.items():
        if name not in ports:
            raise SessionError(
                f"{component} has no input {name!r} to fix the shape of; it has {', '.join(ports)}"
            )
        if len(shape) != len(ports[name].axes) or any(size < 1 for size in shape):
            raise SessionError(f"the shape {tuple(shape)} does not fit {component}'s {describe(ports[name])}")
    if options.threads < 0:
        raise SessionError(
            f"{options.threads} threads asked for; use 0 for the engine's choice, or a positive number"
        )


def describe(port: Port, shape: Shape | None = None) -> str:
    """A port in words: ``sample: float32 [batch_size, 4, latent_height, latent_width]``."""
    sizes = shape or (None,) * len(port.axes)
    axes = [label if size is None else str(size) for label, size in zip(port.axes, sizes, strict=True)]
    return f"{port.name}: {port.dtype} " + (f"[{', '.join(axes)}]" if axes else "scalar")


def checked_feeds(component: str, feeds: Arrays, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The inputs of one run, in the contract's order and C-contiguous.

    Args:
        component: a key of ``components.CONTRACTS``.
        feeds: arrays by input name.
        shapes: what is known of the input shapes; None stands for an axis that is free, and an input
            that is not named is free in all axes.

    Raises:
        SessionError: an input is missing or unknown, or has another dtype or shape than expected, or an
            axis that two inputs share (the batch) differs between them. The text says what was expected.
    """
    ports = contract_of(component).inputs
    wanted = [port.name for port in ports]
    if set(feeds) != set(wanted):
        raise SessionError(f"{component} got the inputs {sorted(feeds)}; it takes exactly {sorted(wanted)}")
    axes: dict[str, tuple[int, str]] = {}
    checked = {}
    for port in ports:
        array = np.asarray(feeds[port.name])
        _check_port(component, port, array, shapes.get(port.name))
        for label, size in zip(port.axes, array.shape, strict=True):
            first, where = axes.setdefault(label, (size, port.name))
            if size != first:
                raise SessionError(
                    f"{component}: {label} is {first} in {where} but {size} in {port.name}; make them equal"
                )
        # ascontiguousarray would make a scalar one-dimensional.
        checked[port.name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return checked


def _check_port(component: str, port: Port, array: np.ndarray, shape: Shape | None) -> None:
    right_type = array.dtype == np.dtype(port.dtype)
    right_shape = array.ndim == len(port.axes) and all(
        size >= 1 if known is None else size == known
        for size, known in zip(array.shape, shape or (None,) * array.ndim, strict=True)
    )
    if not (right_type and right_shape):
        got = f"{array.dtype} {list(array.shape)}" if array.ndim else f"{array.dtype} scalar"
        raise SessionError(f"{component} takes {describe(port, shape)}; got {got}")
