"""Rewrite a graph: find what makes and reads a value, put nodes in the place of others, check the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import GraphError
from .checks import record_types
from .inference import describe, infer, static_shape

if TYPE_CHECKING:
    import onnx


class Editor:
    """A copy of a model that is being rewritten.

    A rewrite drops nodes and emits new ones in any order, of which the last keeps the name of the value it
    stands for; ``finish`` removes what nobody reads, sorts, and infers the types again.

    Raises:
        GraphError: the model holds subgraphs or functions, or its types cannot be inferred.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        if model.functions:
            raise GraphError("Kiln's lowerings take graphs without functions of their own; export again")
        self.graph = self.model.graph
        self.types = infer(self.model)
        self.nodes: list[onnx.NodeProto] = list(self.graph.node)
        self.outputs = {value.name for value in self.graph.output}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self._dropped: set[int] = set()
        self._producers: dict[str, onnx.NodeProto] = {}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._pool: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names = set(self.types)
        for node in self.nodes:
            if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
                raise GraphError(f"Kiln's lowerings take graphs without control flow; found {describe(node)}")
            self._index(node)

    def _index(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self._producers[name] = node
        for name in set(node.input) - {""}:
            self._users[name].append(node)

    # Looking

    def live(self, *kinds: str, domain: str = "") -> list[onnx.NodeProto]:
        """The nodes of some operators that were not dropped, in graph order; without ``kinds`` of all."""
        return [
            node
            for node in self.nodes
            if (not kinds or node.op_type in kinds)
            and node.domain == domain
            and id(node) not in self._dropped
        ]

    def producer(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a value, None if there is none or it is no operator of ``kinds``."""
        node = self._producers.get(name)
        if node is None or id(node) in self._dropped or (kinds and node.op_type not in kinds):
            return None
        return node

    def users(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self._users[name] if id(node) not in self._dropped]

    def only_user(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that alone reads a value, None if there are others, or it is no operator of ``kinds``."""
        users = self.users(name)
        if len(users) != 1 or name in self.outputs or (kinds and users[0].op_type not in kinds):
            return None
        return users[0]

    def read_only_by(self, name: str, node: onnx.NodeProto) -> bool:
        """Whether a node is the only one that reads a value."""
        return self.only_user(name) is node

    def shape(self, name: str) -> tuple[int, ...]:
        """The static shape of a value.

        Raises:
            GraphError: it is not static.
        """
        shape = static_shape(self.types, name)
        if shape is None:
            raise GraphError(f"the shape of {name} is not static; the lowering 'static' has to run before")
        return shape

    def elem(self, name: str) -> int:
        """The element type of a value, as in ``onnx.TensorProto``."""
        return int(self.types[name].tensor_type.elem_type)

    def is_weight(self, name: str) -> bool:
        """Whether a value is constant: an initializer, or made of initializers alone."""
        if name in self.initializers:
            return True
        node = self.producer(name, "Cast", "Transpose", "DequantizeLinear")
        return node is not None and all(self.is_weight(source) for source in node.input if source)

    def number(self, name: str) -> float | None:
        """The value of a constant with one element that lies in the graph, None for anything else."""
        array = self.array(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def array(self, name: str) -> np.ndarray | None:
        """The data of a constant that lies in the graph, None for anything else."""
        import onnx

        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return onnx.numpy_helper.to_array(tensor)

    # Writing

    def fresh(self, stem: str) -> str:
        """A name that no value has yet."""
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def constant(self, array: np.ndarray, stem: str = "kiln_const") -> str:
        """The name of a constant, the same one for the same data."""
        import onnx

        # ascontiguousarray would make a scalar one-dimensional.
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._pool:
            self._pool[key] = self.fresh(stem)
            tensor = onnx.numpy_helper.from_array(array, self._pool[key])
            self.initializers[tensor.name] = tensor
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        return self._pool[key]

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str] = "",
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node.

        Args:
            kind: the operator.
            inputs: names of values, empty for an optional input that is left out.
            outputs: names of values that the node makes from now on; without any it makes a fresh one.
            domain: of the operator.
            attributes: None stands for an attribute that is left out.

        Returns:
            The name of the first output.
        """
        import onnx

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        names[0] = names[0] or self.fresh(f"kiln_{kind}")
        given = {key: value for key, value in attributes.items() if value is not None}
        node = onnx.helper.make_node(
            kind, list(inputs), names, name=f"kiln_{names[0]}", domain=domain, **given
        )
        self.nodes.append(node)
        self._names.update(names)
        self._index(node)
        return names[0]

    def drop(self, *nodes: onnx.NodeProto) -> None:
        """Take nodes out; what they made has to be made by a node that is emitted."""
        self._dropped.update(id(node) for node in nodes)

    def finish(self) -> onnx.ModelProto:
        """The rewritten model: without dead nodes and constants, sorted, with the type of each value.

        Raises:
            GraphError: the rewrite left a value that nothing makes.
        """
        nodes = self._sorted_live()
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | self.outputs
        kept = [tensor for name, tensor in self.initializers.items() if name in used]
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)
        record_types(self.model)
        return self.model

    def _sorted_live(self) -> list[onnx.NodeProto]:
        """The nodes that the outputs need, each after those it reads from, else in the order they have."""
        wanted, stack = set(), list(self.outputs)
        while stack:
            node = self.producer(stack.pop())
            if node is not None and id(node) not in wanted:
                wanted.add(id(node))
                stack.extend(node.input)
        done: set[int] = set()
        ordered: list[onnx.NodeProto] = []
        for root in self.nodes:
            path = [root] if id(root) in wanted else []
            while path:
                node = path[-1]
                before = (self.producer(name) for name in node.input if name)
                waiting = [n for n in before if n is not None and id(n) not in done]
                if len(path) > len(self.nodes):
                    raise GraphError(f"the rewritten graph has a cycle through {describe(node)}")
                if waiting:
                    path.append(waiting[0])
                    continue
                path.pop()
                if id(node) not in done:
                    done.add(id(node))
                    ordered.append(node)
        return ordered
