"""From options that repeat to configurations: all combinations, each named by what differs in the run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...backends import registry
from ...bundle import Bundle
from ...errors import BackendUnavailable, UsageError
from ...runtime.choosing import vae_factor
from ...runtime.request import Request
from ...runtime.settings import Settings
from ..records.record import Kind, Requested, WorkloadFacts
from .jobs import Configuration
from .models import NO_ADAPTER
from .workloads import Changes, Workload, facts_of

ALL = "all"
_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Axes:
    """The values of each option; an empty one leaves it to the workload or the engine.

    ``backends`` are names, with a device after a colon, or ``all``; ``sizes`` are ``512`` or ``512x768``
    (width by height); ``peers`` are ``NAME=PYTHON``.
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    loras: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One bundle of the run, and how it is named where there are several."""

    bundle: Bundle
    name: str = ""


def configurations(workload: Workload, axes: Axes, variants: Sequence[Variant]) -> list[Configuration]:
    """Every combination, in the order of the options, backends slowest.

    Args:
        workload: what is drawn.
        axes: of the options.
        variants: the bundles: one for each ``--lora``, and that of ``--against``.

    Raises:
        UsageError: a value that cannot be.
        BackendUnavailable: a backend that is named is not here.
    """
    runners = list(_runners(axes))
    found = [
        Configuration(facts, requested, variant.bundle.path, (*names, *named), python)
        for (requested, python, named), variant in itertools.product(runners, variants)
        for facts, names in _workloads(workload, axes, variant)
    ]
    keys = [configuration.key for configuration in found]
    for configuration in found:
        if keys.count(configuration.key) > 1:
            raise UsageError(f"{configuration.name} is asked for twice; give each value of an option once")
    return found


def lora_variants(axes: Axes) -> tuple[str, ...]:
    """The values of ``--lora``; one without adapters where it is not given."""
    return axes.loras or (NO_ADAPTER,)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of ``512`` or ``512x768``.

    Raises:
        UsageError: neither.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no size; expected for example 512 or 512x768, width by height")
    width, height = match.groups()
    return int(width), int(height or width)


def _workloads(
    workload: Workload, axes: Axes, variant: Variant
) -> Iterator[tuple[WorkloadFacts, tuple[str, ...]]]:
    sizes: list[tuple[int | None, int | None]] = [parse_size(text) for text in axes.sizes]
    sizes = sizes or [(None, None)]
    product = itertools.product(sizes, axes.batches or (None,), axes.steps or (None,))
    for (width, height), batch, steps in product:
        facts = facts_of(
            workload, variant.bundle, vae_factor(variant.bundle), Changes(width, height, batch, steps)
        )
        _check(facts)
        names = [variant.name] if variant.name else []
        names += [f"{facts.width}x{facts.height}"] if len(sizes) > 1 else []
        names += [f"b{facts.batch}"] if len(axes.batches) > 1 else []
        names += [f"{facts.steps} steps"] if len(axes.steps) > 1 else []
        yield facts, tuple(names)


def _check(facts: WorkloadFacts) -> None:
    """What a request would refuse, before anything is started."""
    Request(
        facts.prompts[0],
        width=facts.width,
        height=facts.height,
        steps=facts.steps,
        cfg_scale=facts.cfg_scale,
        seed=facts.seed,
        count=facts.batch,
        batch_size=facts.batch,
        sampler=facts.sampler,
        schedule=facts.schedule,
    )


@dataclass(frozen=True)
class _Runner:
    """A backend on a device, or a peer in its Python."""

    kind: Kind
    name: str
    device: str = "auto"
    python: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)


def _runners(axes: Axes) -> Iterator[tuple[Requested, str | None, tuple[str, ...]]]:
    """What runs: backends, then peers, each in every precision and with every number of threads."""
    named = _expanded(axes.backends or (() if axes.peers else ("auto",)))
    runners = [*map(_backend, named), *map(_peer, axes.peers)]
    options = list(itertools.product(axes.precisions or ("auto",), axes.threads or (0,)))
    for one, (precision, threads) in itertools.product(runners, options):
        Settings(precision=precision, threads=threads)  # refuses what cannot be
        names = (f"t{threads}",) if len(axes.threads) > 1 else ()
        asked = Requested(one.kind, one.name, one.device, precision, threads, dict(one.options))
        yield asked, one.python, names


def _expanded(backends: Sequence[str]) -> Iterator[str]:
    for text in backends:
        if text != ALL:
            yield text
            continue
        for name, found in registry.probe_all().items():
            if found.available and name != "null":
                yield name


def _backend(text: str) -> _Runner:
    name, device = registry.parse_backend(text)
    if name != registry.AUTO:
        found = registry.get_backend(name).probe()
        if not found.available:
            raise BackendUnavailable(f"the backend {name} cannot be used: {found.reason}")
    return _Runner("kiln", name, device)


def _peer(text: str) -> _Runner:
    from ..peers.registry import check_peer, find_peer

    name, _, python = text.partition("=")
    peer = find_peer(name, python or None)
    check_peer(peer)
    return _Runner("peer", peer.name, python=peer.python, options=peer.project.options)
