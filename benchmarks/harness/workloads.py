"""Workloads as data: named, versioned files, and what they come to on a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import UsageError
from ...runtime.noise import make_generators
from ...runtime.pipeline import CFG_SCALE
from ..records.record import AdapterFacts, ModelFacts, WorkloadFacts

TIERS = ("quick", "standard", "full")
_SUFFIX = ".json"


@dataclass(frozen=True)
class Workload:
    """One file of ``benchmarks/data/workloads``.

    ``model`` is a bundled model's name, ``random-sd15`` for random weights that are made when they are
    needed, or None where the user names one. ``cfg_scale``, ``width`` and ``height`` None take the model's.
    ``model_digest`` and ``latents_digest`` pin what is run when nothing is changed by an option; a model that
    may be any has none. ``random_fingerprint`` is that of the checkpoint of random weights.
    ``min_batches`` is the floor of timed batches by kind of device, ``min_seconds`` that of their time.
    """

    name: str
    version: int
    tier: str
    summary: str
    model: str | None
    prompts: tuple[str, ...]
    negative_prompt: str
    seed: int
    sampler: str
    schedule: str
    steps: int
    cfg_scale: float | None
    width: int | None
    height: int | None
    batch: int
    min_seconds: float
    min_batches: Mapping[str, int] = field(default_factory=lambda: {"cpu": 5, "gpu": 10})
    aa: bool = False
    model_digest: str | None = None
    latents_digest: str | None = None
    random_fingerprint: str | None = None

    @property
    def id(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Changes:
    """What options change of a workload; None leaves it."""

    width: int | None = None
    height: int | None = None
    batch: int | None = None
    steps: int | None = None


def workloads() -> dict[str, Workload]:
    """All workloads that ship, by name, the quickest first."""
    folder = resources.files("kiln") / "benchmarks/data/workloads"
    found = [_parse(Path(str(entry))) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)]
    return {w.name: w for w in sorted(found, key=lambda w: (TIERS.index(w.tier), w.name))}


def load_workload(name: str) -> Workload:
    """The workload of a name, or of a file of the same form that a path leads to.

    Raises:
        UsageError: neither, or a file that does not say what is needed.
    """
    if name.endswith(_SUFFIX):
        return _parse(Path(name))
    known = workloads()
    if name not in known:
        raise UsageError(f"there is no workload {name!r}; expected {', '.join(known)}, or a {_SUFFIX} file")
    return known[name]


def facts_of(workload: Workload, bundle: Bundle, factor: int, changes: Changes = Changes()) -> WorkloadFacts:
    """What a workload comes to on a bundle.

    Args:
        workload: as data.
        bundle: that is run, with its adapters.
        factor: pixels per latent cell and side.
        changes: of options.

    Raises:
        UsageError: the model is another than the workload is about.
    """
    _check_model(workload, bundle)
    native = int(bundle.config("unet")["sample_size"]) * factor
    own_scale = float(bundle.manifest.get("defaults", {}).get("cfg_scale", CFG_SCALE))
    width = changes.width or workload.width or native
    height = changes.height or workload.height or native
    batch = changes.batch or workload.batch
    noise = initial_noise(workload.seed, len(workload.prompts), batch, (height // factor, width // factor))
    latents = array_digest(noise)
    own = workload.model in (None, bundle.name) or _is_random(workload, bundle)
    if own and workload.latents_digest and changes == Changes() and latents != workload.latents_digest:
        raise UsageError(
            f"the workload {workload.id} starts from the noise {workload.latents_digest[:12]}…, and this "
            f"Kiln makes {latents[:12]}…; the results cannot be compared"
        )
    return WorkloadFacts(
        id=workload.id,
        tier=workload.tier,
        model=_model_facts(workload, bundle),
        prompts=workload.prompts,
        negative_prompt=workload.negative_prompt,
        prompts_digest=_digest([workload.prompts, workload.negative_prompt]),
        latents_digest=latents,
        seed=workload.seed,
        sampler=workload.sampler,
        schedule=workload.schedule,
        steps=changes.steps or workload.steps,
        cfg_scale=own_scale if workload.cfg_scale is None else workload.cfg_scale,
        width=width,
        height=height,
        batch=batch,
        adapters=tuple(
            AdapterFacts(a.name, a.sha256, a.unet_strength, a.text_encoder_strength) for a in bundle.adapters
        ),
    )


def initial_noise(seed: int, prompts: int, batch: int, cells: tuple[int, int]) -> np.ndarray:
    """What the seeds give: float32 ``(prompts, batch, 4, *cells)``, unit variance, torch's CPU generator.

    Prompt ``p`` has seed ``seed + p``, image ``i`` of its batch ``seed + p + i``.
    """
    rows = [make_generators("cpu", seed + p, batch) for p in range(prompts)]
    return np.stack([np.stack([g.randn((4, *cells)) for g in row]) for row in rows])


def array_digest(values: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _check_model(workload: Workload, bundle: Bundle) -> None:
    if workload.random_fingerprint and not _is_random(workload, bundle):
        raise UsageError(
            f"the workload {workload.id} is about the random weights that it makes itself, and {bundle.name} "
            "is made of others; leave -m out, or measure your model with the workload full"
        )
    if workload.model_digest and not bundle.adapters and bundle.name == workload.model:
        found = bundle.content_digest
        if found != workload.model_digest:
            raise UsageError(
                f"the workload {workload.id} is about {workload.model} {workload.model_digest[:12]}…, and "
                f"here it is {found[:12]}…; give another workload, or this model by -m PATH"
            )


def _is_random(workload: Workload, bundle: Bundle) -> bool:
    return bundle.manifest["source"].get("fingerprint") == workload.random_fingerprint


def _model_facts(workload: Workload, bundle: Bundle) -> ModelFacts:
    components = bundle.manifest["components"]
    storage = {c: "+".join(sorted(components[c].get("storage") or {})) for c in bundle.components}
    random = bool(workload.random_fingerprint) and _is_random(workload, bundle)
    return ModelFacts(
        name=workload.model if random and workload.model else bundle.name,
        family=bundle.family,
        digest=bundle.content_digest,
        components={c: bundle.digest(c) for c in bundle.components},
        storage=storage,
        random_weights=random,
    )


def _digest(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _parse(path: Path) -> Workload:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the workload {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the workload {path} is not JSON: {error}") from error
    known = {f.name for f in fields(Workload)}
    if not isinstance(raw, dict) or not raw.keys() <= known:
        extra = ", ".join(sorted(set(raw) - known)) if isinstance(raw, dict) else type(raw).__name__
        raise UsageError(f"the workload {path} says {extra}; known are {', '.join(sorted(known))}")
    try:
        made = Workload(**{**raw, "prompts": tuple(raw["prompts"])})
    except (KeyError, TypeError) as error:
        raise UsageError(f"the workload {path} lacks a value: {error}") from None
    if made.tier not in TIERS or not made.prompts:
        raise UsageError(
            f"the workload {path} has the tier {made.tier!r} and {len(made.prompts)} prompts; "
            f"expected {', '.join(TIERS)} and at least one"
        )
    return made
