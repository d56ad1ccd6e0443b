"""The layers of a graph under the names that diffusers and torch have for them, and what depends on what.

A graph's initializers carry the names of the state dict, so the node that uses ``conv_in.weight`` is the
module ``conv_in``, and its output (with the bias added) is the module's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import GraphError

if TYPE_CHECKING:
    import onnx

_ON_THE_WAY = frozenset(["Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose"])
_LAYERS = frozenset(["Conv", "Gather", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul"])
OUTPUT = "output"  # the component's own, among the tensors that are looked at
_WEIGHT, _BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Layer:
    """A module by its name, and the tensor of the graph that is its output."""

    name: str
    tensor: str


class GraphMap:
    """A graph's layers in the order they are computed, and the ancestry of its tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Read the structure; weights are not needed."""
        self.nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.output = graph.output[0].name
        self._maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self._users: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self._users.setdefault(name, []).append(index)
        self._ancestors: dict[int, frozenset[int]] = {}
        names = [tensor.name for tensor in graph.initializer]
        self._biases = self._trace(name for name in names if name.endswith(_BIAS))
        found = (self._layer(name) for name in names if name.endswith(_WEIGHT))
        placed = {layer.tensor: layer for layer in found if layer is not None}
        self.layers = sorted(placed.values(), key=lambda layer: self._maker[layer.tensor])
        if not self.layers:
            raise GraphError("the graph has no layer whose weight has a name; export the bundle again")

    def position(self, tensor: str) -> int:
        """Where in the order of computation a tensor is made; inputs before all else."""
        return self._maker.get(tensor, -1)

    def ancestors(self, tensor: str) -> frozenset[int]:
        """Positions of all nodes that a tensor depends on, its own among them."""
        start = self.position(tensor)
        if start not in self._ancestors:
            seen, open_ = set(), [start]
            while open_:
                index = open_.pop()
                if index < 0 or index in seen:
                    continue
                seen.add(index)
                open_ += [self.position(name) for name in self.nodes[index].input if name]
            self._ancestors[start] = frozenset(seen)
        return self._ancestors[start]

    def depends_on_inputs(self, position: int) -> bool:
        """Whether a node computes with what goes in, and not with weights and constants only."""
        return any(
            name in self.inputs
            for index in self.ancestors(self.nodes[position].output[0])
            for name in self.nodes[index].input
        )

    def _trace(self, names: Iterable[str]) -> dict[str, str]:
        """Every tensor that holds an initializer as it is or cast, and whose it is."""
        found = {}
        for origin in names:
            waiting = [origin]
            while waiting:
                name = waiting.pop()
                found[name] = origin
                for index in self._users.get(name, ()):
                    if self.nodes[index].op_type in _ON_THE_WAY:
                        waiting += self.nodes[index].output
        return found

    def _layer(self, weight: str) -> Layer | None:
        name = weight.removesuffix(_WEIGHT)
        for tensor in self._trace([weight]):
            for index in self._users.get(tensor, ()):
                if self.nodes[index].op_type in _LAYERS:
                    return Layer(name, self._with_bias(self.nodes[index].output[0], name))
        return None

    def _with_bias(self, tensor: str, name: str) -> str:
        """The sum with the layer's bias, where that is a node of its own."""
        for index in self._users.get(tensor, ()):
            node = self.nodes[index]
            if node.op_type == "Add" and any(self._biases.get(i) == name + _BIAS for i in node.input):
                return str(node.output[0])
        return tensor


def read_map(path: Path) -> GraphMap:
    """The map of a graph file; weights are not read.

    Raises:
        GraphError: no layer of it has a name.
    """
    import onnx

    return GraphMap(onnx.load(path, load_external_data=False).graph)
