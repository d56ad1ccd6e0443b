"""Where two backends part first: the component, the step of the trajectory, the layer, the nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ParityError
from ..harness.process import Limits
from ..records.record import Gate, Requested
from .calls import recording_facts
from .child import child
from .components import ComponentReport, Row, measure_components, recording
from .distance import distance
from .layers import OUTPUT, GraphMap, read_map
from .sampling import Sampling
from .searching import AT_ONCE, FLOOR, Errors, Found, search
from .trial import Trial

# Every step of the trajectory is looked at: the step is a part of the answer.
EXPLAINED = Sampling(prompts=1, steps=8, points=8)
_JUMP = 3.0  # an error that grows by this factor within one layer is a jump, else it grew gradually


def explain(trial: Trial, sampling: Sampling = EXPLAINED) -> dict[str, Any]:
    """Find where a backend parts from the reference first.

    The first component beyond its limit (the nearest to it, if none is), its first step beyond, then the
    layers of one call: a few over the whole network, then those between the last good and the first bad one.
    Where both sides run graphs, the same again with their nodes. Layers are always compiled anew.

    Args:
        trial: what is judged, and against what.
        sampling: how much of the trajectory is looked at.

    Returns:
        What goes into ``Parity.diverges``: ``component``, ``exceeds`` (whether a limit was exceeded),
        ``where`` (prompt and step), ``errors`` by component and by step, ``layer`` with its relative L2 error
        ``layer_error``, ``after`` and ``error_before`` (the layer or input it was computed from), ``kind``
        (``jump``, ``gradual``, ``none``, ``only fused``), ``nodes`` and ``text``; an error
        is None where NaN made it infinite.

    Raises:
        FidelityError: an engine refused, died or hung.
        ParityError: the two have no layer in common.
    """
    report = measure_components(trial, sampling)
    component, exceeds = first_component(report)
    row, number = first_call(report, component)
    said: dict[str, Any] = {
        "component": component,
        "exceeds": exceeds,
        "where": row.where,
        "errors": _errors(report, component),
    }
    made = recording(trial, sampling)
    with made as folder, tempfile.TemporaryDirectory(prefix="kiln-probe-") as scratch:
        sides = (_Side(trial.bundle, trial.requested), _Side(trial.other, trial.reference))
        look = _Looking(sides, _Call(folder, component, number), Path(scratch), trial.limits)
        error = float("inf") if row.distance.nonfinite else row.distance.relative_l2
        said |= explain_component(look, error, sides)
        said["reference"] = {"bundle": trial.other.name, **_reference_facts(folder)}
    answer: dict[str, Any] = _without_infinity(said | {"text": _sentence(said)})
    return answer


def first_component(report: ComponentReport) -> tuple[str, bool]:
    """The first component, in the order they run, with a figure beyond its limit; else the nearest to it."""
    order = [c for c in ("text_encoder", "unet", "vae_decoder") if any(r.component == c for r in report.rows)]
    failed = {gate.where for gate in report.gates if not gate.passed}
    for component in order:
        if component in failed:
            return component, True
    gates = {gate.where: gate for gate in report.gates if gate.metric == "relative_l2"}
    return max(order, key=lambda component: _nearness(gates[component])), False


def _nearness(gate: Gate) -> float:
    return (float("inf") if gate.value is None else gate.value) / (gate.limit or 1.0)


def first_call(report: ComponentReport, component: str) -> tuple[Row, int]:
    """The component's first call beyond the limit, and its number; else the worst call."""
    gates = [g for g in report.gates if g.where == component and g.metric == "relative_l2"]
    limit = gates[0].limit
    calls: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.component == component:
            calls.setdefault(row.where, []).append(row)
    worst = [max(rows, key=lambda row: row.distance.relative_l2) for rows in calls.values()]
    for number, row in enumerate(worst):
        if row.distance.nonfinite or (limit is not None and row.distance.relative_l2 > limit):
            return row, number
    number = int(np.argmax([row.distance.relative_l2 for row in worst]))
    return worst[number], number


@dataclass(frozen=True)
class _Side:
    """One of the two that are compared."""

    bundle: Bundle
    requested: Requested

    def graph(self, component: str) -> GraphMap:
        return read_map(self.bundle.source(component).graph_path)


@dataclass(frozen=True)
class _Call:
    """The call that is looked into: the recording's folder, the component, and which of its calls."""

    folder: Path
    component: str
    number: int


class _Looking:
    """Errors of tensors inside a component: both sides run in processes of their own, one after the other."""

    def __init__(self, sides: tuple[_Side, _Side], call: _Call, scratch: Path, limits: Limits) -> None:
        self.component = call.component
        self._sides, self._call, self._scratch, self._limits = sides, call, scratch, limits

    def __call__(self, names: Sequence[str]) -> Errors:
        """Relative L2 errors of those that both sides have, and of the output; infinite for NaN."""
        made, wanted = (self._run(side, names, i) for i, side in enumerate(self._sides))
        with np.load(made) as actual, np.load(wanted) as expected:
            errors = {}
            for name in (*names, OUTPUT):
                if name not in actual.files or name not in expected.files:
                    continue
                a, e = actual[name], expected[name]
                if a.size == e.size:  # modules and graphs may number the axes of one tensor differently
                    found = distance(a.ravel(), e.ravel())
                    errors[name] = float("inf") if found.nonfinite else found.relative_l2
        return errors

    def _run(self, side: _Side, names: Sequence[str], index: int) -> Path:
        out = self._scratch / f"{index}.npz"
        with child(limits=self._limits) as worker:
            worker.ask(
                "probe",
                bundle=str(side.bundle.path),
                requested=asdict(side.requested),
                folder=str(self._call.folder),
                component=self.component,
                number=self._call.number,
                names=list(names),
                out=str(out),
            )
        return out


def explain_component(look: _Looking, error: float, sides: tuple[_Side, _Side]) -> dict[str, Any]:
    """Layers, then nodes."""
    if error <= FLOOR:
        return {"kind": "none"}
    graph = sides[0].graph(look.component)
    common = {layer.name for layer in sides[1].graph(look.component).layers}
    names = {layer.name: layer.tensor for layer in graph.layers if layer.name in common}
    if not names:
        raise ParityError(f"the two bundles have no layer of {look.component} in common")
    found = search(look, graph, names)
    said: dict[str, Any] = {
        "layer": found.layer,
        "layer_error": found.error,
        "after": found.after,
        "error_before": found.before,
        "threshold": found.threshold,
        "output_error": found.output_error,
        "layers_in_common": len(names),
        "profile": dict(found.profile),
        "kind": "jump" if found.error > _JUMP * max(found.before, FLOOR) else "gradual",
    }
    if found.output_error < error / _JUMP:
        said["kind"] = "only fused"
    if "torch" not in (side.requested.name for side in sides):  # its modules have no tensors between them
        said["nodes"] = _nodes(look, graph, names, found)
    return said


def _nodes(look: _Looking, graph: GraphMap, names: Mapping[str, str], found: Found) -> list[dict[str, Any]]:
    """Nodes from the last good layers to the bad one, with errors, to the first beyond the threshold."""
    target = graph.output if found.layer == OUTPUT else names[found.layer]
    good = [n for n in names if found.profile.get(n, np.inf) <= found.threshold]
    settled = frozenset().union(*(graph.ancestors(names[name]) for name in good))
    places = sorted(p for p in graph.ancestors(target) - settled if graph.depends_on_inputs(p))
    listed: list[dict[str, Any]] = []
    for start in range(0, len(places), AT_ONCE):
        part = places[start : start + AT_ONCE]
        errors = look([f"tensor:{graph.nodes[p].output[0]}" for p in part])
        for place in part:
            node = graph.nodes[place]
            error = errors.get(f"tensor:{node.output[0]}")
            listed.append({"node": node.name, "op_type": node.op_type, "error": error})
            if error is not None and error > found.threshold:
                return listed
    return listed


def _errors(report: ComponentReport, component: str) -> dict[str, Any]:
    """The largest relative L2 error by component, and of the one in question by call."""
    by_component: dict[str, float] = {}
    by_call: dict[str, float] = {}
    for row in report.rows:
        error = row.distance.relative_l2
        by_component[row.component] = max(by_component.get(row.component, 0.0), error)
        if row.component == component:
            by_call[row.where] = max(by_call.get(row.where, 0.0), error)
    return {"components": by_component, component: by_call}


def _without_infinity(value: Any) -> Any:
    """None for infinite errors, which NaN has: the answer becomes JSON."""
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinity(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _reference_facts(folder: Path) -> dict[str, Any]:
    in_force = recording_facts(folder).get("in_force")
    return {"in_force": in_force} if isinstance(in_force, dict) else {}


def _sentence(said: Mapping[str, Any]) -> str:
    """The answer in words."""
    start = f"{said['component']}, {said['where']}"
    if said["kind"] == "none":
        return f"{start}: equal to the reference"
    if said["kind"] == "only fused":
        return (
            f"{start}: the error goes away when tensors inside are exposed: a fusion across layers, or the "
            "sharing of what both halves of a guided batch compute, causes it"
        )
    nodes = [node for node in said.get("nodes", []) if node["error"] is not None]
    last = f" at {nodes[-1]['op_type']} {nodes[-1]['node']}" if nodes else ""
    word = "jumps" if said["kind"] == "jump" else "has grown gradually"
    return (
        f"{start}: the relative error {word} to {said['layer_error']:.2g} in {said['layer']}{last}, from "
        f"{said['error_before']:.2g} after {said['after']}; {said['output_error']:.2g} at the output"
    )
