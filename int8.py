"""How int8 weights lie in a bundle: values under the weight's own name, one scale per row beside them.

``<name>`` is int8 in the weight's shape, ``<name>.scale`` float32 of the length of its first axis, and the
weight is ``values * scale``, symmetric and without zero point: ONNX's ``DequantizeLinear`` with axis 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALE_SUFFIX = ".scale"


def dequantized(name: str, tensors: Mapping[str, Any]) -> Any:
    """A weight in float32, whether it is stored as int8 or not.

    Args:
        name: the weight.
        tensors: all tensors of the file, numpy's or torch's.

    Returns:
        ``values * scale`` by rows if there is a scale for the name, else the tensor as it is.
    """
    values = tensors[name]
    scale = tensors.get(name + SCALE_SUFFIX)
    if scale is None or not str(values.dtype).endswith("int8"):
        return values
    return values * scale.reshape(-1, *[1] * (values.ndim - 1))


def dequantized_weights(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """All weights of a file by name, int8 ones in float32; the scales are no longer among them."""
    scales = {name + SCALE_SUFFIX for name in tensors} & set(tensors)
    return {name: dequantized(name, tensors) for name in tensors if name not in scales}
