"""Parity of components: each gets the inputs of a real denoising, on the reference and on what is judged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ..records.record import Effective, Gate, Requested, WorkloadFacts
from .calls import INDEX
from .child import child
from .distance import Distance, worst
from .limits import judged_precision, make_gate
from .sampling import USUAL, Sampling

# Raised when a recording of an older Kiln would not be what this one makes.
RECORDING_VERSION = 1
_METRICS = ("relative_l2", "cosine", "max_abs", "nonfinite")


@dataclass(frozen=True)
class Row:
    """One output of one call against the reference's."""

    component: str
    where: str
    output: str
    distance: Distance


@dataclass(frozen=True)
class ComponentReport:
    """What was measured: every call, the worst of each component as gates, and what was in force."""

    rows: tuple[Row, ...]
    gates: tuple[Gate, ...]
    effective: Mapping[str, Effective]


def component_gates(
    bundle: Bundle,
    requested: Requested,
    reference: Requested,
    workload: WorkloadFacts,
    cache: Path | None = None,
    *,
    against: Bundle | None = None,
    sampling: Sampling = USUAL,
    recordings: Path | None = None,
) -> list[Gate]:
    """The gates of ``measure_components``: per component relative L2, cosine, largest difference, NaN."""
    return list(
        measure_components(
            bundle,
            requested,
            reference,
            workload,
            cache,
            against=against,
            sampling=sampling,
            recordings=recordings,
        ).gates
    )


def measure_components(
    bundle: Bundle,
    requested: Requested,
    reference: Requested,
    workload: WorkloadFacts,
    cache: Path | None = None,
    *,
    against: Bundle | None = None,
    sampling: Sampling = USUAL,
    recordings: Path | None = None,
) -> ComponentReport:
    """Run each component on the inputs of a real denoising, and compare with the reference.

    Two child processes, one after the other, so that neither engine is loaded here and only one at a time
    holds weights. The reference's answers are kept in ``recordings`` and serve every further configuration
    of the same workload.

    Args:
        bundle: what is judged.
        requested: the backend under test.
        reference: from ``plan_reference``.
        workload: whose prompts, size, sampler and guidance are used.
        cache: Kiln's cache for the backend under test; None compiles anew and keeps nothing.
        against: the reference's bundle, when it is another one.
        sampling: how much is looked at.
        recordings: a folder where the reference's answers are kept for the next call; None keeps none.

    Raises:
        FidelityError: an engine refused or died, or the reference itself gave NaN.
    """
    made = recording(against or bundle, reference, workload, sampling, recordings)
    with made as folder, child(cache) as worker:
        found = worker.ask(
            "replay",
            bundle=str(bundle.path),
            requested=asdict(requested),
            folder=str(folder),
            cache=cache is not None,
        )
    rows = tuple(_row(one) for one in found["rows"])
    effective = {name: Effective(**facts) for name, facts in found["effective"].items()}
    gates = judge(rows, {name: one.precision for name, one in effective.items()}, bundle, against)
    return ComponentReport(rows, tuple(gates), effective)


def judge(
    rows: Sequence[Row], effective: Mapping[str, str], bundle: Bundle, against: Bundle | None
) -> list[Gate]:
    """The worst of each component against the limits of the precision that was in force."""
    gates = []
    for component in dict.fromkeys(row.component for row in rows):
        found = worst([row.distance for row in rows if row.component == component])
        precision = judged_precision(effective[component], component, bundle, against)
        gates += [
            make_gate("component", component, metric, getattr(found, metric), precision)
            for metric in _METRICS
        ]
    return gates


@contextmanager
def recording(
    bundle: Bundle,
    reference: Requested,
    workload: WorkloadFacts,
    sampling: Sampling,
    recordings: Path | None,
) -> Iterator[Path]:
    """A folder with the reference's calls, made now or found in ``recordings``.

    Raises:
        FidelityError: the reference could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-parity-") as scratch:
        taken = sampling.of(workload)
        kept = None if recordings is None else recordings / _key(bundle, reference, workload, taken)
        if kept is not None and (kept / INDEX).is_file():
            yield kept
            return
        made = Path(scratch) / "calls"
        with child() as worker:
            worker.ask(
                "record",
                bundle=str(bundle.path),
                reference=asdict(reference),
                workload=asdict(workload),
                sampling=asdict(taken),
                folder=str(made),
            )
        yield made if kept is None else _keep(made, kept)


def _keep(made: Path, kept: Path) -> Path:
    """Move a finished recording to its place; one that another process put there first is as good."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    shutil.copytree(made, partial, dirs_exist_ok=True)
    try:
        partial.rename(kept)
    except OSError:
        shutil.rmtree(partial)
        if not (kept / INDEX).is_file():
            raise
    return kept


def _key(bundle: Bundle, reference: Requested, workload: WorkloadFacts, sampling: Sampling) -> str:
    """What a recording depends on."""
    facts: dict[str, Any] = asdict(workload)
    for name in ("id", "tier", "model", "adapters", "prompts_digest", "latents_digest"):
        del facts[name]
    parts = [
        RECORDING_VERSION,
        bundle.content_digest,
        asdict(reference),
        facts,
        asdict(sampling),
        _versions(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    """Of the engines that may be the reference: another one rounds otherwise."""
    from ...backends.registry import get_backend

    return {name: get_backend(name).probe().version for name in ("torch", "openvino", "onnxruntime")}


def _row(facts: Mapping[str, Any]) -> Row:
    figures = {key: facts[key] for key in ("relative_l2", "cosine", "max_abs", "nans", "infs")}
    return Row(facts["component"], facts["where"], facts["output"], Distance(**figures))
