"""Queries and keys of attentions: the other product of two tensors, beside those with weights.

Their product is quadratic in the number of tokens: over 4,096 of them it is a sixth of what Stable Diffusion
1.5's UNet multiplies. In int8 OpenVINO's attention over them takes 148 ms in place of 171 (two cores of Zen
4), which makes the step 4 % faster. Weights of the softmax stay in floating point: between 0 and 1, most near
1/4096, 256 even steps would leave nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .qdq import Operand, Site

if TYPE_CHECKING:
    import onnx

_INPUTS = ("query", "key")
_PASSED = ("Reshape", "Transpose")


def score_operands(graph: onnx.ModelProto, chosen: Sequence[Site]) -> tuple[Operand, ...]:
    """Queries and keys of every attention whose projections are among some sites, in graph order.

    They are rounded where the projection gives them, before heads are split off, so that an engine can have
    the projection write 8 bits. Zero lies in the middle: a product of two tensors with zero points elsewhere
    has terms that engines leave to floating point. It is uint8 with 128 and not int8 with 0, because ONNX
    Runtime's optimizer mistakes the type of the latter behind a ``Reshape`` (onnxruntime#25526, #27845).

    Args:
        graph: with whole ``Attention`` operators.
        chosen: sites whose weights become int8.
    """
    made_by = {output: node for node in graph.graph.node for output in node.output}
    weights = {site.node: site.weight for site in chosen}
    found = []
    for node in graph.graph.node:
        if node.op_type == "Attention":
            for kind, tensor in zip(_INPUTS, node.input, strict=False):
                operand = _operand(tensor, kind, made_by, weights)
                if operand is not None:
                    found.append(operand)
    return tuple(found)


def _operand(
    tensor: str, kind: str, made_by: Mapping[str, onnx.NodeProto], weights: Mapping[str, str]
) -> Operand | None:
    reader = None
    while tensor in made_by and made_by[tensor].op_type in _PASSED:
        reader = made_by[tensor]
        tensor = reader.input[0]
    producer = made_by.get(tensor)
    if reader is None or producer is None:
        return None
    projections = [producer]
    if producer.op_type == "Add":  # of a bias
        projections = [made_by[name] for name in producer.input if name in made_by]
    weight = next((weights[node.name] for node in projections if node.name in weights), None)
    if weight is None:
        return None
    attention = weight.removesuffix(".weight").rpartition(".")[0]
    return Operand(f"{attention}.scores.{kind}", reader.name, tensor, symmetric=True)
