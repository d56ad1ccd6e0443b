"""Keep a VAE's activations inside fp16 by scaling what only ever reaches normalisations.

SDXL's VAE sums residual branches to values beyond 65504, which is infinity in fp16. Whatever is normalised
next can be multiplied by any s if the normalisation's epsilon is multiplied by s squared: the result is the
same number. So everything linear before a GroupNormalization is scaled by a power of two: inputs of the
convolutions and projections that begin it, and biases on the way. A power of two costs no rounding, so in
fp32 the network computes the same; no weight is touched. stable-diffusion.cpp scales convolutions of this
VAE by the same factor and back; here nothing has to be scaled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .editor import Editor
from .inference import MICROSOFT, attribute

if TYPE_CHECKING:
    import onnx

# 2 ** -5 lets activations grow to 2.1 million. A smaller factor would push small values below 6.1e-5, where
# fp16 loses digits and some AMD matrix units give zero.
FACTOR = 2.0**-5

_NORMS = (("GroupNormalization", ""), ("InstanceNormalization", ""), ("GroupNorm", MICROSOFT))
_MOVES = ("Reshape", "Transpose", "Resize", "Unsqueeze", "Squeeze", "Pad", "Identity", "Concat")
_PRODUCTS = ("Conv", "MatMul", "Gemm")


def rescale(editor: Editor, factor: float = FACTOR) -> int:
    """Scale the linear part before each normalisation; how many normalisations see scaled values now.

    A value that is also read by something else than linear operators and normalisations keeps its scale
    there: it is multiplied back for that reader.

    Args:
        editor: the graph, float32.
        factor: a power of two.
    """
    norms = [node for kind, domain in _NORMS for node in editor.live(kind, domain=domain)]
    stream = _linear_before(editor, [node.input[0] for node in norms])
    if not stream:
        return 0
    entry = editor.constant(np.array(factor, np.float32), "kiln_scale")
    back = editor.constant(np.array(1 / factor, np.float32), "kiln_unscale")
    scaled_inputs: dict[str, str] = {}
    for name in sorted(stream):
        node = editor.producer(name)
        assert node is not None, name  # what the graph is given is never part of the stream
        _scale_producer(editor, node, stream, entry, scaled_inputs)
    touched = 0
    for node in norms:
        if node.input[0] in stream:
            _set_float(node, "epsilon", attribute(node, "epsilon", 1e-5) * factor**2)
            touched += 1
    readers = {id(node) for node in norms}
    for name in sorted(stream):
        others = [n for n in editor.users(name) if id(n) not in readers and not stream.intersection(n.output)]
        if others:
            _restore(editor, name, others, back)
    return touched


def _linear_before(editor: Editor, names: list[str]) -> set[str]:
    """The values before some others that are linear in each other: sums, products, moved data."""
    stream: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        node = editor.producer(name)
        if name in stream or node is None or node.domain or name in editor.outputs or editor.is_weight(name):
            continue
        if node.op_type == "Add":
            sources = [source for source in node.input if not editor.is_weight(source)]
        elif node.op_type in _PRODUCTS and editor.is_weight(node.input[1]):
            # What a product reads joins only if it is linear for another reason: a bent value
            # (an activation) is scaled where the product reads it.
            sources = [node.input[0]]
        elif node.op_type in _MOVES:
            sources = list(node.input) if node.op_type == "Concat" else [node.input[0]]
        else:
            continue
        stream.add(name)
        stack.extend(sources)
    return stream


def _scale_producer(
    editor: Editor, node: onnx.NodeProto, stream: set[str], entry: str, scaled: dict[str, str]
) -> None:
    """Scale what a node of the stream reads from outside of it."""
    data = range(len(node.input)) if node.op_type in ("Add", "Concat") else [0]
    if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
        data = [0, 2]
    for index in data:
        name = node.input[index]
        if name in stream:
            continue
        if name not in scaled:
            scaled[name] = editor.emit("Mul", [name, entry])
            editor.types[scaled[name]] = editor.types[name]
        node.input[index] = scaled[name]


def _restore(editor: Editor, name: str, readers: list[onnx.NodeProto], back: str) -> None:
    """Multiply a scaled value back for readers that are neither linear nor a normalisation."""
    restored = editor.emit("Mul", [name, back])
    for reader in readers:
        for index, source in enumerate(reader.input):
            if source == name:
                reader.input[index] = restored


def _set_float(node: onnx.NodeProto, name: str, value: float) -> None:
    for entry in node.attribute:
        if entry.name == name:
            entry.f = value
            return
    import onnx

    node.attribute.append(onnx.helper.make_attribute(name, float(value)))
