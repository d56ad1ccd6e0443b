"""Lowering for OpenVINO: a skip connection that both halves of a guided batch share is convolved once.

``openvino_guidance`` computes what lies before the prompt for one half and repeats it where it meets the
other. The UNet's first convolution is read again by its last block, as half of the channels there. A
convolution is linear in its channels, and group normalization (Wu & He 1803.08494) treats groups apart:

    conv(cat(h, s)) = conv_h(h) + conv_s(s)        norm(cat(h, s)) = cat(norm_h(h), norm_s(s))

so all that is done to ``s`` is done for one half, and repeated by the sum. In Stable Diffusion 1.5 that is a
quarter of two convolutions of 640 channels over 64x64 pixels. It changes the order of a sum, so it is left
out in fp32, where sharing is promised to change no bit.

Precondition: static shapes. A ``Concat`` of channels whose second input repeats a tensor along the batch; all
that reads it are convolutions with stored kernels, directly or behind a group normalization and value by
value operators, and no group of channels lies on both sides. Postcondition: none of these is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .openvino_storage import stored_values, stored_weight, weight

Parts = tuple[Any, Any]
_POINTWISE = ("Sigmoid", "Swish", "Multiply", "Subtract", "FakeQuantize", "Convert")


def convolve_shared_skips_once(model: Any) -> int:
    """Rewrite every such connection; how many there were.

    Args:
        model: an ``openvino.Model``, changed in place.
    """
    changed = 0
    for op in model.get_ordered_ops():
        shared = _repeated(op)
        if shared is None:
            continue
        convolutions = _convolutions_behind(op)
        known = {op.get_friendly_name(): (op.input_value(0), shared)}
        parts = [_parts(convolution.input_value(0), known) for convolution in convolutions]
        whole = [both for both in parts if both is not None]
        if not parts or len(whole) < len(parts):
            continue
        for convolution, both in zip(convolutions, whole, strict=True):
            convolution.output(0).replace(_sum(convolution, both).output(0))
        changed += 1
    return changed


def _repeated(op: Any) -> Any | None:
    """What the second input of a ``Concat`` of channels repeats along the batch."""
    if not _is_pair(op, axis=1) or len(op.output(0).get_partial_shape()) != 4:
        return None
    twice = op.input_value(1).get_node()
    if not _is_pair(twice, axis=0):
        return None
    one, other = twice.input_values()
    same = one.get_node().get_friendly_name() == other.get_node().get_friendly_name()
    return one if same and one.get_index() == other.get_index() else None


def _is_pair(op: Any, *, axis: int) -> bool:
    return (
        op.get_type_name() == "Concat"
        and op.get_input_size() == 2
        and op.get_attributes()["axis"] == axis
        and not op.output(0).get_partial_shape().is_dynamic
    )


def _convolutions_behind(op: Any) -> list[Any]:
    """Every convolution with a stored kernel that reads what ``op`` becomes; none if others do."""
    found: dict[str, Any] = {}
    waiting = [op]
    while waiting:
        for entry in waiting.pop().output(0).get_target_inputs():
            reader = entry.get_node()
            if reader.get_type_name() in ("GroupNormalization", *_POINTWISE):
                waiting.append(reader)
            elif reader.get_type_name() == "Convolution" and stored_weight(reader.input_value(1)) is not None:
                found[reader.get_friendly_name()] = reader
            else:
                return []
    return list(found.values())


def _parts(output: Any, known: dict[str, Parts]) -> Parts | None:
    """The two parts of an output's channels; None where an operator cannot be done to each part.

    Args:
        output: of the ``Concat`` or of an operator behind it.
        known: the parts of the outputs of nodes by their names, to which it is added.
    """
    op = output.get_node()
    name = op.get_friendly_name()
    if name in known:
        return known[name]
    inputs = [op.input_value(i) for i in range(op.get_input_size())]
    if op.get_type_name() == "GroupNormalization":
        before = _parts(inputs[0], known)
        made = None if before is None else _normalized(op, before)
    elif op.get_type_name() in _POINTWISE:
        split = [(one, one) if _is_number(one) else _parts(one, known) for one in inputs]
        made = None if None in split else tuple(_again(op, part) for part in zip(*split, strict=True))
    else:
        made = None
    if made is not None:
        known[name] = made
    return made


def _is_number(output: Any) -> bool:
    return int(np.prod(list(output.get_shape()))) == 1


def _again(op: Any, inputs: tuple[Any, ...]) -> Any:
    """The output of the same operator of other inputs."""
    from openvino import opset13 as ops

    kind, how = op.get_type_name(), op.get_attributes()
    if kind == "FakeQuantize":
        return ops.fake_quantize(*inputs, how["levels"]).output(0)
    if kind == "Convert":
        return ops.convert(*inputs, how["destination_type"]).output(0)
    made = {"Sigmoid": ops.sigmoid, "Swish": ops.swish, "Multiply": ops.multiply, "Subtract": ops.subtract}
    return made[kind](*inputs).output(0)


def _normalized(op: Any, parts: Parts) -> Parts | None:
    """The normalization of each part by its own groups; None where one lies in both or nothing is stored."""
    from openvino import opset13 as ops

    how = op.get_attributes()
    gamma, beta = (stored_values(op.input_value(i)) for i in (1, 2))
    size = op.output(0).get_shape()[1] // how["num_groups"]
    channels = parts[0].get_shape()[1]
    if gamma is None or beta is None or channels % size:
        return None
    made = []
    for part, own in zip(parts, (slice(channels), slice(channels, None)), strict=True):
        scale, bias = (weight(values[own].copy()) for values in (gamma, beta))
        groups = part.get_shape()[1] // size
        made.append(ops.group_normalization(part, scale, bias, groups, how["epsilon"]).output(0))
    return made[0], made[1]


def _sum(convolution: Any, parts: Parts) -> Any:
    """The node that stands for a convolution: the sum of what each part gives, the second for each half."""
    from openvino import opset13 as ops

    kernel, how = stored_weight(convolution.input_value(1)), convolution.get_attributes()
    assert kernel is not None
    channels = parts[0].get_shape()[1]
    first, second = (
        ops.convolution(
            part,
            weight(kernel.values[:, own].copy(), kernel.scale),
            how["strides"],
            how["pads_begin"],
            how["pads_end"],
            how["dilations"],
        )
        for part, own in zip(parts, (slice(channels), slice(channels, None)), strict=True)
    )
    return ops.add(first, second)
