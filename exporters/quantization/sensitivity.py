"""Which layers int8 hurts: quantize one group of activations at a time and see how far the output moves.

One graph has all groups inside, each behind a switch that is an input: so the network is compiled once, and a
group costs one run for each point of the trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...backends.base import Arrays
from ...metrics import relative_l2
from .engines import Run
from .qdq import Operand
from .quantize import ActivationRange

if TYPE_CHECKING:
    import onnx

SWITCHES = "int8_switches"
_BLOCK = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+"
)
_LAYER = re.compile(
    r"\.(conv1|conv2|conv_shortcut|proj_in|proj_out|attn[12](?:\.scores)?|ff\.net\.0|ff\.net\.2)\b"
)
_APART = ("scores", "conv_shortcut")  # groups of their own also where a block is one group


def coarse_group(layer: str) -> str:
    """The group of a layer in a large network: its resnet, attention block or resampling.

    Queries and keys of the attentions of a block are a group of their own: they may hurt where the linear
    layers do not. So is a resnet's shortcut: its input is not normalized, and it is little work.
    """
    block = _BLOCK.match(layer)
    if not block:
        return layer.removesuffix(".weight")
    part = next((name for name in _APART if f".{name}." in layer), None)
    return f"{block.group()}.{part}" if part else block.group()


def fine_group(layer: str) -> str:
    """The group of a layer in a small network: the part of the block it belongs to."""
    block, part = _BLOCK.match(layer), _LAYER.search(layer)
    return f"{block.group()}.{part.group(1)}" if block and part else coarse_group(layer)


def grouped(figures: Mapping[str, float], group_of: Callable[[str], str]) -> dict[str, float]:
    """The sums of figures of layers, by group."""
    sums: dict[str, float] = {}
    for layer, figure in figures.items():
        group = group_of(layer)
        sums[group] = sums.get(group, 0.0) + figure
    return sums


def switched_graph(
    graph: onnx.ModelProto,
    operands: Sequence[Operand],
    ranges: Mapping[str, ActivationRange],
    group_of: Callable[[str], str] = fine_group,
) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a graph whose operands are ``x + switch * (uint8(x) - x)``; and the groups, one a switch.

    The rounding is written out instead of as ``QuantizeLinear``, so that no engine makes int8 kernels of it.
    """
    import onnx
    from onnx import helper

    made = onnx.ModelProto()
    made.CopyFrom(graph)
    able = [operand for operand in operands if operand.tensor in ranges]
    groups = list(dict.fromkeys(group_of(operand.layer) for operand in able))
    made.graph.input.append(helper.make_tensor_value_info(SWITCHES, onnx.TensorProto.FLOAT, [len(groups)]))
    wanted = {operand.node: (operand.tensor, group_of(operand.layer)) for operand in able}
    done: set[tuple[str, str]] = set()
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if node.name in wanted:
            tensor, group = wanted[node.name]
            index = groups.index(group)
            if (tensor, group) not in done:
                done.add((tensor, group))
                nodes += _switched(made, tensor, index, ranges[tensor])
            node.input[0] = f"{tensor}__switched_{index}"
        nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made, groups


def _switched(
    graph: onnx.ModelProto, tensor: str, index: int, given: ActivationRange
) -> list[onnx.NodeProto]:
    import onnx
    from onnx import helper

    stem = f"{tensor}__switched_{index}"
    zero = given.zero_point
    constants = {
        f"{stem}_index": np.array(index, np.int64),
        f"{stem}_scale": np.array(given.scale, np.float32),
        f"{stem}_least": np.array(-zero, np.float32),
        f"{stem}_most": np.array(255 - zero, np.float32),
    }
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    steps = [
        ("Div", [tensor, f"{stem}_scale"], "steps"),
        ("Round", [f"{stem}_steps"], "rounded"),
        ("Clip", [f"{stem}_rounded", f"{stem}_least", f"{stem}_most"], "cut"),
        ("Mul", [f"{stem}_cut", f"{stem}_scale"], "again"),
        ("Sub", [f"{stem}_again", tensor], "moved"),
        ("Gather", [SWITCHES, f"{stem}_index"], "switch"),
        ("Mul", [f"{stem}_moved", f"{stem}_switch"], "share"),
    ]
    nodes = [helper.make_node(op, inputs, [f"{stem}_{name}"]) for op, inputs, name in steps]
    return [*nodes, helper.make_node("Add", [tensor, f"{stem}_share"], [stem])]


def measure_sensitivity(
    run: Run, groups: Sequence[str], points: Sequence[Arrays], targets: Sequence[np.ndarray]
) -> tuple[dict[str, float], float]:
    """The error of the UNet's output with one group quantized, for every group; and with all of them.

    Args:
        run: an opened ``switched_graph``.
        groups: as that gave them.
        points: inputs on the trajectory.
        targets: the outputs in fp32 at these.

    Returns:
        Root mean square over the points of the relative L2 error, by group, largest first; the same for all.
    """

    def error(switches: np.ndarray) -> float:
        errors = [
            relative_l2(run({**feeds, SWITCHES: switches})["out_sample"], target)
            for feeds, target in zip(points, targets, strict=True)
        ]
        return float(np.sqrt(np.mean(np.square(errors))))

    alone = {
        group: error(row) for group, row in zip(groups, np.eye(len(groups), dtype=np.float32), strict=True)
    }
    together = error(np.ones(len(groups), np.float32))
    return dict(sorted(alone.items(), key=lambda item: -item[1])), together


def groups_to_keep(
    errors: Mapping[str, float], costs: Mapping[str, float], target: float, most: float
) -> list[str]:
    """The groups to leave in higher precision, until the rest is expected to reach a target.

    First comes what makes most of the squared error for what it costs. Errors of different groups are taken
    as independent, so their squares add up. Once the rest is spread as evenly as the multiplications,
    so that no group makes more of it than its share of them, it stays quantized.

    Args:
        errors: by group.
        costs: multiplications, by group.
        target: relative L2 of the output that is aimed at.
        most: the share of all groups' multiplications that may be kept at most; a group that is too large
            for what remains of it is passed over.
    """
    rest = sum(error**2 for error in errors.values())
    work = sum(costs.values())
    room = most * work
    kept: list[str] = []
    for group in sorted(errors, key=lambda group: -(errors[group] ** 2) / costs[group]):
        if rest <= target**2 or errors[group] ** 2 / rest <= costs[group] / work:
            break
        if costs[group] <= room:
            kept.append(group)
            rest -= errors[group] ** 2
            room -= costs[group]
    return kept
