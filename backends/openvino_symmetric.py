"""Lowering for OpenVINO: activations quantized around 128 become signed ones around 0.

A bundle quantizes the queries and keys of attentions to uint8 with the zero point 128
(``exporters/quantization/attention.py``). OpenVINO multiplies two tensors in 8 bits only if neither has a
zero point, and reads ``QuantizeLinear`` as ``FakeQuantize`` to the levels 0 to 255, a cast, and a
subtraction, of which it makes one. With ``FakeQuantize`` straight to the values, -128 to 127 times the scale,
it finds int8 without: the same 256 values.

Precondition: ``FakeQuantize`` to 256 levels, casts, minus 128, times a scale. Postcondition: none is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MIDDLE = 128


def quantize_around_zero(model: Any) -> int:
    """Rewrite every chain that fits; how many there were.

    Args:
        model: an ``openvino.Model``, changed in place.
    """
    changed = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Multiply":
            continue
        scale, quantize = _constant(op.input_value(1)), _quantizing(op.input_value(0).get_node())
        if scale is None or quantize is None:
            continue
        op.output(0).replace(_signed(quantize, scale).output(0))
        changed += 1
    return changed


def _quantizing(subtract: Any) -> Any | None:
    """The ``FakeQuantize`` whose levels, minus 128, ``subtract`` gives."""
    if subtract.get_type_name() != "Subtract" or _constant(subtract.input_value(1)) != _MIDDLE:
        return None
    restored = subtract.input_value(0).get_node()
    stored = restored.input_value(0).get_node() if restored.get_type_name() == "Convert" else None
    if stored is None or stored.get_type_name() != "Convert":
        return None
    quantize = stored.input_value(0).get_node()
    if stored.get_output_element_type(0).to_string() != "u8" or quantize.get_type_name() != "FakeQuantize":
        return None
    levels = [_constant(quantize.input_value(i)) for i in (3, 4)]
    return quantize if levels == [0, 255] and quantize.get_attributes()["levels"] == 256 else None


def _constant(output: Any) -> float | None:
    """The value of a constant of one element, which may be cast; None if it is none."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or int(np.prod(node.get_output_shape(0))) != 1:
        return None
    return float(node.get_data().ravel()[0])


def _signed(quantize: Any, scale: float) -> Any:
    """``FakeQuantize`` of the same input to multiples of ``scale`` from -128 to 127."""
    from openvino import opset13

    step = np.float32(scale)
    low, high = (opset13.constant(np.array(level * step, np.float32)) for level in (-_MIDDLE, 127))
    return opset13.fake_quantize(quantize.input_value(0), low, high, low, high, 256)
