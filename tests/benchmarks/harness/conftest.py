"""A run of the harness on scripted workers: nothing is computed, and no time is the machine's."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kiln.benchmarks.fidelity import Trial
from kiln.benchmarks.harness.driver import Outcome, Run
from kiln.benchmarks.harness.jobs import Configuration
from kiln.benchmarks.harness.noise import Snapshot
from kiln.benchmarks.harness.plan import Plan, RunOptions, Started, Tools
from kiln.benchmarks.harness.process import Limits
from kiln.benchmarks.harness.workloads import Workload, facts_of, load_workload
from kiln.benchmarks.records.record import Gate, Record, Requested
from kiln.bundle import open_bundle
from kiln.exporters.resolve import bundled_models

FAKE = Path(__file__).parent / "fake_worker.py"
SHARES = {"text_encoder": 0.05, "unet": 0.8, "sampler": 0.04, "vae_decoder": 0.1}


def script(
    seconds: list[float] | None = None, *, backend: str = "onnxruntime", **more: Any
) -> dict[str, Any]:
    """What a fake worker does, unless it is told otherwise: one second a batch, all as it was asked."""
    row = {
        "backend": backend,
        "version": "1",
        "provider": "CPUExecutionProvider" if backend == "onnxruntime" else "CPU",
        "device": "cpu",
        "precision": "fp32",
        "threads": 2,
    }
    usual = {
        "seconds": seconds or [1.0],
        "shares": SHARES,
        "effective": {"unet": row},
        "memory": {"rss": {"value": 3_000_000_000, "method": "VmHWM"}},
    }
    return usual | more


@dataclass
class Bench:
    """Runs configurations, each on the script of its backend's name; others draw the reference."""

    folder: Path
    scripts: dict[str, dict[str, Any]]
    workload: Workload
    options: RunOptions
    said: list[str] = field(default_factory=list)
    snapshots: Iterator[Snapshot] | None = None
    gates: Callable[[Trial], list[Gate]] = lambda trial: []
    reference: dict[str, Any] | None = None

    def configurations(self) -> tuple[Configuration, ...]:
        bundle = open_bundle(bundled_models()["emoji"])
        facts = facts_of(self.workload, bundle, 4)
        return tuple(
            Configuration(facts, Requested("kiln", name, precision="fp32"), bundle.path)
            for name in self.scripts
        )

    def run(self, **changes: Any) -> list[Outcome]:
        bundle = open_bundle(bundled_models()["emoji"])
        configurations = self.configurations()
        plan = Plan(
            configurations, {c.bundle: bundle for c in configurations}, replace(self.options, **changes)
        )
        still = self.snapshots or (quiet(float(i)) for i in itertools.count())
        tools = Tools(
            start=self._start,
            component_gates=self.gates,
            environment=lambda: {"cpu": "scripted", "threads": 2},
            snapshot=lambda own_s: next(still),
        )
        return Run(plan, self.said.append, tools).measure()

    def records(self, **changes: Any) -> dict[str, Record]:
        return {outcome.record.requested.name: outcome.record for outcome in self.run(**changes)}

    def _start(self, configuration: Configuration, job: Path, cache: Path | None) -> Started:
        said = self.scripts.get(configuration.requested.name)
        reference = self.reference or script(backend=configuration.requested.name)
        row = reference["effective"]["unet"]
        row |= {"device": configuration.requested.device, "provider": row["provider"]}
        path = job.with_name("script.json")
        path.write_text(json.dumps(reference if said is None else said))
        return Started((sys.executable, str(FAKE), str(job), str(path)), {"PATH": "/usr/bin:/bin"})


def quiet(at: float) -> Snapshot:
    """A machine on which nothing else happens; one second passes with each look."""
    return Snapshot(at, 2, 0.1, at, 0.0, at, 0, 2000.0, 50.0)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(scripts: dict[str, dict[str, Any]], **options: Any) -> Bench:
        workload = replace(
            load_workload("quick"), prompts=("red apple", "snowman"), steps=4, latents_digest=None
        )
        usual: dict[str, Any] = {
            "directory": tmp_path / "results",
            "min_batches": {"cpu": 6, "gpu": 6},
            "min_seconds": 0.0,
            "cold": False,
            "limits": Limits(60.0, 120.0),
        }
        made = RunOptions(**(usual | options))
        made.directory.mkdir(exist_ok=True)
        return Bench(tmp_path, scripts, workload, made)

    return make


@pytest.fixture
def scripted() -> Callable[..., dict[str, Any]]:
    return script
