"""Writes a safetensors file whose tensors are made one at a time, when their turn comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import __version__
from ..errors import AdapterError, KilnError
from .tensors import DTYPES
from .weights import largest_if_narrowed, overflow, place, write_weights

PRECISIONS: Mapping[str, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: safetensors type, shape, and what makes its value when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def planned(value: np.ndarray, dtype: str) -> Planned:
    """A tensor that is there already."""
    return Planned(dtype, value.shape, lambda: value)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str],
    *,
    error: type[KilnError] = AdapterError,
) -> int:
    """Write a safetensors file; values are cast to their planned type. Returns its size in bytes.

    Raises:
        KilnError: of class ``error``: a value is not finite, or too large for its type.
    """
    header, placed = place(
        ((name, one.dtype, one.shape) for name, one in tensors.items()), {"format": "pt", **metadata}
    )
    dtypes = [DTYPES[one.dtype] for one in placed.values()]
    size, _ = write_weights(path, header, _checked(placed, tensors, error), dtypes)
    return size


def _checked(
    names: Mapping[str, object], tensors: Mapping[str, Planned], error: type[KilnError]
) -> Iterator[np.ndarray]:
    for name in names:
        one = tensors[name]
        value = one.make()
        why = overflow(largest_if_narrowed(value, one.dtype), one.dtype)
        if why:
            raise error(f"{name} {why}")
        yield value.reshape(one.shape)


def recipe(command: str, **facts: object) -> str:
    """The field ``kiln_recipe``: what was done, as JSON."""
    return json.dumps({"kiln": __version__, "command": command, **facts}, sort_keys=True)
