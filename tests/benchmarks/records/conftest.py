"""Records that agree with themselves, made without measuring: digests, statistics and pictures are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.benchmarks.harness.jobs import configuration_key
from kiln.benchmarks.harness.pictures import keep_images
from kiln.benchmarks.harness.workloads import array_digest, initial_noise
from kiln.benchmarks.records import record as r
from kiln.benchmarks.records.stats import derive
from kiln.benchmarks.records.store import append_record
from kiln.metrics import psnr_db, ssim

SIZE = 16
PROMPTS = ("red apple", "snowman")


def lognormal(median: float, sigma: float, count: int, seed: int) -> list[float]:
    """Times as machines have them: a few per cent of spread, longer towards the slow side."""
    return [float(v) for v in median * np.exp(np.random.default_rng(seed).normal(0, sigma, count))]


@cache
def latents_digest(batch: int) -> str:
    return array_digest(initial_noise(5, len(PROMPTS), batch, (SIZE // 8, SIZE // 8)))


def workload(**changes: Any) -> r.WorkloadFacts:
    digest = hashlib.sha256(json.dumps([PROMPTS, ""]).encode()).hexdigest()
    batch = changes.get("batch", 1)
    facts = r.WorkloadFacts(
        id="test@1",
        tier="quick",
        model=r.ModelFacts("emoji", "sd1", "d" * 64, {"unet": "e" * 64}, {"unet": "fp16"}),
        prompts=PROMPTS,
        negative_prompt="",
        prompts_digest=digest,
        latents_digest=latents_digest(batch),
        seed=5,
        sampler="euler",
        schedule="normal",
        steps=4,
        cfg_scale=7.0,
        width=SIZE,
        height=SIZE,
        batch=batch,
    )
    return replace(facts, **changes)


def samples(times: Sequence[float], batch: int, start_ns: int = 0, period: int = 1) -> tuple[r.Sample, ...]:
    """One batch after the other; ``period`` leaves room for others that take turns."""
    made, at = [], start_ns
    for index, seconds in enumerate(times):
        unet = 0.8 * seconds
        parts = {
            "text_encoder": 0.05 * seconds,
            "unet": unet,
            "vae_decoder": 0.1 * seconds,
            "sampler": 0.04 * seconds,
        }
        made.append(r.Sample(index, index % len(PROMPTS), at, seconds, parts, (unet / 4,) * 4))
        at += int(seconds * 1e9) * period + 1000
    return tuple(made)


def build(
    times: Sequence[float] = (),
    *,
    folder: Path | None = None,
    label: str = "openvino fp32",
    run: str = "20260101T000000Z-aaaaaaaa",
    name: str = "openvino",
    floor: float | None = None,
    levels: int = 3,
    timed: tuple[r.Sample, ...] | None = None,
    load: r.WorkloadFacts | None = None,
    **changes: Any,
) -> r.Record:
    load = load or workload()
    asked = r.Requested("kiln", name, precision="fp32")
    timed = samples(times or lognormal(1.0, 0.02, 12, 1), load.batch) if timed is None else timed
    key = configuration_key(load, asked)
    effective = r.Effective(
        name, "1.0", "CPUExecutionProvider" if name == "onnxruntime" else "CPU", "cpu", "fp32", 2
    )
    images, wanted, gates = pictures(folder, load, levels) if folder else ((), (), ())
    gates = gates or (r.Gate("component", "unet", "relative_l2", 1e-5, 1e-4, True, True),)
    made = r.Record(
        id=f"{run}-{key}",
        run=run,
        key=key,
        label=label,
        created=f"{run[:4]}-{run[4:6]}-{run[6:8]}T{run[9:11]}:{run[11:13]}:{run[13:15]}Z",
        tool=r.Tool("0.1.0", "0123456789ab"),
        workload=load,
        requested=asked,
        effective={"unet": effective, "vae_decoder": effective},
        environment={
            "cpu": "Test CPU",
            "threads": 2,
            "cores": 2,
            "memory_bytes": 1 << 34,
            "system": "Linux 6",
            "python": "3.11.7",
            "packages": {"numpy": "2.4.6", "openvino": "2026.4.1"},
            "gpus": [],
        },
        phases=r.Phases(1.0, None, 0.1, 2.5, 0.6, 1.4, {"unet": {"compile_cold": 2.0, "load_cached": 0.4}}),
        warmups=samples([1.4, 1.1], load.batch),
        samples=timed,
        stats=derive(timed, load.batch),
        memory=r.Memory(rss=r.Bytes(1 << 30, "VmHWM")),
        energy=r.Energy(),
        noise=r.NoiseReport(floor=floor),
        parity=r.Parity({"requested": {"name": "torch"}}, gates, {"cosine": (1.0, 0.999)}, wanted),
        images=images,
        verdict="valid",
        command=("kiln", "bench", "run", "quick", "--backend", name),
    )
    return replace(made, **changes)


def pictures(
    folder: Path, load: r.WorkloadFacts, levels: int
) -> tuple[tuple[r.ImageFacts, ...], tuple[r.ImageFacts, ...], tuple[r.Gate, ...]]:
    """Pictures in a results folder, the reference's, and gates for the worst; ``levels`` of noise."""
    rng = np.random.default_rng(0)
    wanted = rng.integers(60, 190, (len(load.prompts), load.batch, SIZE, SIZE, 3)).astype(np.uint8)
    made = (wanted + rng.integers(-levels, levels + 1, wanted.shape)).astype(np.uint8)
    rows = [
        {"psnr_db": min(150.0, psnr_db(a, b)), "ssim": ssim(a, b)}
        for a, b in zip(made.reshape(-1, SIZE, SIZE, 3), wanted.reshape(-1, SIZE, SIZE, 3), strict=True)
    ]
    images = keep_images(folder, list(made), load.seed)
    images = tuple(replace(image, metrics=row) for image, row in zip(images, rows, strict=True))
    worst = int(np.argmin([row["psnr_db"] for row in rows]))
    gate = r.Gate("image", f"image {worst + 1}", "psnr_db", rows[worst]["psnr_db"], 30.0, False, True)
    return images, keep_images(folder, list(wanted), load.seed), (gate,)


@pytest.fixture
def make_record() -> Callable[..., r.Record]:
    """``build`` above."""
    return build


@pytest.fixture
def make_workload() -> Callable[..., r.WorkloadFacts]:
    """``workload`` above."""
    return workload


@pytest.fixture
def make_samples() -> Callable[..., tuple[r.Sample, ...]]:
    """``samples`` above."""
    return samples


@pytest.fixture
def times() -> Callable[..., list[float]]:
    """``lognormal`` above."""
    return lognormal


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with two configurations of one run, and their pictures."""
    folder = tmp_path / "results"
    append_record(folder, build(folder=folder))
    slow = lognormal(1.3, 0.02, 12, 2)
    append_record(folder, build(slow, folder=folder, name="onnxruntime", label="onnxruntime fp32", levels=2))
    return folder
