"""Bind a graph without weights to a weights file: where each initializer's bytes lie, in which type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .tensors import TensorInfo
from .weights import Placed

if TYPE_CHECKING:
    import onnx

# The suffix of a weight's value after it was cast to the type the graph computes in.
CAST_SUFFIX = "__fp32"
WEIGHTS_FILE = "weights.safetensors"


def weight_names(graph: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the initializers that are weights, in graph order."""
    import onnx

    external = onnx.TensorProto.EXTERNAL
    return {t.name: tuple(t.dims) for t in graph.graph.initializer if t.data_location == external}


def check_tensors(
    component: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]
) -> None:
    """Check that a checkpoint holds every weight of a graph in the graph's shape.

    Raises:
        CheckpointError: naming up to three tensors that are missing or have another shape.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of {len(wanted)} tensors of the {component}: "
            f"{', '.join(missing[:3])}{more}; it is incomplete, or its config.json belongs to another model"
        )
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{component} tensor {name} has shape {tuple(found[name].shape)}, "
                f"its config asks for {shape}; the config.json belongs to another model"
            )


def rebind(bound: onnx.ModelProto, placed: Mapping[str, Placed]) -> None:
    """Let the weights of a bound graph lie where ``placed`` says, in other shapes where it says so.

    In place. Only the first axis of a table may grow: what is computed with it must not depend on its length.
    """
    import onnx

    for tensor in bound.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = placed[tensor.name]
            _locate(tensor, place)
            del tensor.dims[:]
            tensor.dims.extend(place.shape)


def _locate(tensor: onnx.TensorProto, place: Placed) -> None:
    """Write offset and length of an initializer's bytes."""
    facts = {entry.key: entry for entry in tensor.external_data}
    for key, value in (("offset", place.offset), ("length", place.nbytes)):
        entry = facts.get(key) or tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def bind(graph: onnx.ModelProto, placed: Mapping[str, Placed]) -> onnx.ModelProto:
    """A copy of ``graph`` whose weights lie where ``placed`` says.

    A weight stored in another type than fp32 goes through a Cast, or from int8 through a DequantizeLinear
    with its scales; engines fold that or keep it fused with the operator that reads it. The initializer keeps
    its diffusers name.
    """
    import onnx

    from .quantization.plan import bind_scales
    from .quantization.qdq import dequantize_node

    bound = onnx.ModelProto()
    bound.CopyFrom(graph)
    types = {
        "F32": onnx.TensorProto.FLOAT,
        "F16": onnx.TensorProto.FLOAT16,
        "BF16": onnx.TensorProto.BFLOAT16,
        "I8": onnx.TensorProto.INT8,
    }
    casts = {}
    for tensor in bound.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = placed[tensor.name]
        _locate(tensor, place)
        if types[place.dtype] != tensor.data_type:
            tensor.data_type = types[place.dtype]
            casts[tensor.name] = tensor.name + CAST_SUFFIX
    for node in bound.graph.node:
        for index, name in enumerate(node.input):
            if name in casts:
                node.input[index] = casts[name]
    bind_scales(bound, placed, WEIGHTS_FILE)
    nodes = [
        dequantize_node(name, cast)
        if placed[name].dtype == "I8"
        else onnx.helper.make_node("Cast", [name], [cast], name=cast, to=onnx.TensorProto.FLOAT)
        for name, cast in casts.items()
    ]
    nodes.extend(bound.graph.node)
    del bound.graph.node[:]
    bound.graph.node.extend(nodes)
    return bound
