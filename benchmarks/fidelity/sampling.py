"""How much of a workload is looked at for parity of components."""

from __future__ import annotations

from dataclasses import dataclass

from ..records.record import WorkloadFacts


@dataclass(frozen=True)
class Sampling:
    """How much is looked at.

    ``prompts`` of the workload are drawn, each in ``steps`` steps at most over the whole schedule; of all
    their UNet calls ``points`` are kept, the first and the last step among them, prompts taking turns. Every
    prompt of the workload goes through the text encoder.
    """

    prompts: int = 1
    steps: int = 8
    points: int = 4

    def of(self, workload: WorkloadFacts) -> Sampling:
        """What is left of it for a workload."""
        return Sampling(
            min(self.prompts, len(workload.prompts)), min(self.steps, workload.steps), max(1, self.points)
        )


USUAL = Sampling()
