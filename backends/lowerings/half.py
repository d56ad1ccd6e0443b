"""Lowerings "fp16" and "bf16": a graph whose values are of a 16-bit float type, but for islands of fp32.

Weights stored in that type are read as they are, without a Cast; others get one, which engines fold.
Inputs and outputs stay float32, as the contract has them, with a Cast at the border.

What stays in fp32, and why:

* the sinusoid of the timestep and all before it: an angle near 999 has no digits left in 16 bits;
* statistics of normalisations: sums over a group overflow. Whole operators keep them in fp32 by their
  ``stash_type``; at opset 17, where engines ignore that, the normalisation itself is an island;
* the softmax. Queries and keys are scaled before their product, each by about the square root of the scale,
  because fp16 overflows on the unscaled product of Stable Diffusion 2;
* ``DequantizeLinear``: int8 weights become fp32 by their own scales and are cast then.

A VAE in fp16 is scaled first (``rescale.py``), because SDXL's leaves the range of fp16 otherwise; then all of
it, the last blocks included, can be computed in fp16.

Precondition: a static float32 graph, canonical, in primitives or in ONNX Runtime's operators.
Postcondition: names, types and shapes of inputs and outputs as before; every convolution and product reads
16-bit values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import GraphError
from .checks import check, record_types, require
from .decompose import attention_scale, split_scale
from .editor import Editor
from .inference import MICROSOFT, attribute, describe, infer, words
from .rescale import rescale

if TYPE_CHECKING:
    import onnx

# Operators that compute in fp32 whatever their inputs are.
ISLANDS = words(
    """
    Sin Cos Softmax LogSoftmax Exp Log Pow Sqrt Reciprocal ReduceMean ReduceSum ReduceL2
    InstanceNormalization BatchNormalization DequantizeLinear QuantizeLinear
    """
)
# The operators whose speed this is about; the postcondition looks at them.
HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "MultiHeadAttention")
# The canonical form and the fused one keep statistics in fp32 by themselves from this opset on.
_STASH_OPSET = 18
_VAE = ("vae_decoder", "vae_encoder")


def to_half(model: onnx.ModelProto, component: str, kind: str) -> onnx.ModelProto:
    """A copy of ``model`` that computes in a 16-bit type.

    Args:
        model: the graph, float32.
        component: a key of ``components.CONTRACTS``; a VAE is scaled into fp16's range.
        kind: ``fp16`` or ``bf16``.

    Raises:
        GraphError: the graph is not as expected, or a constant cannot be written in the type.
    """
    import onnx

    require(model, 17, kind, ("", MICROSOFT))
    editor = Editor(model)
    if kind == "fp16" and component in _VAE:
        rescale(editor)
    _scale_attention(editor)
    staged = editor.finish()
    target = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[kind]
    lowered = _Typing(staged, target).run()
    _check_heavy(lowered, target)
    check(lowered)
    return lowered


def _scale_attention(editor: Editor) -> None:
    """Move the scale of whole attentions onto their inputs, and ask for the softmax in fp32.

    The specification says that an engine does so, but nothing keeps one from scaling the product instead.
    ONNX Runtime's MultiHeadAttention needs no help: it accumulates and scales in fp32.
    """
    import onnx

    for node in editor.live("Attention"):
        query_scale, key_scale = split_scale(attention_scale(editor, node))
        scaled = [
            editor.emit("Mul", [name, editor.constant(np.array(factor, np.float32), "kiln_scale")])
            for name, factor in zip(node.input[:2], (query_scale, key_scale), strict=True)
        ]
        mask = [name for name in node.input[3:4] if name]
        editor.drop(node)
        editor.emit(
            "Attention",
            [*scaled, node.input[2], *mask],
            node.output[0],
            scale=1.0,
            softmax_precision=onnx.TensorProto.FLOAT,
        )


class _Typing:
    """Walks a graph and gives every float value a 16-bit form, a float32 form, or both."""

    def __init__(self, model: onnx.ModelProto, target: int) -> None:
        import onnx

        self.model, self.target, self.wide_type = model, target, int(onnx.TensorProto.FLOAT)
        self.types = infer(model)
        self.opset = next(entry.version for entry in model.opset_import if not entry.domain)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.half: dict[str, str] = {}
        self.wide: dict[str, str] = {}
        self.stored: dict[str, onnx.NodeProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.names = set(self.types)
        self.islands = _before_sinusoids(model)

    def run(self) -> onnx.ModelProto:
        """Type the whole model.

        Raises:
            GraphError: a value is float64 or already 16 bit where it is no weight.
        """
        for name in [value.name for value in self.model.graph.input]:
            if self._is_float(name):
                self.wide[name] = name
        for node in self.model.graph.node:
            self._visit(node)
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input} | self.outputs
        kept = [tensor for name, tensor in self.initializers.items() if name in used]
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(copies)
        record_types(self.model)
        return self.model

    def _is_float(self, name: str) -> bool:
        return int(self.types[name].tensor_type.elem_type) == self.wide_type

    def _visit(self, node: onnx.NodeProto) -> None:
        typed = type(node).FromString(node.SerializeToString())
        if node.op_type == "Cast" and node.input[0] in self.initializers and self._is_float(node.output[0]):
            self.stored[node.output[0]] = typed
            return
        wide = self._is_island(node)
        for index, name in enumerate(node.input):
            if name and (self._is_float(name) or name in self.stored):
                keep = wide or not self._takes(node, index)
                typed.input[index] = self._wide(name) if keep else self._half(name)
        if not wide and node.op_type == "Cast" and attribute(node, "to") == self.wide_type:
            next(entry for entry in typed.attribute if entry.name == "to").i = self.target
        self.nodes.append(typed)
        for index, name in enumerate(node.output):
            if name and self._is_float(name):
                self._made(typed, index, name, wide)

    def _made(self, node: onnx.NodeProto, index: int, name: str, wide: bool) -> None:
        """Note which form of an output a node makes; outputs of the graph stay float32."""
        if wide:
            self.wide[name] = name
        elif name in self.outputs:
            node.output[index] = self.half[name] = self._fresh(f"{name}__half")
            self._cast(self.half[name], name, self.wide_type)
            self.wide[name] = name
        else:
            self.half[name] = name

    def _is_island(self, node: onnx.NodeProto) -> bool:
        if node.domain == MICROSOFT:
            return False
        if node.op_type == "LayerNormalization":
            return self.opset < _STASH_OPSET or attribute(node, "stash_type", 1) != 1
        if node.op_type == "GroupNormalization":
            return bool(attribute(node, "stash_type", 1) != 1)
        return node.op_type in ISLANDS or node.output[0] in self.islands or not self._takes(node, 0)

    def _takes(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an input of a node may be of the 16-bit type."""
        import onnx

        if node.domain == MICROSOFT:  # its CUDA kernel refuses others than float32 for scale and bias
            return node.op_type != "GroupNorm" or index == 0
        if not node.input or node.op_type == "Resize":
            return index == 0
        formal = onnx.defs.get_schema(node.op_type, self.opset).inputs
        name = onnx.TensorProto.DataType.Name(self.target).lower()
        return f"tensor({name})" in formal[min(index, len(formal) - 1)].types

    def _half(self, name: str) -> str:
        """The 16-bit form of a float value."""
        if name not in self.half:
            if name in self.stored:
                source = self.stored[name].input[0]
                same = self.initializers[source].data_type == self.target
                self.half[name] = source if same else self._cast(source, f"{name}__half", self.target)
            elif self._inside(name):
                self.half[name] = self._converted(name)
            else:
                self.half[name] = self._cast(self.wide.get(name, name), f"{name}__half", self.target)
        return self.half[name]

    def _wide(self, name: str) -> str:
        """The float32 form of a float value."""
        if name not in self.wide:
            if name in self.stored:
                self.nodes.append(self.stored[name])
                self.wide[name] = name
            elif name in self.initializers:
                self.wide[name] = name
            else:
                self.wide[name] = self._cast(self.half[name], f"{name}__wide", self.wide_type)
        return self.wide[name]

    def _inside(self, name: str) -> bool:
        import onnx

        tensor = self.initializers.get(name)
        return tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL

    def _converted(self, name: str) -> str:
        """A constant of the graph in the 16-bit type; finite values stay finite."""
        import onnx

        kind = onnx.helper.tensor_dtype_to_np_dtype(self.target)
        array = onnx.numpy_helper.to_array(self.initializers[name])
        if self.target == onnx.TensorProto.FLOAT16:
            top = np.float32(np.finfo(np.float16).max)
            array = np.where(np.isinf(array), array, np.clip(array, -top, top))
        new = self._fresh(f"{name}__half")
        # Through raw bytes: onnx has no way from a numpy array of bfloat16 that all its versions share.
        tensor = onnx.helper.make_tensor(
            new, self.target, array.shape, array.astype(kind).tobytes(), raw=True
        )
        self.initializers[new] = tensor
        return new

    def _cast(self, source: str, name: str, to: int) -> str:
        import onnx

        output = name if name in self.outputs else self._fresh(name)
        self.nodes.append(onnx.helper.make_node("Cast", [source], [output], name=f"cast_{output}", to=to))
        return output

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def _before_sinusoids(model: onnx.ModelProto) -> set[str]:
    """The values that a sine or cosine depends on, constants aside."""
    wanted: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in ("Sin", "Cos") or wanted.intersection(node.output):
            wanted.update(node.input, node.output)
    return wanted


def _check_heavy(model: onnx.ModelProto, target: int) -> None:
    """Check the postcondition.

    Raises:
        GraphError: naming an operator that reads float32.
    """
    types = infer(model)
    for node in model.graph.node:
        if node.op_type in HEAVY:
            kinds = {types[name].tensor_type.elem_type for name in node.input if name}
            if kinds != {target}:
                raise GraphError(
                    f"{describe(node)} reads the element types {sorted(kinds)}, expected {target}"
                )
