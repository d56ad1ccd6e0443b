"""Ways through OpenVINO's graphs that several lowerings go: who reads a node, what a product multiplies."""

from __future__ import annotations

from typing import Any

import numpy as np

_VALUE_BY_VALUE = ("FakeQuantize", "Convert", "Subtract", "Multiply")


def only_reader(op: Any, place: int = 0) -> Any | None:
    """The node that alone reads ``op``'s output, as its first input or the one at a place."""
    entries = list(op.output(0).get_target_inputs())
    return entries[0].get_node() if len(entries) == 1 and entries[0].get_index() == place else None


def value_by_value(op: Any) -> list[Any | None]:
    """The nodes behind ``op`` that quantize by one scale, each alone to read the one before; and the next.

    That one is None where several read, or none.
    """
    readers = [only_reader(op)]
    while readers[-1] is not None and _is_value_by_value(readers[-1]):
        readers.append(only_reader(readers[-1]))
    return readers


def _is_value_by_value(op: Any) -> bool:
    """Whether a value of the output depends on that of the first input alone, and not on its place."""
    others = (op.input_value(i).get_partial_shape() for i in range(1, op.get_input_size()))
    return op.get_type_name() in _VALUE_BY_VALUE and all(
        shape.is_static and int(np.prod(list(shape.to_shape()))) == 1 for shape in others
    )


def transposed_matrix(matmul: Any) -> Any | None:
    """The output that holds the matrix ``(out, in)`` which a product transposes; None if it does not."""
    how, source = matmul.get_attributes(), matmul.input_value(1)
    transposed = bool(how["transpose_b"])
    if source.get_node().get_type_name() == "Transpose":
        transposed = not transposed and len(source.get_partial_shape()) == 2
        source = source.get_node().input_value(0)
    return source if transposed and not how["transpose_a"] else None
