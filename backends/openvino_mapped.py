"""Constants for OpenVINO that are rows of a stored weight: read where they lie, not copied.

A constant made in Python is copied into every entry of the cache, because nothing says where its values come
from. Those that OpenVINO reads from a file of its own format know their place in the file of weights, and any
file can be that: so a small model in that format, nothing but constants, is written to a temporary folder
and read with ``weights.safetensors`` as its weights. Rows of a tensor are a range of bytes of it.

The formats: huggingface/safetensors, README "Format"; OpenVINO's documentation, "Operation set in IR", and
``openvino.serialize``, whose output it is.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

FLOATS = ("F16", "BF16", "F32")

# By safetensors' name of a type: that of an element and that of a port in OpenVINO's format, and bytes.
_TYPES = {
    "F16": ("f16", "FP16", 2),
    "BF16": ("bf16", "BF16", 2),
    "F32": ("f32", "FP32", 4),
    "I8": ("i8", "I8", 1),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its type there, shape, and place in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes; its type is one of ``_TYPES``."""
        return math.prod(self.shape) * _TYPES[self.dtype][2]


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of the tensor ``name``, with so many axes of size 1 after its own."""

    name: str
    start: int
    stop: int
    ones: int = 0


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Where the tensors of a safetensors file lie, by name; nothing if it is not such a file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
    except (OSError, ValueError):
        return {}
    return {
        name: Stored(row["dtype"], tuple(row["shape"]), 8 + length + row["data_offsets"][0])
        for name, row in header.items()
        if name != "__metadata__"
    }


def mapped_rows(core: Any, path: Path, stored: Mapping[str, Stored], wanted: Sequence[Rows]) -> list[Any]:
    """A constant of OpenVINO for each of some ranges of rows, which keep the file mapped.

    Args:
        core: ``openvino.Core``.
        path: the safetensors file.
        stored: its tensors.
        wanted: what the constants are to hold; tensors of a type in ``_TYPES``.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-openvino-") as folder:
        description = Path(folder) / "rows.xml"
        description.write_text(_description(stored, wanted), encoding="utf-8")
        model = core.read_model(description, path)
    found = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    return [found[_name(index)] for index in range(len(wanted))]


def _name(index: int) -> str:
    return f"rows_{index}"


def _description(stored: Mapping[str, Stored], wanted: Sequence[Rows]) -> str:
    layers, edges = [], []
    for index, rows in enumerate(wanted):
        tensor = stored[rows.name]
        kind, port, width = _TYPES[tensor.dtype]
        row_bytes = math.prod(tensor.shape[1:]) * width
        shape = (rows.stop - rows.start, *tensor.shape[1:], *(1,) * rows.ones)
        dims = "".join(f"<dim>{size}</dim>" for size in shape)
        layers.append(
            f'<layer id="{2 * index}" name={quoteattr(_name(index))} type="Const" version="opset1">'
            f'<data element_type="{kind}" shape="{", ".join(map(str, shape))}" '
            f'offset="{tensor.offset + rows.start * row_bytes}" size="{shape[0] * row_bytes}"/>'
            f'<output><port id="0" precision="{port}">{dims}</port></output></layer>'
            f'<layer id="{2 * index + 1}" name="result_{index}" type="Result" version="opset1">'
            f'<input><port id="0" precision="{port}">{dims}</port></input></layer>'
        )
        edges.append(f'<edge from-layer="{2 * index}" from-port="0" to-layer="{2 * index + 1}" to-port="0"/>')
    return (
        f'<?xml version="1.0"?><net name="rows" version="11"><layers>{"".join(layers)}</layers>'
        f"<edges>{''.join(edges)}</edges></net>"
    )
