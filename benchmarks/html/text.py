"""Figures and names as people read them: three significant digits, a unit, and no text that breaks a page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

NONE = "–"  # what stands where nothing was measured
LABEL_LIMIT = 80
TEXT_LIMIT = 600
_DIGITS = 3


def number(value: float | None, digits: int = _DIGITS) -> str:
    """``value`` with so many significant digits, without an exponent between 1e-4 and 1e6."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = abs(value)
    rounded = f"{value:.{digits - 1}e}"
    if size < 1e-4 or size >= 1e6:
        return rounded.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")
    decimals = max(0, digits - 1 - int(rounded.split("e")[1]))
    return f"{value:.{decimals}f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A time: ``850 ms``, ``2.46 s``, ``25 min 36 s``."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0:
        return "0 s"
    if abs(value) < 0.9995:
        return f"{number(value * 1e3)} ms"
    if abs(value) < 999.5:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def span(interval: tuple[float, float] | None) -> str:
    """An interval of times in one unit: ``2.41–2.52 s``."""
    if interval is None or not all(math.isfinite(end) for end in interval):
        return NONE
    low, high = interval
    if max(abs(low), abs(high)) < 0.9995:
        return f"{number(low * 1e3)}–{number(high * 1e3)} ms"
    return f"{number(low)}–{number(high)} s"


def size(value: float | None) -> str:
    """Bytes in decimal units, as sizes of weights are given: ``512 MB``, ``2.10 GB``."""
    if value is None or not math.isfinite(value):
        return number(value)
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor * 0.9995:
            return f"{number(value / factor)} {unit}"
    return f"{number(value)} B"


def setting(value: float) -> str:
    """A number that somebody chose: ``7``, ``0.8``."""
    return f"{value:g}".replace("-", "−")


def share(value: float | None, digits: int = 2) -> str:
    """A ratio to the whole, in per cent."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{number(value * 100, digits)} %"


def digest(value: str, digits: int = 12) -> str:
    """The first digits of a digest, without the name of its algorithm."""
    return clean(value.removeprefix("sha256:"))[:digits]


def clean(value: object, limit: int = TEXT_LIMIT) -> str:
    """Text that disturbs nothing around it: no control or direction marks, and not longer than ``limit``.

    Markup is not touched here: the templates escape everything.
    """
    text = value if isinstance(value, str) else str(value)
    kept = "".join(" " if _disturbs(c) else c for c in text[: limit * 4])
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def fact(value: Any) -> str:
    """A value of a settings or environment table."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, Mapping):
        return clean(", ".join(f"{key} {fact(inner)}" for key, inner in value.items()) or NONE)
    if isinstance(value, list | tuple):
        return clean(", ".join(fact(inner) for inner in value) or NONE)
    return clean(value) or NONE


def _disturbs(character: str) -> bool:
    # Control, format (direction overrides, zero widths), half of a pair, and two kinds without a meaning.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn")
