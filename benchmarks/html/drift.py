"""How far the latents part from the reference's, step by step, on an axis of decades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .axis import Axis, Tick, log_axis
from .grouping import Entry, Group
from .text import clean, number

_GRID = 1000
_LEAST = 1e-9  # what is nearer than this is drawn at the bottom


@dataclass(frozen=True)
class Curve:
    """A line in a square of 1000 by 1000; ``limit`` is per cent from the top, None without one."""

    entry: Entry
    path: str
    dots: str
    last: str
    limit: float | None
    limit_text: str
    passed: bool


@dataclass(frozen=True)
class Chart:
    """One metric of all configurations."""

    name: str
    meaning: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    said: str


def drift(group: Group) -> tuple[Chart, ...]:
    """Relative L2 and the angle; metrics that no configuration has are left out."""
    charts = (
        _chart(
            group,
            "relative_l2",
            "Relative L2 error",
            "0 is equal; at 1 the error is as large as the reference",
            _as_is,
        ),
        _chart(group, "cosine", "1 − cosine", "0 is the same direction; 1 is at right angles", _angle),
    )
    return tuple(chart for chart in charts if chart is not None)


def diverges(entry: Entry) -> str:
    """The answer of ``--explain`` in words, empty without one."""
    found = entry.record.parity.diverges
    if not found:
        return ""
    if isinstance(found.get("text"), str):
        return clean(found["text"])
    return ", ".join(
        f"{clean(key, 30)} {clean(value, 80)}" for key, value in found.items() if key != "profile"
    )


def _as_is(value: float) -> float:
    return value


def _angle(value: float) -> float:
    return 1 - value


def _chart(group: Group, metric: str, name: str, meaning: str, of: Callable[[float], float]) -> Chart | None:
    found = [(e, [of(v) for v in e.record.parity.latents.get(metric, ())]) for e in group.entries]
    drawn = [(entry, values) for entry, values in found if values]
    if not drawn:
        return None
    limits = {entry.number: _limit(entry, metric, of) for entry, _ in drawn}
    every = [v for _, values in drawn for v in values]
    y = log_axis([*every, *(limit for limit, _ in limits.values() if limit)], floor=_LEAST)
    x = _steps(max(len(values) for _, values in drawn))
    curves = tuple(_curve(entry, values, x, y, *limits[entry.number]) for entry, values in drawn)
    said = f"{name} of the latents after each step: " + "; ".join(
        f"{c.entry.label} {c.last} at the end" for c in curves
    )
    return Chart(name, meaning, x, y, curves, said)


def _limit(entry: Entry, metric: str, of: Callable[[float], float]) -> tuple[float | None, bool]:
    gates = [g for g in entry.record.parity.gates if g.level == "latents" and g.metric == metric]
    limits = [of(g.limit) for g in gates if g.limit is not None]
    return (limits[0] if limits else None), all(g.passed for g in gates)


def _curve(
    entry: Entry, values: Sequence[float], x: Axis, y: Axis, limit: float | None, passed: bool
) -> Curve:
    points = [
        f"{round(x.at(i + 1) * _GRID / 100)} {round(_GRID - y.at(max(v, y.low)) * _GRID / 100)}"
        for i, v in enumerate(values)
        if math.isfinite(v)
    ]
    return Curve(
        entry=entry,
        path="M" + "L".join(points) if points else "",
        dots="".join(f"M{point}h0" for point in points),
        last=number(values[-1], 2),
        limit=100 - y.at(limit) if limit else None,
        limit_text=number(limit, 2) if limit else "",
        passed=passed,
    )


def _steps(count: int) -> Axis:
    axis = Axis(1, max(count, 2), unit="step")
    stride = max(1, math.ceil(count / 5))
    marks = [1, *(n for n in range(stride, count + 1, stride) if n > 1)]
    return Axis(axis.low, axis.high, tuple(Tick(axis.at(n), str(n)) for n in marks), unit=axis.unit)
