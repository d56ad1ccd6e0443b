"""The seam between Kiln and an engine: two nouns, Backend and Session.

NOTE: every backend and the benchmark harness depend on this file. It should not grow: an option
that one engine needs belongs into ``PrepareOptions.extra``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be used here; ``reason`` says why not, and what to install."""

    available: bool
    reason: str = ""
    version: str = ""


@dataclass(frozen=True)
class Device:
    """One device an engine can run on: the id to ask for, a readable name, what it computes in."""

    id: str
    name: str
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class GraphSource:
    """What a backend needs to know of one component of a bundle.

    ``weights_path`` is the safetensors file that ``graph_path`` points into; ``config`` is the
    diffusers or transformers config of ``network`` (only the torch backend builds modules from it);
    ``digest`` identifies graph and weights together and keys compiled caches.
    """

    component: str
    graph_path: Path
    weights_path: Path
    config: Mapping[str, object]
    digest: str


@dataclass(frozen=True)
class PrepareOptions:
    """How a component is to be prepared.

    ``shapes`` fixes the input shapes: ``{"sample": (2, 4, 64, 64), ...}``; an input that is not
    named stays dynamic. ``precision`` is ``auto``, ``fp32``, ``bf16`` or ``fp16``: what the engine
    computes in. ``threads`` 0 lets the engine choose. ``cache_dir`` is a folder for compiled models,
    None for no cache.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    cache_dir: Path | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class InForce:
    """What the engine says it uses, read back after ``prepare``; never what was asked for.

    ``settings`` holds what else the engine reports of its options, and environment variables that override
    them, by the engine's own names.
    """

    backend: str
    version: str
    provider: str
    device: str
    precision: str
    threads: int
    from_cache: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


class Session(Protocol):
    """One prepared component."""

    in_force: InForce

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run once; arrays in and out are named and typed by ``components.CONTRACTS``."""
        ...

    def close(self) -> None:
        """Free the engine's memory; running afterwards is an error."""
        ...


class Backend(Protocol):
    """An engine."""

    name: str

    def probe(self) -> Availability:
        """Whether the engine can be used here. Never raises, never imports more than it must."""
        ...

    def devices(self) -> tuple[Device, ...]:
        """The devices the engine sees; empty when it is not available."""
        ...

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Session:
        """Load one component.

        Raises:
            BackendUnavailable: the engine or the device asked for is not there.
            SessionError: the engine refused the graph, or cannot honour an option.
        """
        ...
