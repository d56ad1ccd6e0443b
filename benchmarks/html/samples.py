"""Every sample in the order it was taken: batches over time, UNet steps by number, warm-ups apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records.record import Sample
from .axis import Axis, Tick, linear_axis, time_axis
from .grouping import Entry, Group
from .text import number, seconds

# Warm-ups and stray samples beyond this many times the samples' highest are marked at the edge, with their
# value in words: drawn to scale they would press two groups of times into one line.
_CLIP = 1.5
_GRID = 1000  # the coordinates of a plot, both ways


@dataclass(frozen=True)
class Plot:
    """Points as SVG paths in a square of 1000 by 1000, y downwards, and axes in per cent.

    ``dots`` are samples, ``warm`` warm-ups, ``strays`` outliers; ``clipped`` those above the edge. ``strip``
    repeats the samples beside the plot, spread by their place, so that two groups are seen as two.
    """

    x: Axis
    y: Axis
    dots: str
    warm: str
    strays: str
    clipped: str
    strip: str
    median: float
    band: tuple[float, float] | None
    lines: str = ""


@dataclass(frozen=True)
class Panel:
    """What a configuration's samples look like."""

    entry: Entry
    images: Plot
    steps: Plot | None
    said: str
    said_steps: str
    values: str
    clipped: str
    modes: int
    step_modes: int


def panels(group: Group) -> tuple[Panel, ...]:
    """One for each configuration that has samples."""
    return tuple(_panel(entry) for entry in group.entries if entry.record.samples)


def _panel(entry: Entry) -> Panel:
    record, batch = entry.record, entry.record.workload.batch
    image, step = record.stats.image, record.stats.unet_step
    values = entry.per_image
    warm = [s.seconds / batch for s in record.warmups]
    plot = _images(entry, warm)
    over = [v for v in (*warm, *values) if v > plot.y.high]
    said = f"{len(values)} samples from {seconds(min(values))} to {seconds(max(values))} per image"
    if image is not None:
        said += f", median {seconds(image.median)}"
    if record.warmups:
        said += f"; {len(warm)} warm-up samples"
    steps = _steps(record.samples)
    said_steps = ""
    if steps is not None and step is not None:
        said_steps = (
            f"{step.count} UNet steps from {seconds(step.min)} to {seconds(step.max)}, "
            f"median {seconds(step.median)}"
        )
    return Panel(
        entry=entry,
        images=plot,
        steps=steps,
        said=said,
        said_steps=said_steps,
        values=", ".join(number(v, 4) for v in values),
        clipped=", ".join(seconds(v) for v in over),
        modes=image.modes if image else 1,
        step_modes=step.modes if step else 1,
    )


def _images(entry: Entry, warm: Sequence[float]) -> Plot:
    record, values = entry.record, entry.per_image
    every: list[Sample] = [*record.warmups, *record.samples]
    begin = min(s.started_ns for s in every)
    times = [(s.started_ns - begin) / 1e9 for s in every]
    x = linear_axis([*times, every[-1].seconds + times[-1]], count=4, unit="seconds since the first")
    top = max(values) * _CLIP
    y = time_axis([v for v in (*warm, *values) if v <= top], zero=False)
    image = record.stats.image
    strays = set(image.outliers) if image else set()
    places = times[len(warm) :]
    fair = [(t, v) for i, (t, v) in enumerate(zip(places, values, strict=True)) if i not in strays]
    odd = [(t, v) for i, (t, v) in enumerate(zip(places, values, strict=True)) if i in strays]
    inside = [(t, v) for t, v in zip(times, warm, strict=False) if v <= y.high]
    above = [(t, y.high) for t, v in zip(times, (*warm, *values), strict=True) if v > y.high]
    band = image.interval if image else None
    return Plot(
        x=x,
        y=y,
        dots=_dots(fair, x, y),
        warm=_dots(inside, x, y),
        strays=_dots(odd, x, y),
        clipped=_arrows(above, x, y),
        strip=_strip(values, y),
        median=100 - y.at(image.median) if image else 0.0,
        band=(100 - y.at(band[1]), 100 - y.at(band[0])) if band else None,
    )


def _steps(samples: Sequence[Sample]) -> Plot | None:
    rows = [s.unet_steps for s in samples if s.unet_steps]
    values = [v for row in rows for v in row]
    if not values:
        return None
    longest = max(len(row) for row in rows)
    x = _numbered(longest)
    y = time_axis(values, zero=False)
    points = [(float(i + 1), v) for row in rows for i, v in enumerate(row)]
    middle = sorted(values)[len(values) // 2]
    lines = "".join(
        "M" + "L".join(_at(float(i + 1), v, x, y) for i, v in enumerate(row)) for row in rows if len(row) > 1
    )
    strip = _strip(values, y)
    return Plot(x, y, _dots(points, x, y), "", "", "", strip, 100 - y.at(middle), None, lines)


def _numbered(count: int) -> Axis:
    """Steps 1 to ``count``, with half a step of air on both sides."""
    axis = Axis(0.5, count + 0.5, unit="UNet step")
    stride = max(1, math.ceil(count / 5))
    marks = [1, *(n for n in range(stride, count + 1, stride) if n > 1)]
    return Axis(axis.low, axis.high, tuple(Tick(axis.at(n), str(n)) for n in marks), unit=axis.unit)


def _dots(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Strokes of no length: round caps make them dots of one size however the plot is stretched."""
    return "".join(f"M{_at(a, b, x, y)}h0" for a, b in points)


def _arrows(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Short strokes down from the upper edge."""
    return "".join(f"M{_at(a, b, x, y)}v40" for a, b in points)


def _strip(values: Sequence[float], y: Axis) -> str:
    """Beside each other in an order that does not follow the values, by multiples of the golden ratio."""
    places = [80 + round(840 * ((i * 0.618034) % 1)) for i in range(len(values))]
    return "".join(
        f"M{place} {round(_GRID - y.at(v) * _GRID / 100)}h0" for place, v in zip(places, values, strict=True)
    )


def _at(a: float, b: float, x: Axis, y: Axis) -> str:
    return f"{round(x.at(a) * _GRID / 100)} {round(_GRID - y.at(b) * _GRID / 100)}"
