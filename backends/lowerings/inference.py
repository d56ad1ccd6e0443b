"""Types and shapes of all values of a graph, node by node, with onnx's own rules for standard operators.

``onnx.shape_inference.infer_shapes`` cannot be used for a whole graph: it has no rule for
``GroupNormalization`` and knows no operator of ONNX Runtime's domain, and every value behind one of those
then has no type. Here each node is inferred by itself, so those few have their rule in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import GraphError

if TYPE_CHECKING:
    import onnx

MICROSOFT = "com.microsoft"
# Constants that a rule may want to see (shapes, axes, sizes) are never longer than this.
_SMALL = 64

# Operators whose outputs all have type and shape of the first input.
_LIKE_FIRST = frozenset(
    [
        ("", "GroupNormalization"),
        (MICROSOFT, "GroupNorm"),
        (MICROSOFT, "SkipLayerNormalization"),
        (MICROSOFT, "BiasGelu"),
        (MICROSOFT, "FastGelu"),
        (MICROSOFT, "QuickGelu"),
    ]
)


class Inference:
    """What is known of the values of a graph so far; ``visit`` adds the outputs of the next node.

    Args:
        model: its inputs and initializers are taken at once, its nodes are visited one by one.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.types: dict[str, onnx.TypeProto] = {}
        self.small: dict[str, onnx.TensorProto] = {}
        self._opsets = list(model.opset_import)
        self._version = {opset.domain: opset.version for opset in model.opset_import}
        for value in model.graph.input:
            self.types[value.name] = value.type
        for tensor in model.graph.initializer:
            self.add_constant(tensor)

    def add_constant(self, tensor: onnx.TensorProto) -> None:
        """Make a constant known; its data is kept only if it is small and lies in the graph."""
        import onnx

        self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        inside = tensor.data_location != onnx.TensorProto.EXTERNAL
        if inside and len(tensor.dims) < 2 and sum(tensor.dims) <= _SMALL:
            self.small[tensor.name] = tensor

    def visit(self, node: onnx.NodeProto) -> None:
        """Infer the outputs of one node.

        Raises:
            GraphError: an input is not known, the operator is not, or its own rule refuses the inputs.
        """
        import onnx

        for name in node.input:
            if name and name not in self.types:
                raise GraphError(f"{describe(node)} reads {name}, which nothing before it makes")
        if (node.domain, node.op_type) in _LIKE_FIRST:
            found = {name: self.types[node.input[0]] for name in node.output if name}
        elif node.domain == MICROSOFT:
            found = {node.output[0]: self._microsoft(node)}
        else:
            given = [name for name in node.input if name]
            try:
                schema = onnx.defs.get_schema(node.op_type, self._version[node.domain], node.domain)
                found = onnx.shape_inference.infer_node_outputs(
                    schema,
                    node,
                    {name: self.types[name] for name in given},
                    {name: self.small[name] for name in given if name in self.small},
                    opset_imports=self._opsets,
                )
            except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, KeyError) as error:
                reason = " ".join(str(error).split())
                raise GraphError(f"the types of {describe(node)} cannot be inferred: {reason}") from error
        missing = [name for name in node.output if name and name not in found]
        if missing:
            raise GraphError(f"onnx does not say which type {', '.join(missing)} of {describe(node)} has")
        self.types.update(found)

    def _microsoft(self, node: onnx.NodeProto) -> onnx.TypeProto:
        """The first output of ONNX Runtime's operators that change the last axis."""
        import onnx

        result = onnx.TypeProto()
        result.CopyFrom(self.types[node.input[0]])
        last = result.tensor_type.shape.dim[-1]
        if node.op_type == "MultiHeadAttention":
            last.CopyFrom(self.types[node.input[2]].tensor_type.shape.dim[-1])
        elif node.op_type == "BiasSplitGelu":
            last.dim_value //= 2
        else:
            raise GraphError(f"Kiln has no rule for the types of {describe(node)}")
        return result


def infer(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """The type of each value, inputs and initializers included.

    Raises:
        GraphError: see ``Inference.visit``.
    """
    inference = Inference(model)
    for node in model.graph.node:
        inference.visit(node)
    return inference.types


def static_shape(types: Mapping[str, onnx.TypeProto], name: str) -> tuple[int, ...] | None:
    """The shape of a value, None if it or one of its axes is not known."""
    if name not in types or not types[name].tensor_type.HasField("shape"):
        return None
    dims = types[name].tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def describe(node: onnx.NodeProto) -> str:
    """A node in words, for messages."""
    domain = f"{node.domain}." if node.domain else ""
    return f"the node {domain}{node.op_type} {node.name or node.output[0]!r}"


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node, or the default."""
    import onnx

    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def words(text: str) -> frozenset[str]:
    """The words of a text: a long table of operators."""
    return frozenset(text.split())
