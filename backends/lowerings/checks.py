"""What every lowering checks before and after: opset and domains, types of all values, onnx's own checker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...errors import GraphError
from .inference import infer, static_shape

if TYPE_CHECKING:
    import onnx


def record_types(model: onnx.ModelProto) -> None:
    """Write the type of each value into the model, so that engines need not infer it.

    Raises:
        GraphError: they cannot be inferred, or an output has another type than the model says.
    """
    types = infer(model)
    for value in model.graph.output:
        found = types[value.name].tensor_type
        if found.elem_type != value.type.tensor_type.elem_type:
            raise GraphError(f"the rewritten graph gives {value.name} in another type than before")
        if static_shape(types, value.name) is not None:
            value.type.CopyFrom(types[value.name])
    ports = {value.name for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]}
    del model.graph.value_info[:]
    for name, kind in types.items():
        if name not in ports:
            info = model.graph.value_info.add()
            info.name = name
            info.type.CopyFrom(kind)


def check(model: onnx.ModelProto, full: bool = False) -> None:
    """Let onnx check a model; weights outside the graph are taken for inputs, their file is not looked at.

    Args:
        model: what to check.
        full: also infer all shapes strictly, which onnx can do for standard operators only, without
            ``GroupNormalization``.

    Raises:
        GraphError: onnx refuses it.
    """
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    external = [t for t in bare.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in bare.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    bare.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in external
    )
    copies = [type(t).FromString(t.SerializeToString()) for t in inside]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(copies)
    try:
        onnx.checker.check_model(bare, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GraphError(f"onnx refuses the lowered graph: {reason}") from error


def require(model: onnx.ModelProto, opset: int, lowering: str, domains: Iterable[str] = ("",)) -> None:
    """Check the precondition that all lowerings share.

    Raises:
        GraphError: the model's opset is older than ``opset``, or it uses another domain.
    """
    have = {entry.domain: entry.version for entry in model.opset_import}
    if have.get("", 0) < opset:
        raise GraphError(f"{lowering} takes a graph of opset {opset} or newer, got {have.get('', 0)}")
    other = {node.domain for node in model.graph.node} - set(domains)
    if other:
        raise GraphError(f"{lowering} takes the domains {sorted(domains)}, the graph uses {sorted(other)}")
