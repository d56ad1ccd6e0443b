"""Graph surgery: which weights can be int8, and the nodes that quantize and dequantize."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...int8 import SCALE_SUFFIX
from .quantize import ActivationRange

if TYPE_CHECKING:
    import onnx

_SUFFIX_QUANTIZED, _SUFFIX_RESTORED = "__u8", "__u8_fp32"


@dataclass(frozen=True)
class Site:
    """A place where a weight meets an activation.

    ``activation`` is the tensor that is multiplied with the weight, None where rows are looked up.
    ``op`` is ``Conv``, ``MatMul``, ``Gemm`` or ``Gather``; ``node`` the name of that node.
    """

    weight: str
    shape: tuple[int, ...]
    op: str
    node: str
    activation: str | None


@dataclass(frozen=True)
class Operand:
    """A tensor as one node reads it, which may go through uint8 there.

    ``layer`` names what it is for: the weight that it is multiplied with, or ``...scores.query`` and
    ``...scores.key`` of an attention. ``node`` reads ``tensor`` as its first input. ``symmetric`` asks for a
    range with zero in its middle.
    """

    layer: str
    node: str
    tensor: str
    symmetric: bool = False


def operands(chosen: Sequence[Site]) -> tuple[Operand, ...]:
    """What is multiplied with the weights of some sites."""
    return tuple(Operand(s.weight, s.node, s.activation) for s in chosen if s.activation is not None)


def sites(graph: onnx.ModelProto) -> tuple[Site, ...]:
    """Every place of a graph where a weight could be int8, in graph order.

    That is a kernel, a matrix or a table whose first axis is the output channel: of a convolution, of
    ``Gemm`` with transB, of ``MatMul`` behind a transposition, or the rows that ``Gather`` looks up.
    A weight that something else reads as well is left out.
    """
    import onnx

    weights = {
        t.name: tuple(t.dims)
        for t in graph.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL and len(t.dims) >= 2
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for name, shape in weights.items():
        nodes = readers.get(name, [])
        if len(nodes) != 1:
            continue
        site = _site(name, shape, nodes[0], readers)
        if site is not None:
            found.append(site)
    return tuple(found)


def _site(
    name: str, shape: tuple[int, ...], node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]
) -> Site | None:
    import onnx

    facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv" and node.input[1] == name:
        return Site(name, shape, "Conv", node.name, node.input[0])
    if node.op_type == "Gemm" and node.input[1] == name and facts.get("transB"):
        return Site(name, shape, "Gemm", node.name, node.input[0])
    if node.op_type == "Gather" and node.input[0] == name and not facts.get("axis"):
        return Site(name, shape, "Gather", node.name, None)
    if node.op_type == "Transpose" and list(facts.get("perm", ())) == [1, 0]:
        after = readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "MatMul" and after[0].input[1] == node.output[0]:
            return Site(name, shape, "MatMul", after[0].name, after[0].input[0])
    return None


def dequantize_node(name: str, output: str) -> onnx.NodeProto:
    """The node that turns an int8 weight and its scales into float32."""
    import onnx

    return onnx.helper.make_node(
        "DequantizeLinear", [name, name + SCALE_SUFFIX], [output], name=output, axis=0
    )


def quantize_activations(
    graph: onnx.ModelProto, chosen: Iterable[Operand], ranges: Mapping[str, ActivationRange]
) -> None:
    """Send each chosen operand through uint8; ``graph`` is changed in place.

    A tensor that several nodes read is quantized once. Other readers of it see it as it was.

    Args:
        graph: the graph, bound to weights or not.
        chosen: operands of it.
        ranges: what uint8 covers, by tensor; operands whose tensor has none are left alone.
    """
    wanted = {operand.node: operand.tensor for operand in chosen if operand.tensor in ranges}
    done: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        tensor = wanted.get(node.name)
        if tensor is not None:
            if tensor not in done:
                done.add(tensor)
                nodes += _through_uint8(graph, tensor, ranges[tensor])
            node.input[0] = tensor + _SUFFIX_RESTORED
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _through_uint8(graph: onnx.ModelProto, tensor: str, given: ActivationRange) -> list[onnx.NodeProto]:
    import onnx

    stem = tensor + _SUFFIX_QUANTIZED
    constants = [f"{stem}_scale", f"{stem}_zero_point"]
    values = [np.array(given.scale, np.float32), np.array(given.zero_point, np.uint8)]
    graph.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for value, name in zip(values, constants, strict=True)
    )
    return [
        onnx.helper.make_node("QuantizeLinear", [tensor, *constants], [stem], name=stem),
        onnx.helper.make_node(
            "DequantizeLinear",
            [stem, *constants],
            [tensor + _SUFFIX_RESTORED],
            name=tensor + _SUFFIX_RESTORED,
        ),
    ]
