"""Take whole operators apart into primitives of opset 17: Attention, GroupNormalization, Gelu."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ...errors import GraphError
from .editor import Editor
from .inference import attribute, describe

if TYPE_CHECKING:
    import onnx

# Rows of queries are taken in parts when the logits of one attention have more elements than this: 1 GiB in
# float32, 0.5 GiB in fp16. Stable Diffusion 1.5 at 512 x 512 with guidance just fits (2 x 8 x 4096 x 4096).
LOGITS_LIMIT = 1 << 28


def split_scale(scale: float) -> tuple[float, float]:
    """Two factors of an attention's scale, for the queries and for the keys, both near its square root.

    Both operands are scaled before the product, so that the product cannot leave the range of fp16 before
    it is scaled. The first factor is a power of two, so it costs no rounding in any float type; when the
    scale is one itself (heads of 64 or 256 channels), the second is one, too.
    """
    first = 2.0 ** round(math.log2(math.sqrt(scale)))
    return first, scale / first


def attention_scale(editor: Editor, node: onnx.NodeProto) -> float:
    """The scale of an Attention whose inputs are (batch, heads, tokens, channels).

    Raises:
        GraphError: it does what no graph of a diffusion model needs: caches, soft caps, causal flags, other
            numbers of heads for keys, or 3-dimensional inputs.
    """
    query, key, value = (editor.shape(name) for name in node.input[:3])
    plain = (
        len(query) == len(key) == len(value) == 4
        and query[1] == key[1] == value[1]
        and query[3] == key[3]
        and not any(node.input[4:])
        and not any(node.output[1:])
        and not attribute(node, "is_causal", 0)
        and not attribute(node, "softcap", 0.0)
    )
    if not plain:
        raise GraphError(
            f"{describe(node)} cannot be lowered: expected inputs (batch, heads, tokens, channels), as many "
            f"heads in each, no cache, no soft cap and no causal flag; got the shapes {query}, {key}, {value}"
        )
    scale = float(attribute(node, "scale", 1.0 / math.sqrt(query[3])))
    if scale <= 0:
        raise GraphError(f"{describe(node)} has the scale {scale}, expected a positive one")
    return scale


def split_attention(editor: Editor, limit: int = LOGITS_LIMIT) -> None:
    """``softmax(Q K' scale + mask) V`` in primitives (Vaswani et al. 1706.03762).

    Args:
        editor: the graph.
        limit: how many logits may exist at once; beyond that the queries are taken in parts.
    """
    for node in editor.live("Attention"):
        query_scale, key_scale = split_scale(attention_scale(editor, node))
        query, key, value, mask = (*node.input, "")[:4]
        shape, tokens = editor.shape(query), editor.shape(key)[2]
        query = editor.emit("Mul", [query, _scalar(editor, node, query_scale)])
        key = editor.emit("Mul", [_turned_keys(editor, key), _scalar(editor, node, key_scale)])
        mask = _additive(editor, node, mask)
        rows = max(1, limit // (shape[0] * shape[1] * tokens))
        editor.drop(node)
        if rows >= shape[2]:
            _attend(editor, query, key, value, mask, node.output[0])
            continue
        sizes = [min(rows, shape[2] - start) for start in range(0, shape[2], rows)]
        split = editor.constant(np.array(sizes, np.int64))
        queries = [editor.fresh(f"{node.output[0]}_query") for _ in sizes]
        editor.emit("Split", [query, split], queries, axis=2)
        masks = [mask] * len(sizes)
        if mask and editor.shape(mask)[-2] != 1:
            masks = [editor.fresh(f"{node.output[0]}_mask") for _ in sizes]
            editor.emit("Split", [mask, split], masks, axis=len(editor.shape(mask)) - 2)
        parts = [_attend(editor, q, key, value, m, "") for q, m in zip(queries, masks, strict=True)]
        editor.emit("Concat", parts, node.output[0], axis=2)


def _attend(editor: Editor, query: str, key: str, value: str, mask: str, output: str) -> str:
    logits = editor.emit("MatMul", [query, key])
    if mask:
        logits = editor.emit("Add", [logits, mask])
    return editor.emit("MatMul", [editor.emit("Softmax", [logits], axis=-1), value], output)


def _turned_keys(editor: Editor, key: str) -> str:
    """Keys as (batch, heads, channels, tokens); a transposition that is there already takes it over."""
    before = editor.producer(key, "Transpose")
    if before is not None and list(attribute(before, "perm")) == [0, 2, 1, 3]:
        return editor.emit("Transpose", [before.input[0]], perm=[0, 2, 3, 1])
    return editor.emit("Transpose", [key], perm=[0, 1, 3, 2])


def _additive(editor: Editor, node: onnx.NodeProto, mask: str) -> str:
    """A mask that is added to the logits; one of truth values keeps what is true."""
    import onnx

    if not mask or editor.elem(mask) == editor.elem(node.input[0]):
        return mask
    if editor.elem(mask) != onnx.TensorProto.BOOL:
        raise GraphError(f"the mask of {describe(node)} is of another type than its queries, and not bool")
    keep, drop = _scalar(editor, node, 0.0), _scalar(editor, node, -math.inf)
    added = editor.emit("Where", [mask, keep, drop])
    editor.types[added] = onnx.helper.make_tensor_type_proto(editor.elem(node.input[0]), editor.shape(mask))
    return added


def _scalar(editor: Editor, node: onnx.NodeProto, value: float) -> str:
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(editor.elem(node.input[0]))
    return editor.constant(np.array(value, kind))


def split_group_norm(editor: Editor) -> None:
    """GroupNormalization (Wu and He 1803.08494) as InstanceNormalization of the groups, then scale and bias.

    Raises:
        GraphError: the channels cannot be divided into the groups.
    """
    for node in editor.live("GroupNormalization"):
        source, gamma, beta = node.input
        shape, groups = editor.shape(source), int(attribute(node, "num_groups"))
        if shape[1] % groups or editor.shape(gamma) != (shape[1],):
            raise GraphError(
                f"{describe(node)} has {shape[1]} channels, {groups} groups and a scale of shape "
                f"{editor.shape(gamma)}; expected groups of equal size and one scale for each channel"
            )
        editor.drop(node)
        rows = [shape[0], groups, math.prod(shape[1:]) // groups]
        grouped = editor.emit("Reshape", [source, editor.constant(np.array(rows, np.int64))])
        ones = editor.constant(np.ones(groups, np.float32), "kiln_ones")
        zeros = editor.constant(np.zeros(groups, np.float32), "kiln_zeros")
        normal = editor.emit(
            "InstanceNormalization", [grouped, ones, zeros], epsilon=attribute(node, "epsilon", 1e-5)
        )
        normal = editor.emit("Reshape", [normal, editor.constant(np.array(shape, np.int64))])
        columns = editor.constant(np.array([shape[1], *[1] * (len(shape) - 2)], np.int64))
        scaled = editor.emit("Mul", [normal, editor.emit("Reshape", [gamma, columns])])
        editor.emit("Add", [scaled, editor.emit("Reshape", [beta, columns])], node.output[0])


def split_gelu(editor: Editor) -> None:
    """Gelu (Hendrycks and Gimpel 1606.08415): ``x/2 (1 + erf(x/sqrt 2))``, or the tanh form."""
    for node in editor.live("Gelu"):
        x = node.input[0]
        editor.drop(node)
        if attribute(node, "approximate", "none") == "tanh":
            cube = editor.emit("Mul", [editor.emit("Mul", [x, x]), x])
            inner = editor.emit("Add", [x, editor.emit("Mul", [cube, _scalar(editor, node, 0.044715)])])
            inner = editor.emit("Mul", [inner, _scalar(editor, node, math.sqrt(2 / math.pi))])
            bent = editor.emit("Tanh", [inner])
        else:
            bent = editor.emit("Erf", [editor.emit("Mul", [x, _scalar(editor, node, math.sqrt(0.5))])])
        bent = editor.emit("Add", [bent, _scalar(editor, node, 1.0)])
        halved = editor.emit("Mul", [x, _scalar(editor, node, 0.5)])
        editor.emit("Mul", [halved, bent], node.output[0])
