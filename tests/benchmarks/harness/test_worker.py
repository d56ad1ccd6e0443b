"""Kiln's own worker, on the backend that computes nothing and by real requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kiln.benchmarks.harness.jobs import Job
from kiln.benchmarks.harness.plan import start_worker
from kiln.benchmarks.harness.process import Worker, WorkerError
from kiln.benchmarks.harness.worker import KilnWorker, Stopwatch, TimedSession
from kiln.benchmarks.harness.workloads import Changes, facts_of, load_workload
from kiln.benchmarks.records.record import Requested, WorkloadFacts
from kiln.bundle import open_bundle
from kiln.errors import InvalidOutputError
from kiln.exporters.resolve import bundled_models


@pytest.fixture(scope="module")
def workload() -> WorkloadFacts:
    bundle = open_bundle(bundled_models()["emoji"])
    return facts_of(load_workload("quick"), bundle, 4, Changes(batch=2, steps=3))


def job(folder: Path, workload: WorkloadFacts, **asked: object) -> Job:
    requested = Requested("kiln", "null", **asked)  # type: ignore[arg-type]
    return Job(
        bundled_models()["emoji"], None, workload, requested, folder / "cache", folder, folder / "noise.npy"
    )


@pytest.fixture
def running(tmp_path: Path, workload: WorkloadFacts) -> Iterator[Worker]:
    path = job(tmp_path, workload).write(tmp_path / "job.json")
    configuration = SimpleNamespace(requested=Requested("kiln", "null"))
    started = start_worker(configuration, path, tmp_path / "cache")  # type: ignore[arg-type]
    assert started.environment["KILN_CACHE"] == str(tmp_path / "cache")
    with Worker(started.command, started.environment) as worker:
        worker.ready()
        yield worker


def test_a_batch_is_drawn_and_its_parts_add_up(
    running: Worker, workload: WorkloadFacts, tmp_path: Path
) -> None:
    loaded = running.ask("load")
    assert set(loaded["components"]) == {"text_encoder", "unet", "vae_decoder"}
    assert loaded["open"] > 0
    assert loaded["effective"]["unet"]["provider"] == "none"
    pixels, latents = tmp_path / "pixels.npy", tmp_path / "latents.npy"
    done = running.ask("draw", prompt=1, seed=7, save=str(pixels), latents=str(latents))
    assert np.load(pixels).shape == (2, 64, 64, 3)
    assert np.load(pixels).dtype == np.uint8
    assert np.load(latents).shape == (workload.steps, 2, 4, 16, 16)
    assert np.load(latents).dtype == np.float32
    assert len(done["unet_steps"]) == workload.steps
    assert set(done["components"]) == {"text_encoder", "unet", "sampler", "vae_decoder"}
    assert all(seconds >= 0 for seconds in done["components"].values())
    assert sum(done["components"].values()) <= done["seconds"]
    assert sum(done["unet_steps"]) == pytest.approx(done["components"]["unet"])
    again = running.ask("draw", prompt=1, seed=7, save=None, latents=None)
    assert len(again["unet_steps"]) == workload.steps  # of this batch only
    memory = running.ask("memory")
    assert memory["rss"]["value"] > memory["anonymous"]["value"] > 0


def test_what_the_engine_refuses_is_an_error_of_one_line(tmp_path: Path, workload: WorkloadFacts) -> None:
    path = job(tmp_path, workload, precision="bf16").write(tmp_path / "job.json")
    started = start_worker(SimpleNamespace(requested=Requested("kiln", "null")), path, None)  # type: ignore[arg-type]
    with Worker(started.command, started.environment) as worker:
        worker.ready()
        with pytest.raises(WorkerError, match="the null backend has auto and fp32, not 'bf16'"):
            worker.ask("load")


def test_only_weights_that_are_known_to_be_random_may_draw_nothing(
    tmp_path: Path, workload: WorkloadFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = np.zeros((1, 64, 64, 3), np.uint8)
    monkeypatch.setattr("kiln.runtime.pipeline.to_uint8", lambda sample: flat)
    real = KilnWorker(job(tmp_path, workload), None)  # type: ignore[arg-type]
    real.load()
    with pytest.raises(InvalidOutputError, match="one flat colour"):
        real.draw(0, 1)
    marked = replace(workload, model=replace(workload.model, random_weights=True))
    random = KilnWorker(job(tmp_path, marked), None)  # type: ignore[arg-type]
    random.load()
    assert random.draw(0, 1)["seconds"] > 0


def test_the_sampler_is_what_lies_between_and_is_not_the_unets() -> None:
    watch = Stopwatch()
    watch.runs = [
        ("text_encoder", 0.0, 1.0),
        ("unet", 1.5, 3.5),
        ("unet", 4.0, 6.0),
        ("vae_decoder", 6.25, 7.0),
        ("vae_decoder", 7.1, 8.0),
    ]
    assert watch.components() == pytest.approx(
        {"text_encoder": 1.0, "unet": 4.0, "vae_decoder": 1.65, "sampler": 1.25}
    )
    assert watch.unet_steps() == [2.0, 2.0]


def test_a_timed_session_passes_everything_on() -> None:
    inner = SimpleNamespace(in_force="as it says", run=lambda feeds: {"out": feeds["x"]}, closed=False)
    inner.close = lambda: setattr(inner, "closed", True)
    watch = Stopwatch()
    session = watch.wrap("unet", inner)  # type: ignore[arg-type]
    assert isinstance(session, TimedSession)
    assert session.in_force == "as it says"
    assert session.run({"x": 1}) == {"out": 1}  # type: ignore[dict-item]
    assert [component for component, _, _ in watch.runs] == ["unet"]
    session.close()
    assert inner.closed


def test_a_job_is_plain_json(tmp_path: Path, workload: WorkloadFacts) -> None:
    made = job(tmp_path, workload)
    assert asdict(made)["workload"]["model"]["name"] == "emoji"
    assert sys.executable in start_worker(SimpleNamespace(requested=made.requested), tmp_path, None).command  # type: ignore[arg-type]
