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

_SCORES = ".scores."


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
            attention, _, kind = operand.layer.rpartition(_SCORES)
            both = [f"{attention}{_SCORES}{one}" for one in ("query", "key")]
            count = float(np.prod([sizes[tensors[name]] for name in both if name in tensors]))
            if tensors.keys() >= set(both):
                width = sites[f"{attention}.to_{kind[0]}.weight"].shape[0]
                count /= 2 * batch * width
            found[operand.layer] = count
            continue
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[site.node].attribute}
        # Every value of the input meets each kernel once for every tap, and of strides only every other tap.
        each = np.prod(site.shape) / site.shape[1] / np.prod(facts.get("strides", [1]))
        found[operand.layer] = float(sizes[operand.tensor] * each)
    return found
