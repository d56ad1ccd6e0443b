"""Lowering "ort_fused": the fused operators of ONNX Runtime's own domain, for its CUDA provider.

| canonical | becomes |
|---|---|
| Attention between transpositions of heads | MultiHeadAttention on (batch, tokens, channels) |
| GroupNormalization, with the SiLU that follows | GroupNorm, channels last, between two Transpose |
| Add and LayerNormalization | SkipLayerNormalization, which also gives the sum |
| bias, Split, Gelu, Mul (GEGLU) | BiasSplitGelu, where its kernel has the width; else as it is |
| bias and Gelu | BiasGelu, or FastGelu for the tanh form |
| ``x sigmoid(a x)`` | QuickGelu |

Queries, keys and values stay separate: packing their weights would copy them. The transpositions around
GroupNorm cancel with those that ONNX Runtime makes for its convolutions under ``prefer_nhwc``. Its own
SkipGroupNorm is not used: in these networks the sum before a normalisation is also read by the residual
branch in the other layout, so nothing would be saved.

Operators' limits are those of the CUDA kernels (onnxruntime/contrib_ops/cuda): GroupNorm takes an even
number of channels in each group, float32 scale and bias; BiasSplitGelu takes 2560, 5120 and 10240 channels.
What is beyond them stays canonical, which ONNX Runtime runs as well.

Precondition: a static canonical graph, float32.
Postcondition: the same inputs and outputs; no Attention is left; the import of com.microsoft is 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import GraphError
from .checks import check, require
from .decompose import attention_scale
from .editor import Editor
from .fuse_mlp import fuse_geglu, fuse_gelu, fuse_quick_gelu, fuse_skip_layer_norm
from .inference import MICROSOFT, attribute, describe
from .static import is_static

if TYPE_CHECKING:
    import onnx

# What ONNX Runtime's CUDA provider should be told for graphs of this lowering, by its own names. Without the
# first, SkipLayerNormalization sums its statistics in fp16; the second saves the transpositions above.
CUDA_OPTIONS = {"enable_skip_layer_norm_strict_mode": "1", "prefer_nhwc": "1"}

_HEADS = [0, 2, 1, 3]


def to_ort_fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with ONNX Runtime's fused operators.

    Raises:
        GraphError: the graph is not static, or an Attention or GroupNormalization has a form that the
            fused operator cannot express.
    """
    require(model, 21, "ort_fused")
    if not is_static(model):
        raise GraphError(
            "ort_fused takes a graph with static shapes; the lowering 'static' has to run before"
        )
    editor = Editor(model)
    entry = editor.model.opset_import.add()
    entry.domain, entry.version = MICROSOFT, 1
    fuse_attention(editor)
    fuse_group_norm(editor)
    fuse_skip_layer_norm(editor)
    fuse_geglu(editor)
    fuse_gelu(editor)
    fuse_quick_gelu(editor)
    lowered = editor.finish()
    left = [node for node in lowered.graph.node if node.op_type == "Attention"]
    if left:
        raise GraphError(f"{describe(left[0])} was not fused")
    check(lowered)
    return lowered


def fuse_attention(editor: Editor) -> None:
    """Attention as MultiHeadAttention, which takes heads side by side in the last axis.

    Raises:
        GraphError: see ``decompose.attention_scale``; or the mask is not of the queries' type.
    """
    for node in editor.live("Attention"):
        scale, heads = attention_scale(editor, node), editor.shape(node.input[0])[1]
        sources = [_side_by_side(editor, name) for name in node.input[:3]]
        mask = node.input[3] if len(node.input) > 3 else ""
        if mask and editor.elem(mask) != editor.elem(node.input[0]):
            raise GraphError(
                f"the mask of {describe(node)} is not of its queries' type; MultiHeadAttention adds it"
            )
        if mask and len(editor.shape(mask)) != 4:
            raise GraphError(
                f"the mask of {describe(node)} has the shape {editor.shape(mask)}, expected 4 axes"
            )
        after = editor.only_user(node.output[0], "Transpose")
        flat = editor.only_user(after.output[0], "Reshape") if after is not None else None
        batch, _, tokens, _ = editor.shape(node.input[0])
        width = heads * editor.shape(node.input[2])[3]
        inputs = [*sources, "", "", mask] if mask else sources
        facts: dict[str, Any] = {"domain": MICROSOFT, "num_heads": heads, "scale": scale}
        merged = (
            after is not None
            and flat is not None
            and attribute(after, "perm") == _HEADS
            and editor.shape(flat.output[0]) == (batch, tokens, width)
        )
        editor.drop(node)
        if merged and after is not None and flat is not None:
            editor.drop(after, flat)
            editor.emit("MultiHeadAttention", inputs, flat.output[0], **facts)
            continue
        joined = editor.emit("MultiHeadAttention", inputs, **facts)
        split = editor.constant(np.array([batch, tokens, heads, width // heads], np.int64))
        editor.emit("Transpose", [editor.emit("Reshape", [joined, split])], node.output[0], perm=_HEADS)


def _side_by_side(editor: Editor, name: str) -> str:
    """(batch, heads, tokens, channels) as (batch, tokens, heads x channels)."""
    batch, heads, tokens, channels = editor.shape(name)
    wanted = (batch, tokens, heads * channels)
    turned = editor.producer(name, "Transpose")
    if turned is not None and attribute(turned, "perm") == _HEADS:
        split = editor.producer(turned.input[0], "Reshape")
        if split is not None and editor.shape(split.input[0]) == wanted:
            return split.input[0]
    back = editor.emit("Transpose", [name], perm=_HEADS)
    return editor.emit("Reshape", [back, editor.constant(np.array(wanted, np.int64))])


def fuse_group_norm(editor: Editor) -> None:
    """GroupNormalization, and the SiLU after it, as GroupNorm with channels last, if its kernel takes it."""
    for node in editor.live("GroupNormalization"):
        source, gamma, beta = node.input
        shape, groups = editor.shape(source), int(attribute(node, "num_groups"))
        if len(shape) not in (3, 4) or shape[1] % (2 * groups):
            continue
        output, activation = node.output[0], 0
        silu = _silu(editor, output)
        editor.drop(node)
        if silu is not None:
            output, activation = silu[1].output[0], 1
            editor.drop(*silu)
        facts: dict[str, Any] = {
            "domain": MICROSOFT,
            "epsilon": attribute(node, "epsilon", 1e-5),
            "groups": groups,
            "activation": activation,
            "channels_last": 1,
        }
        if len(shape) == 4:
            last = editor.emit("Transpose", [source], perm=[0, 2, 3, 1])
            normal = editor.emit("GroupNorm", [last, gamma, beta], **facts)
            editor.emit("Transpose", [normal], output, perm=[0, 3, 1, 2])
            continue
        last = editor.emit("Transpose", [source], perm=[0, 2, 1])
        high = editor.constant(np.array([shape[0], shape[2], 1, shape[1]], np.int64))
        flat = editor.constant(np.array([shape[0], shape[2], shape[1]], np.int64))
        normal = editor.emit("GroupNorm", [editor.emit("Reshape", [last, high]), gamma, beta], **facts)
        editor.emit("Transpose", [editor.emit("Reshape", [normal, flat])], output, perm=[0, 2, 1])


def _silu(editor: Editor, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The Sigmoid and the Mul of ``x sigmoid(x)``, if nothing else reads x."""
    users = editor.users(name)
    sigmoids = [user for user in users if user.op_type == "Sigmoid"]
    if len(users) != 2 or len(sigmoids) != 1 or name in editor.outputs:
        return None
    product = editor.only_user(sigmoids[0].output[0], "Mul")
    if product is None or set(product.input) != {name, sigmoids[0].output[0]}:
        return None
    return sigmoids[0], product
