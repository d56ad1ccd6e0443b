"""Records put beside each other: those that draw the same, the fastest first, against a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ..records.compare import compare
from ..records.labels import told_apart
from ..records.record import Record, WorkloadFacts
from .text import LABEL_LIMIT, clean

HUES = 8  # as many colours as the style sheet tells apart; dashes tell the rest


@dataclass(frozen=True)
class Entry:
    """A record in the report: its number is said wherever it appears."""

    record: Record
    number: int
    label: str

    @property
    def anchor(self) -> str:
        """The id of its row."""
        return f"c{self.number}"

    @property
    def hue(self) -> int:
        """Which of the colours of lines it has."""
        return (self.number - 1) % HUES

    @property
    def dash(self) -> int:
        """Which kind of line, once the colours are used up."""
        return (self.number - 1) // HUES % 4

    @property
    def peer(self) -> bool:
        """Whether it is another project's."""
        return self.record.requested.kind == "peer"

    @property
    def median(self) -> float | None:
        """Seconds per image, None where nothing was timed."""
        image = self.record.stats.image
        return image.median if image and math.isfinite(image.median) else None

    @property
    def per_image(self) -> tuple[float, ...]:
        """Every sample in seconds per image."""
        return tuple(s.seconds / self.record.workload.batch for s in self.record.samples)


@dataclass(frozen=True)
class Relative:
    """How many times as fast as the baseline, with the 95 % interval, and in words; None where refused."""

    ratio: float | None
    interval: tuple[float, float] | None
    word: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Records of the same pictures: prompts, seed, sampler, steps, guidance and size are equal."""

    workload: WorkloadFacts
    entries: tuple[Entry, ...]
    baseline: Entry | None

    @property
    def title(self) -> str:
        """Model, size and steps."""
        load = self.workload
        return f"{clean(load.model.name, 40)}, {load.width}\u00a0×\u00a0{load.height}, {load.steps} steps"

    @property
    def random_weights(self) -> bool:
        """Whether the pictures of all show nothing."""
        return all(entry.record.workload.model.random_weights for entry in self.entries)

    def relative(self, entry: Entry) -> Relative | None:
        """Speed against the baseline as ``kiln bench compare`` judges it; None for the baseline itself."""
        base = self.baseline
        if base is None or entry is base:
            return None
        found = compare(base.record, entry.record, across_models=True)
        if found.ratio is None or found.interval is None:
            return Relative(None, None, "not compared", found.reasons)
        low, high = found.interval
        return Relative(1 / found.ratio, (1 / high, 1 / low), found.answer)


def group_records(records: Sequence[Record], baseline: str | None = None) -> tuple[Group, ...]:
    """Groups in the order in which their first records come, with entries numbered through.

    Args:
        records: of one results folder or more.
        baseline: label or id of the record that speeds are given against; else the first peer of each group
            that is not invalid, or the first record that is not.

    Raises:
        UsageError: no record has that label or id.
    """
    if baseline is not None and not any(baseline in (r.label, r.id) for r in records):
        known = ", ".join(dict.fromkeys(clean(r.label, LABEL_LIMIT) for r in records))
        raise UsageError(f"no record is called {baseline!r}; expected one of: {known}")
    parts: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        parts.setdefault(_drawn(record.workload), []).append(record)
    groups, number = [], 0
    for part in parts.values():
        entries = []
        ranked = sorted(part, key=_rank)
        for record, name in zip(ranked, told_apart(ranked), strict=True):
            number += 1
            entries.append(Entry(record, number, clean(name, LABEL_LIMIT) or "without a label"))
        groups.append(Group(part[0].workload, tuple(entries), _baseline(part, entries, baseline)))
    return tuple(groups)


def _drawn(load: WorkloadFacts) -> tuple[object, ...]:
    """What must be equal for two times to be about the same work; model and batch may be what is compared."""
    return (
        load.model.family,
        load.model.random_weights,
        load.prompts_digest,
        load.negative_prompt,
        load.seed,
        load.sampler,
        load.schedule,
        load.steps,
        load.cfg_scale,
        load.width,
        load.height,
    )


def _rank(record: Record) -> tuple[bool, float, str]:
    """Invalid rows last, then by time: the sort is stable and does not depend on the order of the file."""
    median = record.stats.image.median if record.stats.image else math.inf
    return record.verdict == "invalid", median if not math.isnan(median) else math.inf, record.id


def _baseline(part: Sequence[Record], entries: Sequence[Entry], wanted: str | None) -> Entry | None:
    if wanted is not None:
        named = [r for r in part if wanted in (r.label, r.id)]
    else:
        fit = [r for r in part if r.verdict != "invalid" and r.stats.image is not None]
        named = [r for r in fit if r.requested.kind == "peer"] or fit
    return next((e for e in entries if named and e.record is named[0]), None)
