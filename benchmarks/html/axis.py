"""Scales of the charts: values to per cent of the width or height, and the marks beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .text import number

_FAIR = 4.0


@dataclass(frozen=True)
class Tick:
    """A mark: ``at`` is per cent of the axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, by its logarithm if ``log``; ``unit`` is said once, at the axis."""

    low: float
    high: float
    ticks: tuple[Tick, ...] = ()
    log: bool = False
    unit: str = ""

    def cuts(self, value: float | None) -> bool:
        """Whether a bar goes on beyond the axis."""
        return value is not None and value > self.high

    def at(self, value: float) -> float:
        """Per cent of the axis, between 0 and 100 whatever comes."""
        if math.isnan(value):
            return 0.0
        low, high, found = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, found = math.log10(low), math.log10(high), math.log10(found)
        return round(100 * (found - low) / (high - low), 3)


def linear_axis(
    values: Iterable[float],
    *,
    zero: bool = True,
    count: int = 4,
    scale: float = 1.0,
    unit: str = "",
) -> Axis:
    """An axis that holds all finite values, with about ``count`` round marks, written times ``scale``."""
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-30):
        pad = abs(high) * 0.05 or 1.0
        low, high = (low, high + pad) if zero else (low - pad, high + pad)
    elif zero:
        high += 0.04 * (high - low)
    else:
        low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    step = _round_step((high - low) / count)
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    marks = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    axis = Axis(low, high, unit=unit)
    ticks = tuple(Tick(axis.at(m), _mark(m * scale, digits)) for m in marks)
    return Axis(low, high, ticks, unit=unit)


def time_axis(values: Iterable[float], *, zero: bool = True, count: int = 4, what: str = "") -> Axis:
    """As ``linear_axis`` of seconds, written in milliseconds where all are below one second."""
    found = [v for v in values if math.isfinite(v)]
    small = max(found, default=1.0) < 1
    unit = " ".join(part for part in ("milliseconds" if small else "seconds", what) if part)
    return linear_axis(found, zero=zero, count=count, scale=1e3 if small else 1.0, unit=unit)


def fair(values: Iterable[float]) -> list[float]:
    """Values without those that would press all others into a corner: more than four times the median.

    Bars beyond the axis are drawn with a break; their figures stand beside them.
    """
    found = sorted(v for v in values if math.isfinite(v))
    if len(found) < 3:
        return found
    top = _FAIR * found[len(found) // 2]
    kept = [v for v in found if v <= top]
    return found if len(kept) == len(found) else [*kept, kept[-1] * 1.2]


def log_axis(values: Iterable[float], *, floor: float = 1e-9, most: int = 6) -> Axis:
    """Whole decades around all positive values; what is 0 or less stands at the bottom."""
    found = [v for v in values if math.isfinite(v) and v > floor] or [1e-3, 1e-1]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    if low == high:
        low -= 1
    axis = Axis(10.0**low, 10.0**high, log=True)
    step = max(1, math.ceil((high - low) / most))
    ticks = tuple(Tick(axis.at(10.0**e), _power(e)) for e in range(low, high + 1, step))
    return Axis(axis.low, axis.high, ticks, log=True)


def _round_step(raw: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)


def _mark(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}" if digits <= 9 else number(value)
    return text.replace("-", "−")


def _power(exponent: int) -> str:
    if -4 < exponent < 5:
        return number(10.0**exponent, 1)
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
