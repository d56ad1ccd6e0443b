"""Where the time goes: what each component takes of an image, and what no component accounts for."""

from __future__ import annotations

from dataclasses import dataclass

from .axis import Axis, fair, time_axis
from .grouping import Entry, Group
from .text import clean, seconds, share

REST = "unattributed"
WHOLE = "not told apart"
ORDER = ("text_encoder", "text_encoder_2", "unet", "sampler", "vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Part:
    """A piece of a bar, in per cent of the axis; ``kind`` is its class in the style sheet."""

    name: str
    kind: str
    start: float
    width: float
    time: str
    share: str


@dataclass(frozen=True)
class Stack:
    """A bar of pieces."""

    entry: Entry
    parts: tuple[Part, ...]
    total: str
    note: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Parts:
    """The bars of a group and the names that occur, in the order of the pipeline."""

    axis: Axis
    stacks: tuple[Stack, ...]
    names: tuple[tuple[str, str], ...]


def parts(group: Group) -> Parts | None:
    """Bars of the medians per image; None where nothing was timed."""
    timed = [e for e in group.entries if e.median]
    if not timed:
        return None
    axis = time_axis([0.0, *fair(_end(e) for e in timed)], what="per image")
    stacks = tuple(_stack(e, axis) for e in timed)
    named = {p.name: p.kind for s in stacks for p in s.parts}
    last = {REST: 1, WHOLE: 2}
    order = sorted(named, key=lambda n: (last.get(n, 0), ORDER.index(n) if n in ORDER else len(ORDER), n))
    return Parts(axis, stacks, tuple((name, named[name]) for name in order))


def shares(entry: Entry) -> list[tuple[str, float]]:
    """Components in the order of the pipeline with their median seconds per image, the rest last.

    The rest is the share of the samples' time that no component accounts for, of the median image.
    """
    stats = entry.record.stats
    if not stats.components:
        return []
    known = sorted(stats.components, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    found = [(name, stats.components[name].median) for name in known]
    if stats.unattributed is not None and stats.image is not None:
        found.append((REST, max(0.0, stats.unattributed) * stats.image.median))
    return found


def kind_of(name: str) -> str:
    """The class of a component: one per idea, the same in every chart."""
    if name.startswith("text_encoder"):
        return "text"
    if name in ("vae_decoder", "vae_encoder"):
        return "vae"
    return {"unet": "unet", "sampler": "sampler", REST: "rest", WHOLE: "whole"}.get(name, "other")


def _end(entry: Entry) -> float:
    return max(entry.median or 0.0, sum(value for _, value in shares(entry)))


def _stack(entry: Entry, axis: Axis) -> Stack:
    found = shares(entry)
    total = entry.median or 0.0
    note = ""
    if not found:
        found = [(WHOLE, total)]
        note = "cannot tell its components apart"
    pieces, start = [], 0.0
    for name, value in found:
        at, end = axis.at(start), axis.at(start + value)
        text = share(value / total) if total else ""
        pieces.append(Part(clean(name, 40), kind_of(name), at, round(end - at, 3), seconds(value), text))
        start += value
    return Stack(entry, tuple(pieces), seconds(total), note, axis.cuts(start))
