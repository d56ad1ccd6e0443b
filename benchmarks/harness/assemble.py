"""From a lane to its record: derived figures, the verdict, and every reason for it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..records.record import NoiseReport, Record, Tool
from ..records.stats import derive
from ..records.verify_verdict import LONGER_THAN_THE_WHOLE, NOTHING_TIMED, ROUNDING, verdict_of
from .lane import Lane
from .noise import judge_samples, report

UNATTRIBUTED_MOST = 0.03


@dataclass(frozen=True)
class RunFacts:
    """What all records of a run share."""

    run: str
    created: str
    tool: Tool
    environment: Mapping[str, Any]
    command: tuple[str, ...]


def new_run_id() -> str:
    """Sortable by time, and unlike any other."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def make_record(lane: Lane, facts: RunFacts, machine: NoiseReport, floor: float | None) -> Record:
    """The record of what a lane has measured so far."""
    asked = lane.configuration
    stats = derive(tuple(lane.samples), asked.workload.batch)
    modes = stats.image.modes if stats.image else 1
    found = [*lane.noise, *judge_samples(lane.samples, modes)]
    # What was found on the machine keeps its grade; the samples' own signs are added.
    graded = [(machine.verdict, text) for text in machine.reasons if machine.verdict != "clean"]
    noise = replace(report([*graded, *found], machine.facts), floor=floor)
    reasons = list(dict.fromkeys(lane.reasons))
    if not lane.samples:
        reasons.append(NOTHING_TIMED)
    reasons += [*_attribution(stats.unattributed), *noise.reasons]
    remarks = [*lane.remarks, *_unattributed(stats.unattributed)]
    return Record(
        id=f"{facts.run}-{asked.key}",
        run=facts.run,
        key=asked.key,
        label=lane.label,
        created=facts.created,
        tool=facts.tool,
        workload=asked.workload,
        requested=asked.requested,
        effective=lane.effective,
        environment=facts.environment,
        phases=lane.phases,
        warmups=tuple(lane.warmups),
        samples=tuple(lane.samples),
        stats=stats,
        memory=lane.memory,
        energy=lane.energy.per_image(asked.workload.batch),
        noise=noise,
        parity=lane.parity,
        images=lane.images,
        verdict=verdict_of(reasons, noise),
        reasons=tuple(dict.fromkeys(reasons)),
        command=facts.command,
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _attribution(unattributed: float | None) -> list[str]:
    """Components that take longer than the whole are a broken measurement."""
    if unattributed is not None and unattributed < -ROUNDING:
        return [f"the components take {-unattributed:.1%} {LONGER_THAN_THE_WHOLE}"]
    return []


def _unattributed(share: float | None) -> list[str]:
    if share is not None and share > UNATTRIBUTED_MOST:
        return [f"{share:.1%} of the time is outside of all components"]
    return []
