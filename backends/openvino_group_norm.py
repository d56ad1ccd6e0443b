"""Lowering for OpenVINO: group normalization with channels last, as convolutions leave and take them.

Group normalization (Wu & He 1803.08494) takes the mean and the variance of each group of channels over all
pixels. OpenVINO computes both by its MVN, which knows groups with channels first only, while its bf16 and
int8 convolutions have channels last: the image is turned before, and back afterwards. Here the sums are taken
channel by channel, which any layout allows, and those of a group added:

    mean = E[x]        variance = E[x^2] - mean^2        y = (x - mean) (gamma / sqrt(variance + eps)) + beta

The last line is one kernel, together with the SiLU and the quantization behind it. On two cores of Zen 4 what
stands between two convolutions of 2x320x64x64 takes 1.8 ms in place of 3.4 in bf16, 2.0 of 3.4 in int8.

Where one number t is added to all pixels of a channel before, as a residual block does with what it makes of
the timestep, that is no pass over the image either: (x + t) has the mean E[x] + t and the square
E[x^2] + t (2 E[x] + t), and t - mean takes the place of -mean.

The difference of two large numbers wants float32, and under the hint bf16 every value between two kernels is
rounded to 8 bits. Nodes that carry the mark ``DisablePrecisionConversion`` (``openvino/core`` rt_info) are
left in float32. The mark can be read from a file of OpenVINO's own format and not be set from Python, so
what happens to the sums is such a file, read once and copied for each layer. What the last kernel adds it is
given as the sum of two numbers of 8 bits (Dekker 1971), since an error there moves a whole channel.

A layer becomes 26 nodes more, and those take 20 ms to compile, so only large images are worth it: 15 of the
61 layers of Stable Diffusion 1.5's UNet at 512x512, and all of its VAE's. The three layers that guidance
shares have half the batch: by their size they gain 0.06 % of a step, and they cost 3 % of the compilation.
A model with activations in int8 has a shorter step and takes three times as long to compile: there 0.7 % of
the step are had by 31 layers more, all but those of 8x8 pixels, which would gain nothing more.

Precondition: static shapes; ``GroupNormalization`` of ``(n, c, h, w)`` whose scale and bias are stored, and
whose n c h w is ``LEAST`` or more, ``LEAST_INT8`` if the model quantizes. Postcondition: none of these is
left.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .openvino_numbers import integers, number
from .openvino_storage import stored_values

# 2026.2.1 has another mark, and loses it where it joins value by value operators to one kernel.
MARKED_SINCE = (2026, 4)
_MARK = '<attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16,bf16"/>'
LEAST, LEAST_INT8 = 1 << 21, 1 << 19
_UNMARKED = ("Const", "Parameter", "Result")
_PIXELS = (2, 3)
_SPLITTER = 2.0**16 + 1  # leaves the 8 bits of bf16 out of float32's 24


def normalize_channels_last(core: Any, model: Any) -> int:
    """Rewrite every group normalization that fits; how many there were.

    Args:
        core: ``openvino.Core``.
        model: an ``openvino.Model``, changed in place.
    """
    ops = model.get_ordered_ops()
    least = LEAST_INT8 if any(op.get_type_name() == "FakeQuantize" for op in ops) else LEAST
    fitting = [_Layer.of(op) for op in ops if _fits(op, least)]
    kinds = {kind: _read(core, *kind) for kind in {layer.kind for layer in fitting}}
    for layer in fitting:
        normal = _normalized(layer, kinds[layer.kind].clone())
        normal.set_friendly_name(layer.op.get_friendly_name())
        layer.op.output(0).replace(normal.output(0))
    if fitting:
        model.validate_nodes_and_infer_types()
    return len(fitting)


@dataclass(frozen=True)
class _Layer:
    """A group normalization of ``image``, to which ``shift`` of one pixel is added before, or nothing."""

    op: Any
    image: Any
    shift: Any | None

    @property
    def kind(self) -> tuple[int, bool]:
        """What the model of the sums depends on: the number of groups, and whether there is a shift."""
        return self.op.get_attributes()["num_groups"], self.shift is not None

    @classmethod
    def of(cls, op: Any) -> _Layer:
        """The layer, and the addition before it if nothing else reads that."""
        before, shape = op.input_value(0).get_node(), list(op.input_value(0).get_shape())
        if before.get_type_name() == "Add" and len(before.output(0).get_target_inputs()) == 1:
            for image, shift in (before.input_values(), before.input_values()[::-1]):
                if list(image.get_shape()) == shape and list(shift.get_shape()) == [*shape[:2], 1, 1]:
                    return cls(op, image, shift)
        return cls(op, op.input_value(0), None)


def _fits(op: Any, least: int) -> bool:
    if op.get_type_name() != "GroupNormalization" or op.get_output_partial_shape(0).is_dynamic:
        return False
    shape = list(op.output(0).get_shape())
    if len(shape) != 4 or math.prod(shape) < least:
        return False
    return all(stored_values(op.input_value(i)) is not None for i in (1, 2))


def _normalized(layer: _Layer, sums: Any) -> Any:
    """The nodes that stand for one layer."""
    from openvino import opset13 as ops

    _, channels, height, width = layer.image.get_shape()
    how = layer.op.get_attributes()
    grouped = (1, how["num_groups"], channels // how["num_groups"])
    count = height * width * grouped[2]
    gamma, beta = (_float32(layer.op.input_value(i)) for i in (1, 2))
    # Axes that are dropped, not kept with one pixel, may lie last before and be gone after, in any layout.
    given = {
        "mean": ops.reduce_mean(layer.image, integers(*_PIXELS), False),
        "length": ops.reduce_l2(layer.image, integers(*_PIXELS), False),
        "gamma": ops.constant(gamma.reshape(grouped) * np.float32(np.sqrt(count))),
        "ones": ops.constant(np.ones(grouped, np.float32)),
        "count": number(count),
        "eps": number(count * how["epsilon"]),
    }
    if layer.shift is not None:
        given["shift"] = ops.reshape(layer.shift, integers(0, -1), True)
        given["pixels"] = number(height * width)
    for parameter in sums.get_parameters():
        parameter.output(0).replace(given[parameter.get_friendly_name()].output(0))
    high, low, factor = (
        ops.reshape(result.input_value(0), integers(0, -1, 1, 1), True) for result in sums.get_results()
    )
    centred = ops.subtract(ops.subtract(layer.image, high), low)
    return ops.add(ops.multiply(centred, factor), ops.constant(beta.reshape(1, channels, 1, 1)))


def _read(core: Any, groups: int, shifted: bool) -> Any:
    """The marked model of the sums, with constants that belong to no file.

    Those of a file are kept out of the cache of compiled models, and looked for among the weights later.
    """
    from openvino import opset13

    sums = core.read_model(*_marked_sums(groups, shifted))
    for op in sums.get_ordered_ops():
        if op.get_type_name() == "Constant":
            op.output(0).replace(opset13.constant(op.get_data()).output(0))
    return sums


@functools.cache
def _marked_sums(groups: int, shifted: bool) -> tuple[bytes, Any]:
    """What is done to the sums of the channels in OpenVINO's format, every node marked; and its constants."""
    import openvino

    with tempfile.TemporaryDirectory(prefix="kiln-") as folder:
        graph, constants = Path(folder) / "sums.xml", Path(folder) / "sums.bin"
        openvino.serialize(_sums(groups, shifted), str(graph), str(constants))
        lines = graph.read_text(encoding="utf-8").splitlines()
        data = np.frombuffer(constants.read_bytes(), np.uint8)
    return "\n".join(map(_marked, lines)).encode(), openvino.Tensor(data.copy())


def _marked(line: str) -> str:
    layer = re.search(r'<layer .*type="(\w+)".*[^/]>$', line)
    if layer is None or layer[1] in _UNMARKED:
        return line
    return f"{line}<rt_info>{_MARK}</rt_info>"


def _sums(groups: int, shifted: bool) -> Any:
    """A model of the sums: of mean and length of each channel two parts of what is taken off, and the factor.

    No difference to a constant and no quotient: OpenVINO writes them as other operators, which lose the mark.
    All between the sums by group and the results becomes one kernel.
    """
    import openvino
    from openvino import opset13 as ops

    given: list[Any] = []

    def parameter(name: str, *shape: int) -> Any:
        given.append(ops.parameter(openvino.PartialShape(list(shape)), np.float32))
        given[-1].set_friendly_name(name)
        return given[-1]

    def by_group(node: Any) -> Any:
        return ops.reshape(node, integers(0, groups, -1), True)

    mean, length = parameter("mean", -1, -1), parameter("length", -1, -1)
    gamma, ones = parameter("gamma", 1, groups, -1), parameter("ones", 1, groups, -1)
    count, eps = parameter("count"), parameter("eps")
    if shifted:
        shift, pixels = parameter("shift", -1, -1), parameter("pixels")
        more = ops.multiply(ops.multiply(shift, pixels), ops.add(ops.add(mean, mean), shift))
        squares = ops.reduce_sum(by_group(ops.add(ops.multiply(length, length), more)), integers(2), True)
        mean = ops.add(mean, shift)
    else:
        lengths = ops.reduce_l2(by_group(length), integers(2), True)
        squares = ops.multiply(lengths, lengths)
    centre = ops.reduce_mean(by_group(mean), integers(2), True)
    # Rounding may leave a variance of nothing below zero.
    variance = ops.relu(ops.subtract(squares, ops.multiply(ops.multiply(centre, centre), count)))
    factor = ops.multiply(ops.power(ops.add(variance, eps), number(-0.5)), gamma)
    taken = ops.multiply(centre, ones)
    if shifted:
        taken = ops.subtract(taken, by_group(shift))
    large = ops.multiply(taken, number(_SPLITTER))
    high = ops.subtract(large, ops.subtract(large, taken))
    low = ops.subtract(taken, high)
    return openvino.Model([high, low, factor], given, "sums")


def _float32(output: Any) -> np.ndarray:
    values = stored_values(output)
    assert values is not None
    return values.astype(np.float32)
