"""Parity before timing: the reference's pictures and latents, and what a configuration's are against them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...errors import KilnError
from ..records.record import Gate, ImageFacts, Requested, Sample
from .jobs import Configuration, configuration_key
from .lane import Lane
from .pictures import keep_images
from .plan import RunOptions, Say, Tools

if TYPE_CHECKING:
    from ..fidelity import Trial

NOT_CHECKED = "parity not checked"
_FACTS = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The reference's output for one workload; ``pixels`` and ``latents`` are files, one for each prompt."""

    requested: Requested
    facts: Mapping[str, Any]
    bundle: Bundle
    pixels: tuple[Path, ...]
    latents: tuple[Path, ...]
    images: tuple[ImageFacts, ...]


def draw_reference(
    configuration: Configuration, bundle: Bundle, folder: Path, options: RunOptions, tools: Tools, say: Say
) -> Reference:
    """Draw every prompt of a workload in fp32, or take what an interrupted run has drawn.

    Args:
        configuration: whose workload it is.
        bundle: the reference's.
        folder: where references of this run are kept.
        options: of the run.
        tools: of the run.
        say: gets progress.

    Raises:
        BackendUnavailable: there is no engine for it.
        WorkerError: it could not be drawn.
    """
    from ..fidelity import plan_reference

    requested = plan_reference(bundle)
    model = replace(configuration.workload.model, digest=bundle.content_digest)
    load = replace(configuration.workload, model=model)
    at = folder / configuration_key(load, requested)
    count = range(len(load.prompts))
    pixels = tuple(at / f"{p}.npy" for p in count)
    latents = tuple(at / f"{p}-latents.npy" for p in count)
    if not (at / _FACTS).is_file():
        say(f"reference: {requested.name} {requested.precision} draws {len(load.prompts)} prompts")
        asked = Configuration(load, requested, bundle.path)
        own = replace(options, cold=False, parity=False)
        lane = Lane(asked, bundle, at, own, tools, lambda text: say(f"reference, {text}"))
        lane.prepare()
        try:
            lane.load()
            for p in count:
                lane.draw(p, pixels[p], latents[p])
        finally:
            lane.close()
        effective = {name: asdict(row) for name, row in lane.effective.items()}
        facts = {"requested": asdict(requested), "effective": effective, "bundle": bundle.name}
        facts |= {"digest": bundle.content_digest, "reasons": lane.reasons}
        (at / _FACTS).write_text(json.dumps(facts, default=str), encoding="utf-8")
    facts = json.loads((at / _FACTS).read_text(encoding="utf-8"))
    images = keep_images(options.directory, [np.load(p) for p in pixels], load.seed)
    return Reference(requested, facts, bundle, pixels, latents, images)


def draw_prompts(lane: Lane) -> list[Sample]:
    """Every prompt once, kept: the first batches of a process, which are warm-ups too.

    Raises:
        WorkerError: it could not.
    """
    count = len(lane.configuration.workload.prompts)
    latents = _gives_latents(lane.configuration)
    drawn = []
    for p in range(count):
        pixels_file, latents_file = _files(lane, p)
        drawn.append(lane.draw(p, pixels_file, latents_file if latents else None))
    pixels = [np.load(_files(lane, p)[0]) for p in range(count)]
    lane.images = keep_images(lane.options.directory, pixels, lane.configuration.workload.seed)
    return drawn


def judge_components(lane: Lane, reference: Reference, recordings: Path) -> None:
    """Component by component against the reference, in processes of their own; gates go into the lane."""
    if lane.configuration.requested.kind == "peer":
        return
    gates = lane.tools.component_gates(_trial(lane, reference, recordings))
    _add(lane, reference, gates)


def judge_pictures(lane: Lane, reference: Reference) -> None:
    """Latents step by step, then the pictures."""
    from ..fidelity import image_gates, latent_gates, run_precision
    from ..fidelity.limits import UNKNOWN

    asked = lane.configuration
    if asked.requested.kind == "peer" and not _shares_noise(asked):
        lane.remarks.append(f"{NOT_CHECKED}: {asked.requested.name} starts from noise of its own")
        return
    files = [_files(lane, p) for p in range(len(asked.workload.prompts))]
    # Another bundle's pictures may differ as they like, unless it is the int8 of the same.
    if UNKNOWN in {one.precision for one in lane.effective.values()}:
        lane.remarks.append(f"parity not judged: {asked.requested.name} does not tell its precision")
    judged = run_precision(lane.bundle, asked.requested, lane.effective, _other(lane, reference))
    if all(latents.is_file() for _, latents in files):
        made = np.stack([np.load(latents) for _, latents in files])
        wanted = np.stack([np.load(path) for path in reference.latents])
        gates, curves = latent_gates(made, wanted, asked.requested, lane.effective, precision=judged)
        _add(lane, reference, gates)
        lane.parity = replace(lane.parity, latents=curves)
    if asked.workload.model.random_weights:
        lane.remarks.append("pictures not judged: the weights are random")
        return
    pixels = [image for path, _ in files for image in np.load(path)]
    wanted_pixels = [image for path in reference.pixels for image in np.load(path)]
    learned = _learned(lane, pixels, wanted_pixels)
    gates, metrics = image_gates(
        pixels, wanted_pixels, asked.requested, lane.effective, precision=judged, learned=learned
    )
    _add(lane, reference, gates)
    lane.images = tuple(
        replace(facts, metrics={k: v for k, v in found.items() if math.isfinite(v)})
        for facts, found in zip(lane.images, metrics, strict=True)
    )


def _learned(lane: Lane, pixels: list[np.ndarray], wanted: list[np.ndarray]) -> list[dict[str, float]] | None:
    """LPIPS and CLIP score where they were asked for; a failure is a remark, which judges nothing."""
    options = lane.options.learned
    if options is None:
        return None
    from ..fidelity.learned import measure_learned

    load = lane.configuration.workload
    prompts = [prompt for prompt in load.prompts for _ in range(load.batch)]
    try:
        return measure_learned(pixels, wanted, prompts, options, lane.options.limits)
    except (KilnError, OSError) as error:
        lane.remarks.append(f"LPIPS and CLIP score not told: {' '.join(str(error).split())}")
        return None


def explain_failure(lane: Lane, reference: Reference, recordings: Path) -> None:
    """Where it parts from the reference first; a failure to find out is a remark."""
    from ..fidelity import explain

    if lane.configuration.requested.kind == "peer":
        return
    try:
        found = explain(_trial(lane, reference, recordings))
    except (KilnError, OSError, ValueError) as error:
        lane.remarks.append(f"not explained: {' '.join(str(error).split())}")
        return
    lane.parity = replace(lane.parity, diverges=found)


def _trial(lane: Lane, reference: Reference, recordings: Path) -> Trial:
    """The lane against the reference."""
    from ..fidelity import Trial

    asked = lane.configuration
    return Trial(
        lane.bundle,
        asked.requested,
        reference.requested,
        asked.workload,
        cache=lane.folder / "cache" if lane.options.cold else None,
        against=_other(lane, reference),
        recordings=recordings,
        limits=lane.options.limits,
    )


def _add(lane: Lane, reference: Reference, gates: list[Gate]) -> None:
    lane.parity = replace(
        lane.parity,
        reference=dict(reference.facts),
        gates=(*lane.parity.gates, *map(_finite, gates)),
        reference_images=reference.images,
    )
    lane.reasons += [failed_gate(gate) for gate in gates if not gate.passed]


def _finite(gate: Gate) -> Gate:
    """The gate as a record holds it: without a figure that is infinite or no number."""
    return gate if gate.value is None or math.isfinite(gate.value) else replace(gate, value=None)


def failed_gate(gate: Gate) -> str:
    """A failed gate in words."""
    side = "at most" if gate.at_most else "at least"
    value = "no figure" if gate.value is None else f"{gate.value:.4g}"
    return f"parity of {gate.where}: {gate.metric} {value}, {side} {gate.limit:g} was expected"


def _other(lane: Lane, reference: Reference) -> Bundle | None:
    """The reference's bundle, None when it is the lane's own."""
    return None if reference.bundle.content_digest == lane.bundle.content_digest else reference.bundle


def _shares_noise(configuration: Configuration) -> bool:
    from ..peers.registry import find_peer

    return find_peer(configuration.requested.name, configuration.python).shares_noise


def _gives_latents(configuration: Configuration) -> bool:
    from ..peers.registry import find_peer

    if configuration.requested.kind != "peer":
        return True
    return find_peer(configuration.requested.name, configuration.python).gives_latents


def _files(lane: Lane, prompt: int) -> tuple[Path, Path]:
    return lane.folder / f"{prompt}.npy", lane.folder / f"{prompt}-latents.npy"


def forget_files(lane: Lane) -> None:
    """Remove the lane's scratch folder."""
    shutil.rmtree(lane.folder, ignore_errors=True)
