"""In which float type a graph computes: read from the inputs of its convolutions, products and attentions.

Engines that take typed graphs compute in the types of the graph, so this is what is in force after a
lowering, and a lowering that did not do what its name says is found.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..errors import SessionError

if TYPE_CHECKING:
    import onnx

_HEAVY = frozenset(["Attention", "Conv", "Gemm", "MatMul", "MultiHeadAttention"])


def graph_precision(model: onnx.ModelProto) -> str:
    """``fp32``, ``fp16`` or ``bf16``: the type of most of the heavy operators.

    Raises:
        SessionError: no type can be told.
    """
    import onnx

    names = {
        onnx.TensorProto.FLOAT: "fp32",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.BFLOAT16: "bf16",
    }
    types = _element_types(model)
    votes = Counter(
        names[types[name]]
        for node in model.graph.node
        if node.op_type in _HEAVY
        for name in node.input
        if types.get(name) in names
    )
    if not votes:
        raise SessionError("the graph has no convolution or product whose type is known; export it again")
    return votes.most_common(1)[0][0]


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of the values that are known without inferring every operator: what a Cast or a
    DequantizeLinear gives, what is stored, and what follows from either by operators that keep the type.
    """
    import onnx

    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.elem_type:
            types.setdefault(value.name, value.type.tensor_type.elem_type)
    for node in graph.node:
        given = types.get(node.input[0]) if node.input else None
        if node.op_type == "Cast":
            given = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "DequantizeLinear":
            given = types.get(node.input[1])
        elif node.op_type == "Constant":
            given = next((a.t.data_type for a in node.attribute if a.name == "value"), onnx.TensorProto.FLOAT)
        elif node.op_type in ("Shape", "Size", "ArgMax", "Equal", "Less", "Greater", "Not", "Range", "Where"):
            given = None
        if given:
            for name in node.output:
                types.setdefault(name, given)
    return types
