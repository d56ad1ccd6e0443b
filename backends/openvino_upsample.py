"""Lowering for OpenVINO: a convolution of an upsampled image becomes nine matrix products on the small image.

Nearest upsampling by two repeats each pixel four times, and a 3x3 convolution then multiplies each copy by
the kernel again: 36 products for each small pixel and pair of channels, of which 9 differ. Here the 9 are
computed, by one matrix product for each tap of the kernel, and summed as the convolution would. With taps
k0, k1, k2 along one axis and x repeated,

    y[2i] = k0 x[i-1] + k1 x[i] + k2 x[i]        y[2i+1] = k0 x[i] + k1 x[i] + k2 x[i+1]

and zero outside, first along rows, then along columns. Weights are rearranged, not changed, so fp32 differs
by the order of a sum alone. In Stable Diffusion 1.5 three such convolutions are 8 % of the UNet's
arithmetic. Tried instead: four 2x2 convolutions of summed taps (Shi et al. 1609.07009 in reverse) take 1.1 to
1.4 times as long and need kernels with other numbers; a transposed 4x4 convolution runs in fp32 only. One
product with the channels of all taps, and one for each row of taps, have to be split afterwards, which copies
(and in int8 keeps the scales from being multiplied in the same kernel): the nodes that stand for the three
convolutions took 71.6 and 65.6 ms in int8 where nine products take 59.8, and 107 and 100 ms in bf16 where
nine take 97 (medians of 6 steps, two cores of Zen 4).

What is quantized to int8 between the two is quantized before instead: one value after the other, so that is
the same.

Precondition: static shapes, and a nearest ``Interpolate`` that doubles both sides, asymmetric, read only by a
3x3 ``Convolution`` with stride 1 and padding 1, directly or through quantization by one scale. Postcondition:
no such pair whose nine products take less than ``LARGEST`` bytes in fp32 is left. Larger ones (the VAE's)
would need more memory than they save time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .openvino_numbers import integers, number
from .openvino_storage import StoredWeight, stored_weight, weight
from .openvino_walk import value_by_value

LARGEST = 256 << 20
_ROWS, _COLUMNS = 1, 2


def multiply_before_upsampling(model: Any) -> int:
    """Rewrite every pair that fits; how many there were.

    Args:
        model: an ``openvino.Model``, changed in place.
    """
    changed = 0
    for op in model.get_ordered_ops():
        readers = _readers_of(op)
        if not readers:
            continue
        *between, convolution = readers
        kernel = stored_weight(convolution.input_value(1))
        if kernel is None or kernel.values.shape[2:] != (3, 3):
            continue
        small = op.input_value(0)
        rows = int(np.prod([small.get_shape()[i] for i in (0, 2, 3)]))
        if rows * 9 * kernel.values.shape[0] * 4 > LARGEST:
            continue
        if between:
            between[0].input(0).replace_source_output(small)
            for node in between:
                node.validate_and_infer_types()
            small = between[-1].output(0)
        convolution.output(0).replace(_product(small, kernel).output(0))
        changed += 1
    return changed


def _readers_of(op: Any) -> list[Any]:
    """What quantizes ``op``'s output, and the convolution behind; nothing unless all is as it must be."""
    if op.get_type_name() != "Interpolate" or op.get_output_partial_shape(0).is_dynamic:
        return []
    how = op.get_attributes()
    if how.get("mode") != "nearest" or how.get("coordinate_transformation_mode") != "asymmetric":
        return []
    if how.get("nearest_mode") not in ("floor", "simple") or any(how["pads_begin"]) or any(how["pads_end"]):
        return []
    before, after = list(op.input_value(0).get_shape()), list(op.output(0).get_shape())
    if len(before) != 4 or after != [*before[:2], 2 * before[2], 2 * before[3]]:
        return []
    readers = value_by_value(op)
    if readers[-1] is None or readers[-1].get_type_name() != "Convolution":
        return []
    found = readers[-1].get_attributes()
    plain = (
        list(found["strides"]) == [1, 1]
        and list(found["dilations"]) == [1, 1]
        and list(found["pads_begin"]) == list(found["pads_end"]) == [1, 1]
        and found.get("auto_pad", "explicit") == "explicit"
    )
    return readers if plain else []


def _product(small: Any, kernel: StoredWeight) -> Any:
    """The nodes that stand for upsampling and convolution.

    Args:
        small: output ``(n, c, h, w)``.
        kernel: ``(o, c, 3, 3)``; the node's output is ``(n, o, 2h, 2w)``.
    """
    from openvino import opset13 as ops

    n, _, height, width = small.get_shape()
    out = kernel.values.shape[0]
    tokens = ops.transpose(small, integers(0, 2, 3, 1))

    taps = np.ascontiguousarray(kernel.values.transpose(2, 3, 0, 1))

    def tap(row: int, column: int) -> Any:
        return ops.matmul(tokens, weight(taps[row, column], kernel.scale), False, True)

    columns = [_doubled([tap(row, column) for row in range(3)], _ROWS) for column in range(3)]
    rows = []
    for parity in range(2):
        both = _doubled([column[parity] for column in columns], _COLUMNS)
        pair = ops.concat([ops.unsqueeze(pixels, integers(3)) for pixels in both], 3)
        rows.append(ops.unsqueeze(pair, integers(2)))
    pixels = ops.reshape(ops.concat(rows, 2), integers(n, 2 * height, 2 * width, out), False)
    return ops.transpose(pixels, integers(0, 3, 1, 2))


def _doubled(taps: Sequence[Any], axis: int) -> tuple[Any, Any]:
    """The even and the odd positions along an axis, from the products of the three taps."""
    from openvino import opset13 as ops

    first, middle, last = taps
    even = ops.add(ops.add(middle, last), _shifted(first, axis, back=False))
    odd = ops.add(ops.add(first, middle), _shifted(last, axis, back=True))
    return even, odd


def _shifted(node: Any, axis: int, *, back: bool) -> Any:
    """``node`` moved by one along an axis, ``back`` towards its start, with zero where nothing is."""
    from openvino import opset13 as ops

    more = [int(i == axis) for i in range(4)]
    less = [-size for size in more]  # a negative pad cuts off: one copy, where a slice would be another
    before, after = (less, more) if back else (more, less)
    return ops.pad(node, integers(*before), integers(*after), "constant", number(0))
