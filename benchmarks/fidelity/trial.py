"""One trial: a bundle on the backend under test, and the reference that it is held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...bundle import Bundle
from ..harness.process import LIMITS, Limits
from ..records.record import Requested, WorkloadFacts


@dataclass(frozen=True)
class Trial:
    """What is judged, and against what.

    Args:
        bundle: what is judged.
        requested: the backend under test.
        reference: from ``plan_reference``.
        workload: whose prompts, size, sampler and guidance are used.
        cache: Kiln's cache for the backend under test; None compiles anew and keeps nothing.
        against: the reference's bundle, when it is another one.
        recordings: a folder where the reference's answers are kept for the next trial; None keeps none.
        limits: when a process that gives no answer is given up.
    """

    bundle: Bundle
    requested: Requested
    reference: Requested
    workload: WorkloadFacts
    cache: Path | None = None
    against: Bundle | None = None
    recordings: Path | None = None
    limits: Limits = LIMITS

    @property
    def other(self) -> Bundle:
        """The bundle that the reference runs."""
        return self.against or self.bundle
