"""The summary: seconds per image with their interval, speed against the baseline, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .axis import Axis, fair, time_axis
from .grouping import Entry, Group, Relative
from .text import NONE, clean, number, seconds, share, span


@dataclass(frozen=True)
class SpeedRow:
    """A row of the summary; ``bar``, ``low`` and ``high`` are per cent of the axis, None without samples."""

    entry: Entry
    bar: float | None
    low: float | None
    high: float | None
    cut: bool
    time: str
    interval: str
    spread: str
    count: int
    speed: str
    speed_interval: str
    speed_word: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Speeds:
    """The summary of a group."""

    axis: Axis
    rows: tuple[SpeedRow, ...]
    headline: str
    cut: bool


def speeds(group: Group) -> Speeds:
    """The rows in the order of the group."""
    images = [e.record.stats.image for e in group.entries if e.record.stats.image is not None]
    ends = [max((image.median, *(image.interval or ()))) for image in images]
    axis = time_axis([0.0, *fair(ends)], what="per image")
    rows = tuple(_row(group, entry, axis) for entry in group.entries)
    return Speeds(axis, rows, _headline(group), any(row.cut for row in rows))


def _row(group: Group, entry: Entry, axis: Axis) -> SpeedRow:
    record, image = entry.record, entry.record.stats.image
    relative = group.relative(entry)
    speed, interval, word = _words(group, entry, relative)
    said = (*record.reasons, *record.remarks, *_refused(record.verdict, relative))
    return SpeedRow(
        entry=entry,
        bar=axis.at(image.median) if image else None,
        low=axis.at(image.interval[0]) if image and image.interval else None,
        high=axis.at(image.interval[1]) if image and image.interval else None,
        cut=axis.cuts(image.median if image else None),
        time=seconds(image.median) if image else NONE,
        interval=span(image.interval) if image else NONE,
        spread=share(image.cv) if image and image.cv is not None else NONE,
        count=len(record.samples),
        speed=speed,
        speed_interval=interval,
        speed_word=word,
        reasons=tuple(clean(reason) for reason in said),
    )


def _refused(verdict: str, relative: Relative | None) -> list[str]:
    """Why no speed is given, unless the row is invalid and says so already."""
    if relative is None or verdict == "invalid" or not relative.reasons:
        return []
    return [f"not compared with the baseline: {'; '.join(relative.reasons)}"]


def _words(group: Group, entry: Entry, relative: Relative | None) -> tuple[str, str, str]:
    if relative is not None and relative.interval is not None:
        low, high = relative.interval
        return f"{number(relative.ratio)}×", f"{number(low)}–{number(high)}", relative.word
    if entry is group.baseline:
        return "1×", "", "baseline"
    return NONE, "", relative.word if relative else ""


def _headline(group: Group) -> str:
    """One sentence: the fastest that counts, and by how much."""
    fit = [e for e in group.entries if e.record.verdict != "invalid" and e.median]
    if not fit:
        return "No configuration gave a valid time."
    best = min(fit, key=lambda e: e.median or 0.0)
    text = f"{best.label} takes {seconds(best.median)} per image"
    if len(fit) == 1:
        return f"{text}."
    relative = group.relative(best)
    if relative is None or relative.ratio is None or group.baseline is None:
        return f"{text}, the least of {len(fit)}; speeds are given against it."
    ratio = f"{number(relative.ratio)} times as fast as {group.baseline.label}"
    if relative.word == "not significant":
        return f"{text}; the difference from {group.baseline.label} is not significant."
    return f"{text}, {ratio}."


def verdicts(entries: Sequence[Entry]) -> dict[str, int]:
    """How many rows are valid, noisy and invalid."""
    found = {"valid": 0, "noisy": 0, "invalid": 0}
    for entry in entries:
        found[entry.record.verdict] = found.get(entry.record.verdict, 0) + 1
    return found
