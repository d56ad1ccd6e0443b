"""Lowerings "opset17" and "opset22": primitives only, for engines that lack the whole operators.

Attention, GroupNormalization and Gelu are taken apart (``decompose.py``); operators that changed since then
get the form they had at that opset. Names of inputs, outputs and weights stay. int8 weights stay behind their
``DequantizeLinear``, at opset 17 in its opset-13 form, one scale for each output channel.

Opset 17 is what MIGraphX imports. Opset 22 is the first whose convolutions take bf16, which is all that it
is for: "bf16" cannot follow "opset17".

Precondition: a static graph of that opset or newer with standard operators only.
Postcondition: that opset, every operator is in ``OPERATORS``, onnx's full check passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import GraphError
from .checks import check, require
from .decompose import split_attention, split_gelu, split_group_norm
from .editor import Editor
from .inference import attribute, describe, words
from .static import is_static

if TYPE_CHECKING:
    import onnx

# The IR version that came with each opset; what Kiln writes uses nothing newer.
IR_VERSIONS = {17: 8, 22: 10}

# What AMDMIGraphX imports (docs/dev/onnx_operators.rst and src/onnx of its 2.16) without the limits that
# fixed shapes and constant sizes already remove. ONNX Runtime's own operators are not among them: its
# MIGraphX provider hands over fewer of those than the library knows.
OPERATORS = words(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape
    Conv ConvTranspose Cos DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid Identity
    InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger
    Max MaxPool Mean Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceL2 ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round ScatterElements ScatterND Sigmoid Sign
    Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Unsqueeze Where Xor
    """
)
# The ways to resize that MIGraphX imports.
_RESIZE_MODES = ("nearest", "linear")
_RESIZE_COORDINATES = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")


def to_primitives(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy of ``model`` in primitives.

    Args:
        model: the graph.
        opset: a key of ``IR_VERSIONS``.

    Raises:
        GraphError: the graph is not static, or holds what has no form at that opset.
    """
    require(model, opset, f"opset{opset}")
    if not is_static(model):
        raise GraphError(f"opset{opset} takes static shapes; the lowering 'static' has to run before")
    editor = Editor(model)
    split_attention(editor)
    split_group_norm(editor)
    split_gelu(editor)
    for node in editor.live(*OPERATORS):
        _downgrade(editor, node, opset)
    del editor.model.opset_import[:]
    entry = editor.model.opset_import.add()
    entry.domain, entry.version = "", opset
    editor.model.ir_version = IR_VERSIONS[opset]
    _check_operators(editor)
    lowered = editor.finish()
    check(lowered, full=True)
    return lowered


def _check_operators(editor: Editor) -> None:
    strange = sorted({node.op_type for node in editor.live()} - OPERATORS)
    if strange:
        raise GraphError(f"the graph uses {', '.join(strange)}, which Kiln cannot take apart into primitives")


def _downgrade(editor: Editor, node: onnx.NodeProto, opset: int) -> None:
    """Give a node the form of an older opset.

    Raises:
        GraphError: it says what could not be said then.
    """
    if node.op_type == "Resize":
        _check_resize(node)
    if opset < 18:
        if node.op_type == "Split":
            _explicit_split(editor, node)
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _axes_attribute(editor, node)
        elif node.op_type == "DequantizeLinear":
            _check_scales(editor, node)
    _drop_new_attributes(node, opset)


def _explicit_split(editor: Editor, node: onnx.NodeProto) -> None:
    """Opset 17 has no ``num_outputs``: sizes are an input."""
    if len(node.input) > 1 and node.input[1]:
        return
    axis = attribute(node, "axis", 0)
    sizes = [editor.shape(name)[axis] for name in node.output]
    del node.input[1:]
    node.input.append(editor.constant(np.array(sizes, np.int64)))
    _remove(node, "num_outputs")


def _axes_attribute(editor: Editor, node: onnx.NodeProto) -> None:
    """Reductions but ReduceSum have their axes as an attribute until opset 17."""
    import onnx

    if len(node.input) < 2:
        return
    axes = editor.array(node.input[1])
    if axes is None or (axes.size == 0 and attribute(node, "noop_with_empty_axes", 0)):
        raise GraphError(f"the axes of {describe(node)} are not constant")
    del node.input[1:]
    _remove(node, "noop_with_empty_axes")
    if axes.size:
        node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))


def _check_resize(node: onnx.NodeProto) -> None:
    mode = attribute(node, "mode", "nearest")
    coordinates = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode not in _RESIZE_MODES or coordinates not in _RESIZE_COORDINATES:
        raise GraphError(
            f"{describe(node)} resizes by {mode} and {coordinates}, which MIGraphX does not import"
        )


def _check_scales(editor: Editor, node: onnx.NodeProto) -> None:
    """Opset 13 takes one float32 scale, or one for each index of an axis; blocks came with opset 21."""
    import onnx

    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32)
    known = editor.elem(node.input[0]) in kinds and editor.elem(node.input[1]) == onnx.TensorProto.FLOAT
    if not known or len(editor.shape(node.input[1])) > 1 or attribute(node, "block_size", 0):
        raise GraphError(
            f"{describe(node)} has a form newer than opset 17; expected int8, uint8 or int32 values "
            "and float32 scales, one for all or one for each channel"
        )
    if attribute(node, "output_dtype", 0) == onnx.TensorProto.FLOAT:
        _remove(node, "output_dtype")


def _drop_new_attributes(node: onnx.NodeProto, opset: int) -> None:
    """Remove attributes that an opset does not know and that say what it does anyway."""
    import onnx

    old = onnx.defs.get_schema(node.op_type, opset)
    new = onnx.defs.get_schema(node.op_type)
    for entry in list(node.attribute):
        if entry.name in old.attributes:
            continue
        known = new.attributes.get(entry.name)
        default = known.default_value if known is not None else None
        value = onnx.helper.get_attribute_value(entry)
        if default is None or not default.type or value != onnx.helper.get_attribute_value(default):
            raise GraphError(
                f"{describe(node)} has {entry.name}={value!r}, which opset {opset} does not know"
            )
        _remove(node, entry.name)


def _remove(node: onnx.NodeProto, name: str) -> None:
    kept = [entry for entry in node.attribute if entry.name != name]
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
    del node.attribute[:]
    node.attribute.extend(copies)
