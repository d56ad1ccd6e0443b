"""Lowering for OpenVINO: a gated linear layer becomes two, so that nothing has to be split afterwards.

GEGLU (Shazeer 2002.05202) is ``(x A + a) * gelu(x B + b)``. diffusers keeps A beside B in one matrix and
splits the product; OpenVINO copies both halves for that, 10 MB to 40 MB each in Stable Diffusion 1.5, and
takes ``gelu`` afterwards. As products of their own there is nothing to copy, and ``gelu`` is applied to B's
while it is still in the processor's cache. The halves are rows of the stored matrix, so no weight is moved.

Products of floats are written as convolutions with kernels of one token. That is the same sum, but OpenVINO
takes another kernel for it, which in bf16 and for 256 tokens of 1,280 channels needs 8.6 ms in place of 11.2,
for 1,024 of 640 9.1 in place of 9.8, for 4,096 of 320 10.0 in place of 9.7 (two cores of Zen 5). Channels
come first then; the transpositions are only another name for a layout, and cost nothing.

Precondition: ``Split`` in two along the last axis, of a matrix product with a stored weight, in floating
point or int8, plus a stored bias; one half goes into ``Gelu``, both into one product. Postcondition: no such
split is left whose weight lies under its name in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..int8 import SCALE_SUFFIX
from .openvino_mapped import FLOATS, Rows, Stored, mapped_rows, stored_tensors
from .openvino_storage import decompressed, dequantized
from .openvino_walk import transposed_matrix


@dataclass(frozen=True)
class _Gated:
    """A split and what it splits: ``tokens`` times the transposed weight, plus bias.

    ``stored`` are the names of weight and bias, and of the weight's scales if it is of int8. ``gelu`` and
    ``product`` are the nodes that read the halves.
    """

    split: Any
    tokens: Any
    stored: tuple[str, ...]
    gelu: Any
    product: Any

    @property
    def is_convolution(self) -> bool:
        """Whether it becomes one: floats, and tokens ``(batch, tokens, channels)``."""
        return len(self.stored) == 2 and len(self.tokens.get_partial_shape()) == 3


def split_gated_linears(core: Any, model: Any, weights: Path) -> int:
    """Rewrite every gated layer that fits; how many there were.

    Args:
        core: ``openvino.Core``.
        model: an ``openvino.Model``, changed in place.
        weights: the safetensors file that the model's constants come from.
    """
    splits = [op for op in model.get_ordered_ops() if op.get_type_name() == "Split"]
    stored = stored_tensors(weights) if splits else {}
    found = [gated for gated in (_gated(op, stored) for op in splits) if gated is not None]
    if not found:
        return 0
    wanted = []
    for gated in found:
        half = stored[gated.stored[0]].shape[0] // 2
        for start in (0, half):
            wanted += [Rows(name, start, start + half, int(gated.is_convolution)) for name in gated.stored]
    rows = iter(mapped_rows(core, weights, stored, wanted))
    for gated in found:
        halves = [[next(rows) for _ in gated.stored] for _ in range(2)]
        if gated.is_convolution:
            _convolve(gated, halves)
        else:
            for output, parts in zip(gated.split.outputs(), halves, strict=True):
                output.replace(_linear(gated.tokens, parts).output(0))
    return len(found)


def _gated(split: Any, stored: Mapping[str, Stored]) -> _Gated | None:
    """What a split takes apart, None if it is not as the precondition says."""
    readers = _gelu_and_product(split) if split.get_output_size() == 2 else None
    if readers is None:
        return None
    add = split.input_value(0).get_node()
    axis = split.input_value(1).get_node()
    rank = split.get_input_partial_shape(0).rank
    if add.get_type_name() != "Add" or axis.get_type_name() != "Constant" or rank.is_dynamic:
        return None
    if int(axis.get_data()) not in (-1, rank.get_length() - 1) or len(add.output(0).get_target_inputs()) != 1:
        return None
    product, bias = (add.input_value(i) for i in range(2))
    if product.get_node().get_type_name() != "MatMul":
        product, bias = bias, product
    matmul = product.get_node()
    if matmul.get_type_name() != "MatMul" or len(product.get_target_inputs()) != 1:
        return None
    name = _weight_name(matmul)
    names: tuple[str, ...] = (name, _stored_name(bias.get_node()))
    integers = name in stored and stored[name].dtype == "I8"
    if integers:
        names = (*names, name + SCALE_SUFFIX)
    tensors = [stored[name] for name in names if name in stored]
    rows = {tensor.shape[0] for tensor in tensors}
    floats = all(tensor.dtype in FLOATS for tensor in tensors[int(integers) :])
    if len(tensors) != len(names) or not floats or len(rows) != 1 or rows.pop() % 2:
        return None
    return _Gated(split, matmul.input_value(0), names, *readers)


def _gelu_and_product(split: Any) -> tuple[Any, Any] | None:
    """The ``Gelu`` that one half goes into, and the product of what comes out with the other half."""
    readers = [[entry.get_node() for entry in output.get_target_inputs()] for output in split.outputs()]
    if [len(nodes) for nodes in readers] != [1, 1]:
        return None
    (one,), (other,) = readers
    gelu, product = (one, other) if one.get_type_name() == "Gelu" else (other, one)
    if gelu.get_type_name() != "Gelu" or product.get_type_name() != "Multiply":
        return None
    after = [entry.get_node().get_friendly_name() for entry in gelu.output(0).get_target_inputs()]
    return (gelu, product) if after == [product.get_friendly_name()] else None


def _weight_name(matmul: Any) -> str:
    """The name of the stored ``(out, in)`` matrix that a product transposes; empty if there is none."""
    matrix = transposed_matrix(matmul)
    if matrix is None:
        return ""
    node = matrix.get_node()
    if node.get_type_name() == "Multiply":  # of int8 values with their scales
        node = node.input_value(0).get_node()
    return _stored_name(node)


def _stored_name(node: Any) -> str:
    """The name of the constant behind a node that may cast it; empty if there is none."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name()) if node.get_type_name() == "Constant" else ""


def _linear(tokens: Any, rows: list[Any]) -> Any:
    """The product with half of the rows: of a weight, of a bias, and of scales if there are any."""
    from openvino import opset13 as ops

    values, bias, *scale = rows
    matrix = dequantized(values, scale[0]) if scale else decompressed(values)
    return ops.add(ops.matmul(tokens, matrix, False, True), decompressed(bias))


def _convolve(gated: _Gated, halves: list[list[Any]]) -> None:
    """Both products as convolutions over tokens; ``gelu`` and the product then are of channels first, too."""
    from openvino import opset13 as ops

    readers = list(gated.product.output(0).get_target_inputs())
    turn = ops.constant(np.array([0, 2, 1], np.int64))
    channels_first = ops.transpose(gated.tokens, turn)
    for output, (kernel, bias) in zip(gated.split.outputs(), halves, strict=True):
        product = ops.convolution(channels_first, decompressed(kernel), [1], [0], [0], [1])
        output.replace(ops.add(product, decompressed(bias)).output(0))
    gated.gelu.validate_and_infer_types()
    gated.product.validate_and_infer_types()
    back = ops.transpose(gated.product, turn)
    for entry in readers:
        entry.replace_source_output(back.output(0))
