"""The record of one measured configuration: frozen values that become one line of JSON and come back from it.

``benchmarks/data/record.schema.json`` publishes the same for others. Times are seconds unless a name says
otherwise, memory is bytes. Whatever can be computed from the samples is in ``stats`` and nowhere else, so
that ``kiln bench verify`` can compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "kiln-bench/1"

Kind = Literal["kiln", "peer"]
Verdict = Literal["valid", "noisy", "invalid"]
Noise = Literal["clean", "noisy", "invalid"]


@dataclass(frozen=True)
class Tool:
    """What measured: the version of Kiln and the commit of its checkout, with ``+`` when it had changes."""

    version: str
    commit: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What was run: names and digests, no paths.

    ``digest`` is the bundle's content digest; ``components`` those of graph and weights of each component;
    ``random_weights`` marks a model that can show speed and no picture; ``storage`` is by component.
    """

    name: str
    family: str
    digest: str
    components: Mapping[str, str] = field(default_factory=dict)
    storage: Mapping[str, str] = field(default_factory=dict)
    random_weights: bool = False


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter that is baked into the model's weights."""

    name: str
    sha256: str
    unet_strength: float
    text_encoder_strength: float


@dataclass(frozen=True)
class WorkloadFacts:
    """What one image takes: the resolved workload, everything that changes the picture or the time.

    ``id`` is ``name@version``; two records are comparable when ``key`` is equal (see ``comparable``).
    Image ``i`` of the samples draws ``prompts[i % len(prompts)]`` with seed ``seed + i % len(prompts)``.
    ``latents_digest`` is the SHA-256 of the initial noise of all prompts, float32 in C order.
    """

    id: str
    tier: str
    model: ModelFacts
    prompts: tuple[str, ...]
    negative_prompt: str
    prompts_digest: str
    latents_digest: str
    seed: int
    sampler: str
    schedule: str
    steps: int
    cfg_scale: float
    width: int
    height: int
    batch: int
    adapters: tuple[AdapterFacts, ...] = ()


@dataclass(frozen=True)
class Requested:
    """What was asked for; ``threads`` 0 leaves it to the engine. ``name`` is the backend's or the peer's."""

    kind: Kind
    name: str
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effective:
    """What one component reported after it was prepared, or after it ran; never what was asked for."""

    backend: str
    version: str
    provider: str
    device: str
    precision: str
    threads: int
    from_cache: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phases:
    """Seconds that are spent once; None where it was not measured or does not apply.

    ``imports`` from the start of the process until Kiln (or the peer) is loaded; ``convert`` making the
    peer's own format from the model, in a process of its own; ``open`` the bundle verified and opened;
    ``compile_cold`` preparing all components with an empty cache, ``load_cached`` the same from the cache
    just filled, in another process; ``components`` splits both: ``{"unet": {"compile_cold": 2.7, ...}}``;
    ``first_image`` the first image after ``load_cached``, or after ``compile_cold`` where nothing is
    cached.
    """

    imports: float | None = None
    convert: float | None = None
    open: float | None = None
    compile_cold: float | None = None
    load_cached: float | None = None
    first_image: float | None = None
    components: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One batch of images, from the request to decoded pixels; no file is written inside.

    ``started_ns`` is a monotonic clock's, shared by all processes of a run. ``components`` are seconds by
    ``text_encoder``, ``unet``, ``sampler``, ``vae_decoder``; what is left of ``seconds`` is unattributed. A
    peer that cannot tell its components apart has none. ``unet_steps`` is every step's UNet time.
    """

    index: int
    prompt: int
    started_ns: int
    seconds: float
    components: Mapping[str, float] = field(default_factory=dict)
    unet_steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stats:
    """What is said of samples; None where there are too few. ``outliers`` are positions, all are kept.

    ``p99`` needs 100 samples, ``p95`` 20, ``p90`` 10: a tail is never interpolated from less. ``interval`` is
    the 95 % bootstrap interval of the median. ``modes`` is 2 when the samples fall into two separate groups.
    """

    count: int
    median: float
    mean: float
    sd: float | None
    cv: float | None
    mad: float
    min: float
    max: float
    p90: float | None
    p95: float | None
    p99: float | None
    interval: tuple[float, float] | None
    outliers: tuple[int, ...] = ()
    modes: int = 1


@dataclass(frozen=True)
class Derived:
    """Computed from the samples: seconds per image (batch divided out), per UNet step, per component.

    ``unattributed`` is the share of the samples' time that no component accounts for, None without
    components.
    """

    image: Stats | None = None
    unet_step: Stats | None = None
    components: Mapping[str, Stats] = field(default_factory=dict)
    unattributed: float | None = None


@dataclass(frozen=True)
class Bytes:
    """An amount of memory and how it was learnt: ``VmHWM``, ``RssAnon at most``, ``nvml process``, ..."""

    value: int
    method: str


@dataclass(frozen=True)
class Memory:
    """Peaks of the process that measured, None where there is no method.

    ``anonymous`` and ``file_backed`` are the highest values seen, each by itself, and need not add up to
    ``rss``.
    """

    rss: Bytes | None = None
    anonymous: Bytes | None = None
    file_backed: Bytes | None = None
    device: Bytes | None = None


@dataclass(frozen=True)
class Energy:
    """Joules per image by a named method, ``none`` without one; ``net`` has the idle power taken off."""

    method: str = "none"
    joules_per_image: float | None = None
    idle_watts: float | None = None
    net_joules_per_image: float | None = None


@dataclass(frozen=True)
class NoiseReport:
    """Whether the machine was fit to measure on, and why not.

    ``floor`` is the relative difference of medians that two runs of the same configuration may have on this
    machine: the far end of the 95 % interval of an A/A pair's ratio, so that a pair that agrees by luck
    claims no more than its spread allows. None when it was not measured. ``facts`` are load, frequencies,
    temperature, throttling before and after.
    """

    verdict: Noise = "clean"
    reasons: tuple[str, ...] = ()
    floor: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """One figure of parity and its limit; ``limit`` None is reported and not judged.

    ``level`` is ``component``, ``latents`` or ``image``; ``where`` the component, the step or the prompt.
    """

    level: str
    where: str
    metric: str
    value: float | None
    limit: float | None
    at_most: bool
    passed: bool


@dataclass(frozen=True)
class ImageFacts:
    """One picture: ``file`` is relative to the results folder, ``pixels`` the SHA-256 of its RGB bytes.

    ``metrics`` compare it with the reference's: psnr_db, ssim, and with the extra lpips and clip figures.
    """

    prompt: int
    seed: int
    file: str
    sha256: str
    pixels: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parity:
    """How near the outputs are to the reference's: the same bundle in fp32.

    ``reference`` says what it was, ``{}`` when none was run; ``latents`` has one curve over the steps per
    metric; ``reference_images`` have no metrics. ``diverges`` is the answer of ``--explain``: component,
    step, layers.
    """

    reference: Mapping[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    latents: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reference_images: tuple[ImageFacts, ...] = ()
    diverges: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One configuration, measured. ``run`` is shared by all that took turns with each other.

    ``key`` identifies workload and request, for resuming and merging; ``label`` is for people. ``reasons``
    say why the verdict is not ``valid``: failed gates, settings not in force, noise; a valid record has none.
    ``remarks`` are to be borne in mind and judge nothing.
    """

    id: str
    run: str
    key: str
    label: str
    created: str
    tool: Tool
    workload: WorkloadFacts
    requested: Requested
    effective: Mapping[str, Effective]
    environment: Mapping[str, Any]
    phases: Phases
    warmups: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    stats: Derived
    memory: Memory
    energy: Energy
    noise: NoiseReport
    parity: Parity
    images: tuple[ImageFacts, ...]
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    schema: str = SCHEMA
