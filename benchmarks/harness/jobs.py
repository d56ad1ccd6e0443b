"""What is measured: one configuration of a run, and the job that its worker is started with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.record import AdapterFacts, ModelFacts, Requested, WorkloadFacts

_KEY_DIGITS = 16


@dataclass(frozen=True)
class Configuration:
    """One row to measure: a workload on a bundle, as one backend or peer is asked to run it.

    ``axes`` are the values of the options that have several in this run, for the label; ``python`` is the
    interpreter of a peer.
    """

    workload: WorkloadFacts
    requested: Requested
    bundle: Path
    axes: tuple[str, ...] = ()
    python: str | None = None

    @property
    def key(self) -> str:
        """Identifies workload and request."""
        return configuration_key(self.workload, self.requested)

    @property
    def name(self) -> str:
        """What it is called before it has run: as asked."""
        device = "" if self.requested.device == "auto" else f":{self.requested.device}"
        precision = "" if self.requested.precision == "auto" else self.requested.precision
        return " ".join(filter(None, (self.requested.name + device, precision, *self.axes)))


@dataclass(frozen=True)
class Job:
    """What a worker is told, see ``wire``.

    ``bundle`` is Kiln's, ``model`` a diffusers folder with the same weights, for peers. ``cache`` is the
    folder of compiled models, None for the worker's own choice; ``scratch`` is for its other files. ``noise``
    is a .npy file, float32 ``(prompts, batch, 4, h/vae, w/vae)`` of unit variance: what the seeds give.
    """

    bundle: Path
    model: Path | None
    workload: WorkloadFacts
    requested: Requested
    cache: Path | None
    scratch: Path
    noise: Path

    def write(self, path: Path) -> Path:
        """Write it as JSON; gives the path."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=1) + "\n", encoding="utf-8")
        return path


def read_job(path: Path) -> Job:
    """The job in a file that ``write`` made."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Job(
        bundle=Path(raw["bundle"]),
        model=Path(raw["model"]) if raw["model"] else None,
        workload=workload_facts(raw["workload"]),
        requested=Requested(**raw["requested"]),
        cache=Path(raw["cache"]) if raw["cache"] else None,
        scratch=Path(raw["scratch"]),
        noise=Path(raw["noise"]),
    )


def workload_facts(raw: Mapping[str, Any]) -> WorkloadFacts:
    """The facts from their JSON."""
    return WorkloadFacts(
        **{
            **raw,
            "model": ModelFacts(**raw["model"]),
            "prompts": tuple(raw["prompts"]),
            "adapters": tuple(AdapterFacts(**row) for row in raw["adapters"]),
        }
    )


def configuration_key(workload: WorkloadFacts, requested: Requested) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over both, as sorted JSON."""
    text = json.dumps([dataclasses.asdict(workload), dataclasses.asdict(requested)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
