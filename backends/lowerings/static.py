"""Lowering "static": fix the shapes of all inputs and compute what follows from that.

Shape arithmetic (Shape, Gather, Concat, ... of sizes) becomes constants, and so does every small value that
only depends on constants. ``Reshape`` gets plain positive sizes, and a ``Reshape`` or ``Expand`` that changes
nothing is taken out. Weights lie outside the graph and are never read.

Precondition: each input has a shape in ``shapes``, of its rank and with the sizes the graph already fixes,
and the same size wherever two inputs have an axis of the same name.
Postcondition: all shapes are static, and no node's shape depends on the values of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...errors import GraphError, SessionError
from .checks import check, record_types, require
from .inference import Inference, attribute, describe, infer, static_shape

if TYPE_CHECKING:
    import onnx

# Results of up to so many elements are computed here: masks and tables of positions are, weights are not.
_FOLD_LIMIT = 1 << 16
# Random, or left to the engine because a folded weight would be a second copy of it.
_NEVER_FOLDED = frozenset(
    ["DequantizeLinear", "QuantizeLinear", "RandomNormal", "RandomUniform", "Bernoulli", "Multinomial"]
)


def make_static(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy of ``model`` for inputs of fixed shapes.

    Args:
        model: a canonical graph; ``weights`` may be external.
        shapes: of each input, ``{"sample": (2, 4, 64, 64), "timestep": (), ...}``.

    Raises:
        SessionError: ``shapes`` does not fit the inputs.
        GraphError: the graph cannot be made static.
    """
    import onnx

    require(model, 13, "static")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _fix_inputs(fixed, shapes)
    _Folder(fixed).fold()
    _check_static(fixed)
    check(fixed)
    return fixed


def _fix_inputs(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    named: dict[str, int] = {}
    inputs = {value.name for value in model.graph.input}
    if set(shapes) != inputs:
        raise SessionError(f"static needs the shapes of exactly {sorted(inputs)}, got {sorted(shapes)}")
    for value in model.graph.input:
        dims, shape = value.type.tensor_type.shape.dim, shapes[value.name]
        fits = len(dims) == len(shape) and all(
            size >= 1 and (not dim.HasField("dim_value") or dim.dim_value == size)
            for dim, size in zip(dims, shape, strict=True)
        )
        if not fits:
            graph = [dim.dim_param or dim.dim_value for dim in dims]
            raise SessionError(
                f"the shape {tuple(shape)} does not fit the graph's input {value.name} {graph}"
            )
        for dim, size in zip(dims, shape, strict=True):
            if dim.dim_param and named.setdefault(dim.dim_param, size) != size:
                raise SessionError(
                    f"{dim.dim_param} is {size} in {value.name} and {named[dim.dim_param]} in another input"
                )
            dim.dim_value = size
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()  # inferred again; what the tracer noted is an expression of names


class _Folder:
    """One pass over the nodes that infers types and computes what is constant."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = model
        self.outputs = {value.name for value in model.graph.output}
        self.inference = Inference(model)
        self.constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims) <= _FOLD_LIMIT
        }
        self.renamed: dict[str, str] = {}
        self.pool: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def fold(self) -> None:
        kept = []
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = self.renamed.get(name, name)
            self.inference.visit(node)
            if self._is_identity(node):
                self.renamed[node.output[0]] = node.input[0]
            elif not self._compute(node):
                self._plain_sizes(node)
                kept.append(node)
        nodes = _needed(kept, self.outputs)
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        copies = [type(item).FromString(item.SerializeToString()) for item in [*nodes, *tensors]]
        del self.model.graph.node[:], self.model.graph.initializer[:]
        self.model.graph.node.extend(copies[: len(nodes)])
        self.model.graph.initializer.extend(copies[len(nodes) :])
        record_types(self.model)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return static_shape(self.inference.types, name)

    def _is_identity(self, node: onnx.NodeProto) -> bool:
        """Whether a node gives what it gets, and may go."""
        if node.op_type not in ("Identity", "Reshape", "Expand") or node.output[0] in self.outputs:
            return False
        before, after = self._shape(node.input[0]), self._shape(node.output[0])
        return node.op_type == "Identity" or (before is not None and before == after)

    def _compute(self, node: onnx.NodeProto) -> bool:
        """Replace a node by its results; whether that was possible."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        if node.op_type in _NEVER_FOLDED or self.outputs.intersection(node.output):
            return False
        if node.op_type == "Shape":
            shape = self._shape(node.input[0])
            if shape is None:
                raise GraphError(f"{describe(node)} reads a shape that the inputs' shapes do not decide")
            part = shape[slice(attribute(node, "start", 0), attribute(node, "end"))]
            results = [np.array(part, np.int64)]
        else:
            sizes = [self._shape(name) for name in node.output if name]
            if any(size is None or np.prod(size) > _FOLD_LIMIT for size in sizes):
                return False
            names = [name for name in node.input if name]
            if not all(name in self.constants for name in names):
                return False
            graph = onnx.helper.make_graph(
                [node],
                "one",
                [onnx.helper.make_value_info(name, self.inference.types[name]) for name in names],
                [onnx.helper.make_value_info(name, self.inference.types[name]) for name in node.output],
            )
            alone = onnx.helper.make_model(graph, opset_imports=self.model.opset_import)
            results = ReferenceEvaluator(alone).run(None, {name: self.constants[name] for name in names})
        for name, array in zip(node.output, results, strict=True):
            self._add(name, np.asarray(array))
        return True

    def _add(self, name: str, array: np.ndarray) -> None:
        import onnx

        key = (str(array.dtype), array.shape, array.tobytes())
        if key in self.pool:
            self.renamed[name] = self.pool[key]
            return
        self.pool[key] = name
        self.constants[name] = array
        tensor = onnx.numpy_helper.from_array(array, name)
        self.model.graph.initializer.append(tensor)
        self.inference.add_constant(tensor)

    def _plain_sizes(self, node: onnx.NodeProto) -> None:
        """Write the sizes of a Reshape out: no 0 that means "as before", no -1 that means "what is left"."""
        shape = self._shape(node.output[0])
        if node.op_type != "Reshape" or shape is None:
            return
        plain = f"{node.output[0]}__shape"
        self._add(plain, np.array(shape, np.int64))
        node.input[1] = self.renamed.get(plain, plain)
        kept = [entry for entry in node.attribute if entry.name != "allowzero"]
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del node.attribute[:]
        node.attribute.extend(copies)


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs depend on, in the same order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _check_static(model: onnx.ModelProto) -> None:
    """Check the postcondition.

    Raises:
        GraphError: naming a value whose shape is not static, or a Shape that is left.
    """
    left = [describe(node) for node in model.graph.node if node.op_type in ("Shape", "Size")]
    if left:
        raise GraphError(f"shape arithmetic is left in the static graph: {left[0]}")
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise GraphError(
                f"the shape of {value.name} does not follow from the shapes of the inputs; "
                "Kiln's backends need graphs whose shapes do not depend on values"
            )


def is_static(model: onnx.ModelProto) -> bool:
    """Whether every value of a model has a static shape."""
    types = infer(model)
    return all(static_shape(types, name) is not None for name in types)
