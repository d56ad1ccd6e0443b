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
from ..records.record import Effective, Gate
from .calls import INDEX
from .child import child
from .distance import Distance, worst
from .limits import judged_precision, make_gate
from .sampling import USUAL, Sampling
from .trial import Trial

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


def component_gates(trial: Trial, sampling: Sampling = USUAL) -> list[Gate]:
    """The gates of ``measure_components``: per component relative L2, cosine, largest difference, NaN."""
    return list(measure_components(trial, sampling).gates)


def measure_components(trial: Trial, sampling: Sampling = USUAL) -> ComponentReport:
    """Run each component on the inputs of a real denoising, and compare with the reference.

    Two child processes, one after the other, so that neither engine is loaded here and only one at a time
    holds weights. The reference's answers are kept in ``trial.recordings`` and serve every further
    configuration of the same workload.

    Args:
        trial: what is judged, and against what.
        sampling: how much is looked at.

    Raises:
        FidelityError: an engine refused, died or hung, or the reference itself gave NaN.
    """
    with recording(trial, sampling) as folder, child(trial.cache, limits=trial.limits) as worker:
        found = worker.ask(
            "replay",
            bundle=str(trial.bundle.path),
            requested=asdict(trial.requested),
            folder=str(folder),
            cache=trial.cache is not None,
        )
    rows = tuple(_row(one) for one in found["rows"])
    effective = {name: Effective(**facts) for name, facts in found["effective"].items()}
    in_force = {name: one.precision for name, one in effective.items()}
    gates = judge(rows, in_force, trial.bundle, trial.against)
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
def recording(trial: Trial, sampling: Sampling) -> Iterator[Path]:
    """A folder with the reference's calls, made now or found in ``trial.recordings``.

    Raises:
        FidelityError: the reference could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-parity-") as scratch:
        taken = sampling.of(trial.workload)
        kept = None if trial.recordings is None else trial.recordings / _key(trial, taken)
        if kept is not None and (kept / INDEX).is_file():
            yield kept
            return
        made = Path(scratch) / "calls"
        with child(limits=trial.limits) as worker:
            worker.ask(
                "record",
                bundle=str(trial.other.path),
                reference=asdict(trial.reference),
                workload=asdict(trial.workload),
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


def _key(trial: Trial, sampling: Sampling) -> str:
    """What a recording depends on."""
    facts: dict[str, Any] = asdict(trial.workload)
    for name in ("id", "tier", "model", "adapters", "prompts_digest", "latents_digest"):
        del facts[name]
    parts = [
        RECORDING_VERSION,
        trial.other.content_digest,
        asdict(trial.reference),
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
