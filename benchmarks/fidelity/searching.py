"""Find the first layer with an error beyond what came before: a few layers first, then those between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .layers import OUTPUT, GraphMap

AT_ONCE = 24  # layers that are looked at in one run; some hundred MB at 512x512
FLOOR = 1e-9  # below the rounding of fp32

Errors = dict[str, float]
Look = Callable[[Sequence[str]], Errors]


@dataclass(frozen=True)
class Found:
    """The first layer beyond the threshold; ``before`` is the error of what it was computed from."""

    layer: str
    error: float
    after: str
    before: float
    threshold: float
    output_error: float
    profile: Mapping[str, float]


def search(look: Look, graph: GraphMap, names: Mapping[str, str]) -> Found:
    """The first layer whose error is beyond the geometric mean of the least and the output's.

    Args:
        look: tells errors of layers.
        graph: whose order and ancestry count.
        names: layers and their tensors, in order.
    """
    left, seen = list(names), Errors()
    threshold = output = 0.0
    good: list[str] = []
    bad = OUTPUT
    while left:
        chosen = _spread(left, AT_ONCE)
        errors = look(chosen)
        output = errors.pop(OUTPUT, output)
        missing = set(chosen) - errors.keys()
        left = [name for name in left if name not in missing]
        seen |= errors
        if not threshold and errors:
            least = max(min(errors.values()), FLOOR)
            threshold = float(np.sqrt(least * max(min(output, 1.0), least)))
        bad = next((name for name in names if seen.get(name, 0.0) > threshold), OUTPUT)
        good = [name for name in names if name in seen and seen[name] <= threshold]
        left = _between(graph, names, good, bad, set(seen) | missing, left)
    clean = [name for name in good if _is_before(graph, names, name, bad)]
    after = clean[-1] if clean else "the inputs"
    profile = {name: seen[name] for name in names if name in seen}
    before = max((seen[name] for name in clean[-3:]), default=0.0)
    return Found(bad, seen.get(bad, output), after, before, threshold, output, profile)


def _between(
    graph: GraphMap,
    names: Mapping[str, str],
    good: Sequence[str],
    bad: str,
    seen: set[str],
    left: Sequence[str],
) -> list[str]:
    """Layers that the bad one depends on, and none of the good ones does."""
    wanted = graph.ancestors(graph.output if bad == OUTPUT else names[bad])
    settled = frozenset().union(*(graph.ancestors(names[name]) for name in good))
    places = {name: graph.position(names[name]) for name in left if name not in seen}
    return [name for name, place in places.items() if place in wanted and place not in settled]


def _is_before(graph: GraphMap, names: Mapping[str, str], name: str, bad: str) -> bool:
    target = graph.output if bad == OUTPUT else names[bad]
    return graph.position(names[name]) in graph.ancestors(target)


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of them, evenly, the last among them."""
    if len(names) <= count:
        return list(names)
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))]
