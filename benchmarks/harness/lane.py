"""One configuration while it is measured: its worker, and what was learnt so far."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...runtime.choosing import vae_factor
from ..records.record import Effective, ImageFacts, Memory, Noise, Parity, Phases, Sample
from .effective import is_processor, mismatches, precision_of, read_effective
from .energy import EnergyUse
from .jobs import Configuration, Job
from .measure import Floor
from .memory import PeakWatch, drop_page_cache, highest
from .plan import RunOptions, Say, Tools
from .process import Worker
from .wire import Message
from .workloads import initial_noise

CONVERT_FOLDER = "convert"


@dataclass
class Lane:
    """A configuration and what is known of it; ``twin`` marks the second run of an A/A pair.

    ``folder`` is its scratch folder. ``reasons`` make it invalid, ``remarks`` are said and judge nothing, and
    ``noise`` is what makes it noisy.
    """

    configuration: Configuration
    bundle: Bundle
    folder: Path
    options: RunOptions
    tools: Tools
    say: Say
    model: Path | None = None
    twin: bool = False
    phases: Phases = field(default_factory=Phases)
    warmups: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    effective: dict[str, Effective] = field(default_factory=dict)
    images: tuple[ImageFacts, ...] = ()
    parity: Parity = field(default_factory=Parity)
    earlier: Memory = field(default_factory=Memory)
    told: dict[str, Any] = field(default_factory=dict)
    peaks: PeakWatch = field(default_factory=PeakWatch)
    energy: EnergyUse = field(default_factory=lambda: EnergyUse(None))
    reasons: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    noise: list[tuple[Noise, str]] = field(default_factory=list)
    failed: bool = False
    worker: Worker | None = None
    cold_bytes: int = 0

    @property
    def name(self) -> str:
        """What it is called on the terminal."""
        return self.configuration.name + (" (A/A)" if self.twin else "")

    @property
    def floor(self) -> Floor:
        """How much is to be measured; GPUs are faster and get more."""
        kind = "cpu" if is_processor(self.effective) else "gpu"
        return Floor(self.options.min_batches[kind], self.options.min_seconds)

    @property
    def wants(self) -> bool:
        """Whether it needs another turn."""
        return not self.failed and not self.floor.reached(self.samples)

    @property
    def memory(self) -> Memory:
        """Peaks of the process that measured, of this run and of what was before an interruption."""
        return highest(self.peaks.memory(self.told), self.earlier)

    @property
    def label(self) -> str:
        """What people call it: the backend, the precision in force, and the values of the axes."""
        asked = self.configuration.requested
        ran = self.effective.get("unet") or next(iter(self.effective.values()), None)
        name = ran.backend if ran and asked.name == "auto" else asked.name
        device = "" if asked.device == "auto" else f":{asked.device}"
        parts = (f"{name}{device}", precision_of(self.effective) or asked.precision, *self.configuration.axes)
        return " ".join(parts)

    def fail(self, why: str) -> None:
        """It cannot go on; what was measured is kept, and the row is invalid."""
        self.failed = True
        self.reasons.append(why)
        self.say(f"{self.name}: {why}")
        self.kill()

    def close(self) -> None:
        """End its worker."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def kill(self) -> None:
        """End its worker at once."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def prepare(self) -> None:
        """Write what workers of this configuration are told."""
        load = self.configuration.workload
        self.folder.mkdir(parents=True, exist_ok=True)
        factor = vae_factor(self.bundle)
        cells = (load.height // factor, load.width // factor)
        np.save(self._noise, initial_noise(load.seed, len(load.prompts), load.batch, cells))

    def open(self, cache: Path | None) -> Message:
        """Start a worker; its first line.

        Raises:
            WorkerError: it could not start.
        """
        job = Job(
            bundle=self.bundle.path.resolve(),
            model=self.model,
            workload=self.configuration.workload,
            requested=self.configuration.requested,
            cache=cache,
            scratch=self.folder / "scratch",
            noise=self._noise,
        )
        job.scratch.mkdir(exist_ok=True)
        path = job.write(self.folder / "job.json")
        started = self.tools.start(self.configuration, path, cache)
        self.peaks = PeakWatch()
        self.worker = Worker(
            started.command,
            started.environment,
            name=f"the process of {self.name}",
            log=lambda text: self.say(f"{self.name}: {text}"),
            watch=lambda pid: self.peaks(pid),
            limits=self.options.limits,
        )
        return self.worker.ready()

    def convert(self) -> None:
        """Let a peer make its own format, in a process of its own.

        Raises:
            WorkerError: it could not.
        """
        self.open(self.folder / "cache")
        done = self.ask("convert")
        self.phases = replace(self.phases, convert=float(done["seconds"]))
        self.close()

    def load_cold(self) -> bool:
        """Prepare all components with an empty cache in a fresh process; whether the page cache was dropped.

        Raises:
            WorkerError: it could not.
        """
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(mode=0o700)
        source = self.model or self.bundle.path
        dropped = drop_page_cache(path for path in source.rglob("*") if path.is_file())
        self.open(cache)
        done = self.ask("load")
        parts = {name: {"compile_cold": float(s)} for name, s in dict(done.get("components", {})).items()}
        self.phases = replace(self.phases, compile_cold=float(done["seconds"]), components=parts)
        self.told = self.ask("memory")
        rss = self.memory.rss
        self.cold_bytes = rss.value if rss else 0
        self.told = {}
        self.close()
        return dropped

    def load(self) -> None:
        """Start the process that is timed, and load everything, from the cache that the cold one filled.

        Raises:
            WorkerError: it could not.
        """
        cache = self.folder / "cache" if self.options.cold else None
        ready = self.open(cache)
        done = self.ask("load")
        self.see(done)
        cached = any(row.from_cache for row in self.effective.values())
        parts = {name: dict(row) for name, row in self.phases.components.items()}
        if cached and self.options.cold:
            for name, seconds in dict(done.get("components", {})).items():
                parts.setdefault(name, {})["load_cached"] = float(seconds)
        self.phases = replace(
            self.phases,
            imports=float(ready["imports"]),
            open=float(done.get("open", 0.0)),
            load_cached=float(done["seconds"]) if cached and self.options.cold else None,
            components=parts,
        )

    def draw(self, index: int, save: Path | None = None, latents: Path | None = None) -> Sample:
        """One batch: the prompt and the seed are those of its place in the workload.

        Raises:
            WorkerError: it could not.
        """
        load = self.configuration.workload
        prompt = index % len(load.prompts)
        done = self.ask(
            "draw",
            prompt=prompt,
            seed=load.seed + prompt,
            save=str(save) if save else None,
            latents=str(latents) if latents else None,
        )
        if done.get("effective"):
            self.see(done)
        sample = Sample(
            index=index,
            prompt=prompt,
            started_ns=int(done["started_ns"]),
            seconds=float(done["seconds"]),
            components={str(k): float(v) for k, v in dict(done.get("components") or {}).items()},
            unet_steps=tuple(map(float, done.get("unet_steps") or ())),
        )
        told = (sample.seconds, *sample.components.values(), *sample.unet_steps)
        if not (all(map(math.isfinite, told)) and sample.seconds > 0):
            raise ValueError(f"the worker told a batch of {sample.seconds} s; expected finite times above 0")
        return sample

    def see(self, done: Message) -> None:
        """Take note of what is in force; each difference from what was asked for becomes a reason, once.

        Raises:
            ValueError: the worker's facts are not what was agreed on.
        """
        self.effective = read_effective(done["effective"])
        for text in mismatches(self.configuration.requested, self.effective):
            if text not in self.reasons:
                self.reasons.append(text)

    def ask(self, do: str, **fields: Any) -> Message:
        """Ask its worker."""
        if self.worker is None:
            raise ValueError(f"{self.name} has no worker to {do}")
        return self.worker.ask(do, **fields)

    def ask_memory(self) -> None:
        """Take note of the worker's own figures."""
        answer: Mapping[str, Any] = self.ask("memory")
        self.told = {name: row for name, row in answer.items() if isinstance(row, dict)}

    @property
    def _noise(self) -> Path:
        return self.folder / "noise.npy"
