"""Fuse what stands between the products of a transformer block: biases, activations, sums and norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .editor import Editor
from .inference import MICROSOFT, attribute

if TYPE_CHECKING:
    import onnx

# What ONNX Runtime's CUDA kernel of BiasSplitGelu is compiled for: SD1 and SD2 at all levels, SDXL's two.
SPLIT_GELU_WIDTHS = (2560, 5120, 10240)


def biased(editor: Editor, name: str) -> tuple[onnx.NodeProto, str, str] | None:
    """The Add of a bias, what it adds to, and the bias: a weight with one axis."""
    node = editor.producer(name, "Add")
    if node is None:
        return None
    for source, bias in (tuple(node.input), tuple(reversed(node.input))):
        if editor.is_weight(bias) and len(editor.shape(bias)) == 1 and not editor.is_weight(source):
            return node, source, bias
    return None


def fuse_skip_layer_norm(editor: Editor) -> None:
    """``LayerNormalization(a + b)`` as SkipLayerNormalization, whose fourth output is the sum.

    A bias that was added to one of the two just before is taken in as well.
    """
    for node in editor.live("LayerNormalization"):
        total = editor.producer(node.input[0], "Add")
        shape = editor.shape(node.input[0])
        if (
            total is None
            or len(shape) != 3
            or attribute(node, "axis", -1) not in (-1, 2)
            or len(node.input) < 3
        ):
            continue
        if any(node.output[1:]) or any(editor.shape(name) != shape for name in total.input):
            continue
        inputs = [*total.input, node.input[1], node.input[2]]
        for index in (0, 1):
            found = biased(editor, inputs[index])
            if found is not None and editor.read_only_by(inputs[index], total) and len(inputs) == 4:
                before, inputs[index], bias = found
                inputs.append(bias)
                editor.drop(before)
        editor.drop(node, total)
        outputs = [node.output[0], "", "", total.output[0]]
        epsilon = attribute(node, "epsilon", 1e-5)
        editor.emit("SkipLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=epsilon)


def fuse_geglu(editor: Editor) -> None:
    """``(x + b)[first half] gelu((x + b)[second half])`` as BiasSplitGelu, if its kernel takes the width."""
    for gelu in editor.live("Gelu"):
        split = editor.producer(gelu.input[0], "Split")
        product = editor.only_user(gelu.output[0], "Mul")
        if split is None or product is None or attribute(gelu, "approximate", "none") != "none":
            continue
        shape = editor.shape(split.input[0])
        halves = len(split.output) == 2 and editor.shape(split.output[0]) == editor.shape(split.output[1])
        last = attribute(split, "axis", 0) in (-1, len(shape) - 1)
        if not (halves and last and len(shape) == 3 and shape[2] in SPLIT_GELU_WIDTHS):
            continue
        value, gate = split.output
        ours = (
            gate == gelu.input[0]
            and set(product.input) == {value, gelu.output[0]}
            and editor.read_only_by(value, product)
            and editor.read_only_by(gate, gelu)
            and editor.read_only_by(split.input[0], split)
        )
        found = biased(editor, split.input[0])
        if not ours or found is None:
            continue
        add, source, bias = found
        editor.drop(add, split, gelu, product)
        editor.emit("BiasSplitGelu", [source, bias], product.output[0], domain=MICROSOFT)


def fuse_gelu(editor: Editor) -> None:
    """``gelu(x + b)`` as BiasGelu, in its tanh form as FastGelu."""
    for gelu in editor.live("Gelu"):
        found = biased(editor, gelu.input[0])
        if found is None or not editor.read_only_by(gelu.input[0], gelu):
            continue
        add, source, bias = found
        exact = attribute(gelu, "approximate", "none") == "none"
        editor.drop(add, gelu)
        kind = "BiasGelu" if exact else "FastGelu"
        editor.emit(kind, [source, bias], gelu.output[0], domain=MICROSOFT)


def fuse_quick_gelu(editor: Editor) -> None:
    """``x sigmoid(a x)`` as QuickGelu; SiLU is the case of ``a`` being 1."""
    for sigmoid in editor.live("Sigmoid"):
        product = editor.only_user(sigmoid.output[0], "Mul")
        if product is None:
            continue
        x = next((name for name in product.input if name != sigmoid.output[0]), "")
        alpha, scaled = 1.0, None
        if sigmoid.input[0] != x:
            scaled = editor.producer(sigmoid.input[0], "Mul")
            factor = _factor(editor, scaled, x) if scaled is not None else None
            if factor is None or not editor.read_only_by(sigmoid.input[0], sigmoid):
                continue
            alpha = factor
        editor.drop(sigmoid, product, *([scaled] if scaled is not None else []))
        editor.emit("QuickGelu", [x], product.output[0], domain=MICROSOFT, alpha=alpha)


def _factor(editor: Editor, product: onnx.NodeProto, x: str) -> float | None:
    """The constant that a product multiplies x by."""
    if x not in product.input:
        return None
    others = [name for name in product.input if name != x]
    return editor.number(others[0]) if len(others) == 1 else None
