"""How much of a network's work each operand takes part in: what leaving it in floating point costs.

The count is of multiplications, which is what a step of these networks consists of. An operand that is left
has all of them done in floats, at about twice the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .qdq import Operand, Site

if TYPE_CHECKING:
    import onnx

_QUERY, _KEY = ".scores.query", ".scores.key"


def multiplications(
    graph: onnx.ModelProto,
    chosen: Sequence[Site],
    able: Sequence[Operand],
    sizes: Mapping[str, int],
    batch: int,
) -> dict[str, float]:
    """Multiplications of one run, by the layer of each operand.

    Those of queries with keys are shared between the two operands. Where only one of these may be quantized
    the product is of floats whatever is kept, and what it costs is to round that one: its size.

    Args:
        graph: with the strides of its convolutions.
        chosen: the sites that operands with a weight stand for.
        able: the operands.
        sizes: values of each operand's tensor in that run.
        batch: of that run; queries and keys of different images do not meet.
    """
    import onnx

    sites = {site.weight: site for site in chosen}
    nodes = {node.name: node for node in graph.graph.node}
    tensors = {operand.layer: operand.tensor for operand in able}
    found = {}
    for operand in able:
        site = sites.get(operand.layer)
        if site is None:
            pair = [sizes[tensors[name]] for name in _pair(operand.layer) if name in tensors]
            width = sites[_projection(operand.layer)].shape[0]
            alone = len(pair) == 1
            found[operand.layer] = float(pair[0]) if alone else pair[0] * pair[1] / (batch * width) / 2
            continue
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[site.node].attribute}
        # Every value of the input meets each kernel once for every tap, and of strides only every other tap.
        each = np.prod(site.shape) / site.shape[1] / np.prod(facts.get("strides", [1]))
        found[operand.layer] = float(sizes[operand.tensor] * each)
    return found


def _pair(layer: str) -> tuple[str, str]:
    stem = layer.removesuffix(_QUERY).removesuffix(_KEY)
    return stem + _QUERY, stem + _KEY


def _projection(layer: str) -> str:
    """The weight that gives the queries or keys of an attention."""
    stem = layer.removesuffix(_QUERY).removesuffix(_KEY)
    return f"{stem}.{'to_q' if layer.endswith(_QUERY) else 'to_k'}.weight"
