"""A run before it starts: what is measured, how, and with what it is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle
from ..records.record import Gate
from .environment import describe_environment
from .jobs import Configuration
from .noise import Snapshot, snapshot
from .process import Limits

if TYPE_CHECKING:
    from ..fidelity import Trial
    from ..fidelity.learned import LearnedOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """How to measure.

    ``min_batches`` is the floor of timed batches for what runs on the processor and on a GPU, ``min_seconds``
    that of their time. ``delay_s`` is waited before each batch. ``directory`` is the results folder.
    """

    directory: Path
    min_batches: Mapping[str, int]
    min_seconds: float
    delay_s: float = 0.0
    parity: bool = True
    cold: bool = True
    aa: bool = False
    explain: bool = False
    learned: LearnedOptions | None = None
    resume: bool = False
    command: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Plan:
    """What is measured; ``bundles`` are open, by path. Others are held against the bundle ``against``."""

    configurations: tuple[Configuration, ...]
    bundles: Mapping[Path, Bundle]
    options: RunOptions
    against: Bundle | None = None


@dataclass(frozen=True)
class Started:
    """How a worker is started: its command line and all of its variables."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def start_worker(configuration: Configuration, job: Path, cache: Path | None) -> Started:
    """Kiln's own worker in this Python, or a peer's in its own."""
    if configuration.requested.kind == "peer":
        from ..peers.registry import find_peer

        peer = find_peer(configuration.requested.name, configuration.python)
        return Started(tuple(peer.command(job)), peer.environment)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        # What a worker caches is its own and has no limit, so that nothing is dropped while it is measured.
        environment |= {"KILN_CACHE": str(cache), "KILN_CACHE_LIMIT": "none"}
    module = f"{__package__}.worker"
    return Started((sys.executable, "-W", "ignore", "-m", module, str(job)), environment)


def component_gates(trial: Trial) -> list[Gate]:
    """Parity of components, by ``benchmarks.fidelity``, which is imported when it is needed."""
    from ..fidelity import component_gates as measure

    return measure(trial)


@dataclass(frozen=True)
class Tools:
    """What a run works with, so that tests can put other things in their place."""

    start: Callable[[Configuration, Path, Path | None], Started] = start_worker
    component_gates: Callable[[Trial], list[Gate]] = component_gates
    environment: Callable[[], dict[str, Any]] = describe_environment
    snapshot: Callable[[float], Snapshot] = snapshot
