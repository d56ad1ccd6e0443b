"""Records as a run would leave them, with pictures: eight prompts, six configurations, what goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from kiln.benchmarks.records.record import (
    AdapterFacts,
    Bytes,
    Effective,
    Energy,
    Gate,
    ImageFacts,
    Memory,
    ModelFacts,
    NoiseReport,
    Parity,
    Phases,
    Record,
    Requested,
    Sample,
    Tool,
    WorkloadFacts,
)
from kiln.benchmarks.records.stats import derive
from kiln.metrics import psnr_db, ssim

PROMPTS = (
    "a lighthouse on a cliff at dusk, long exposure, rolling fog over the sea",
    "portrait of an old clockmaker, workshop, soft window light, 85mm",
    "isometric cutaway of a tiny bakery, papercraft",
    "macro photograph of a beetle on wet moss",
    "red apple",
    "a city tram in the rain at night, reflections",
    "children's book illustration of a fox reading by lamplight",
    "an astronaut repairing a radio telescope in the Atacama desert, wide shot, volumetric dust, golden hour",
)
MB = 1_000_000
ENVIRONMENT = {
    "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
    "cores": 1,
    "threads": 2,
    "memory_bytes": 25_200_000_000,
    "system": "Linux 6.1.0",
    "python": "3.11.9",
    "packages": {"numpy": "2.4.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1", "torch": "2.13.0"},
    "flags": ["avx2", "avx512f", "amx_bf16", "amx_int8"],
    "governor": None,
    "turbo": None,
    "virtual": True,
    "container": False,
    "gpus": [],
    "variables": {"OMP_NUM_THREADS": "2"},
}


@dataclass(frozen=True)
class Kind:
    """What a made-up configuration is like."""

    name: str
    precision: str
    seconds: float
    error: float
    kind: str = "kiln"
    bimodal: bool = False
    wrong: bool = False
    components: bool = True
    pictures: bool = True
    energy: bool = False


SIX = (
    Kind("openvino", "bf16", 41.2, 1.1),
    Kind("openvino", "fp32", 96.0, 0.02),
    Kind("onnxruntime", "fp32", 133.0, 0.02, bimodal=True),
    Kind("torch", "bf16", 58.4, 1.4, wrong=True),
    Kind("diffusers", "bf16", 55.1, 1.2, kind="peer"),
    Kind("stable-diffusion.cpp", "fp16", 940.0, 9.0, kind="peer", components=False, pictures=False),
)


class Results:
    """A results folder in the making."""

    def __init__(self, folder: Path, side: int, prompts: tuple[str, ...] = PROMPTS) -> None:
        self.folder, self.side, self.prompts = folder, side, prompts
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.references = [scene(i, side) for i in range(len(prompts))]
        self.reference_facts = tuple(
            self.keep(i, 1000 + i, image, {}) for i, image in enumerate(self.references)
        )

    def keep(self, prompt: int, seed: int, image: np.ndarray, metrics: dict[str, float]) -> ImageFacts:
        """Write one picture."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        file = f"images/{digest[:16]}.png"
        (self.folder / file).write_bytes(buffer.getvalue())
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        return ImageFacts(prompt, seed, file, digest, pixels, metrics)

    def workload(self, **changes: Any) -> WorkloadFacts:
        """SD1.5 at this side, 20 steps."""
        model = ModelFacts("dreamlike", "sd1", "ab" * 32, {"unet": "cd" * 32}, {"unet": "fp16"})
        load = WorkloadFacts(
            id="full@1",
            tier="full",
            model=model,
            prompts=self.prompts,
            negative_prompt="blurry, watermark",
            prompts_digest="12" * 32,
            latents_digest="34" * 32,
            seed=1000,
            sampler="euler",
            schedule="karras",
            steps=20,
            cfg_scale=7.0,
            width=self.side,
            height=self.side,
            batch=1,
            adapters=(AdapterFacts("watercolour", "56" * 32, 0.8, 0.6),),
        )
        return replace(load, **changes)

    def record(self, kind: Kind, number: int, *, count: int = 12, **changes: Any) -> Record:
        """What measuring this configuration would leave."""
        rng = np.random.default_rng(number)
        load = changes.pop("workload", self.workload())
        times = kind.seconds * (1 + 0.012 * rng.standard_normal(count))
        if kind.bimodal:
            times[rng.permutation(count)[: count * 2 // 5]] *= 1.22
        samples = tuple(
            make_sample(i + 3, t, kind, load.steps, len(self.prompts), rng) for i, t in enumerate(times)
        )
        warm = [kind.seconds * 1.9, kind.seconds * 1.05, kind.seconds * 1.01]
        warmups = tuple(
            make_sample(i, t, kind, load.steps, len(self.prompts), rng) for i, t in enumerate(warm)
        )
        images = self.draw(kind, rng) if kind.pictures is not None else ()
        gates = make_gates(kind, images)
        failed = [g for g in gates if not g.passed]
        reasons = tuple(f"parity of {g.where}: {g.metric} {g.value:.4g}, limit {g.limit:g}" for g in failed)
        noise = NoiseReport(
            facts={"load": {"before": 0.1, "after": 2.0}, "mhz": {"before": 2700.0, "after": 2700.0}}
        )
        if kind.bimodal:
            text = "the times fall into two separate groups; the median lies in one of them"
            noise, reasons = replace(noise, verdict="noisy", reasons=(text,)), (*reasons, text)
        verdict = "invalid" if failed else "noisy" if kind.bimodal else "valid"
        record = Record(
            id=f"20261121T100000Z-0001-{number}",
            run="20261121T100000Z-0001",
            key=hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:16],
            label=f"{kind.name} {kind.precision}",
            created="2026-11-21T10:00:00Z",
            tool=Tool("0.5.0", "0123abcd+"),
            workload=load,
            requested=Requested(kind.kind, kind.name, "cpu", kind.precision, 2),
            effective=effective(kind),
            environment=ENVIRONMENT,
            phases=phases(kind),
            warmups=warmups,
            samples=samples,
            stats=derive(samples, load.batch),
            memory=memory(kind),
            energy=Energy("rapl", 812.0 + number, 21.5, 690.0) if kind.energy else Energy(),
            noise=replace(noise, floor=0.011),
            parity=parity(kind, gates, load.steps, self.reference_facts, rng),
            images=images,
            verdict=verdict,
            reasons=reasons,
            command=("kiln", "bench", "run", "full", "-m", "model.safetensors", "--backend", "all"),
        )
        return replace(record, **changes)

    def draw(self, kind: Kind, rng: np.random.Generator) -> tuple[ImageFacts, ...]:
        """The reference's pictures with the error of this configuration; one is wrong, or all are its own."""
        found = []
        for i, reference in enumerate(self.references):
            image = np.clip(reference + rng.normal(0, kind.error, reference.shape), 0, 255).astype(np.uint8)
            if kind.wrong and i == 2:
                image = scene(99, self.side)
            part, whole = image[:96, :96], reference[:96, :96]
            metrics = {"psnr_db": min(psnr_db(part, whole), 150.0), "ssim": ssim(part, whole)}
            if not kind.pictures:
                image, metrics = scene(i + 40, self.side), {}
            found.append(self.keep(i, 1000 + i, image, metrics))
        return tuple(found)


def scene(number: int, side: int) -> np.ndarray:
    """A picture with gradients, edges and grain, uint8 ``(side, side, 3)``."""
    rng = np.random.default_rng(1000 + number)
    y, x = np.mgrid[0:side, 0:side] / side
    a, b = rng.uniform(20, 235, (2, 3))
    image = a * (1 - y[..., None]) + b * y[..., None] + 20 * np.sin(9 * x + number)[..., None]
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        cx, cy, r = *rng.uniform(0, side, 2).tolist(), float(rng.uniform(0.03, 0.22)) * side
        colour = tuple(int(c) for c in rng.uniform(0, 255, 3))
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(side / 170)), np.float64)
    return np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)


def make_sample(
    index: int, seconds: float, kind: Kind, steps: int, prompts: int, rng: np.random.Generator
) -> Sample:
    """A batch whose UNet takes most of the time."""
    unet = 0.94 * seconds / steps * (1 + 0.015 * rng.standard_normal(steps))
    parts = {
        "text_encoder": 0.006 * seconds,
        "unet": float(unet.sum()),
        "sampler": 0.002 * seconds,
        "vae_decoder": 0.035 * seconds,
    }
    return Sample(
        index=index,
        prompt=index % prompts,
        started_ns=int(1e9 * (100 + index * kind.seconds * 5.2)),
        seconds=float(max(seconds, sum(parts.values()))),
        components=parts if kind.components else {},
        unet_steps=tuple(float(t) for t in unet) if kind.components else (),
    )


def effective(kind: Kind) -> dict[str, Effective]:
    """What the components of a configuration report."""
    return {
        name: Effective(kind.name, "2026.4.1", "CPU", "cpu", kind.precision, 2, True, {"streams": 1})
        for name in (("text_encoder", "unet", "vae_decoder") if kind.components else ("unet",))
    }


def phases(kind: Kind) -> Phases:
    """Once each; only a peer converts, and the one without components has no cache."""
    if not kind.components:
        return Phases(0.9, None, 0.0, 21.0, None, kind.seconds)
    parts = {"unet": {"compile_cold": 9.1, "load_cached": 1.2}, "vae_decoder": {"compile_cold": 1.4}}
    convert = 88.9 if kind.kind == "peer" else None
    return Phases(0.62, convert, 0.21, 12.4, 2.3, kind.seconds * 1.3, parts)


def memory(kind: Kind) -> Memory:
    """Of this process, and nothing on a device."""
    return Memory(
        rss=Bytes(int(3100 * MB + kind.seconds * MB), "VmHWM"),
        anonymous=Bytes(1400 * MB, "RssAnon, highest seen"),
        file_backed=Bytes(1720 * MB, "RssFile, highest seen") if kind.components else None,
    )


def make_gates(kind: Kind, images: tuple[ImageFacts, ...]) -> tuple[Gate, ...]:
    """Component, latents and image level, with what the pictures really are."""
    if not kind.pictures:
        return ()
    level = kind.error / 60
    found = [
        Gate("component", "unet", "relative_l2", level, 0.03, True, level <= 0.03),
        Gate("component", "unet", "cosine", 1 - level**2 / 2, 0.999, False, True),
        Gate("latents", "last step", "relative_l2", 2 * level, 0.1, True, 2 * level <= 0.1),
        Gate("latents", "last step", "cosine", 1 - level**2, 0.995, False, True),
        Gate("latents", "all steps", "max_abs", 11 * level, None, True, True),
    ]
    for metric, limit in (("psnr_db", 35.0), ("ssim", 0.9)):
        values = [facts.metrics[metric] for facts in images]
        worst = int(np.argmin(values))
        held = values[worst] >= limit
        found.append(Gate("image", f"image {worst + 1}", metric, values[worst], limit, False, held))
    return tuple(found)


def parity(
    kind: Kind,
    gates: tuple[Gate, ...],
    steps: int,
    references: tuple[ImageFacts, ...],
    rng: np.random.Generator,
) -> Parity:
    """With curves that grow, for those that were compared."""
    if not gates:
        return Parity()
    growth = np.linspace(0.15, 1, steps) * np.exp(0.05 * rng.standard_normal(steps)) * 2 * kind.error / 60
    curves = {"relative_l2": tuple(growth.tolist()), "cosine": tuple((1 - growth**2 / 2).tolist())}
    reference = {"requested": {"kind": "kiln", "name": "torch", "precision": "fp32"}, "bundle": "dreamlike"}
    return Parity(reference, gates, curves, references)


@dataclass(frozen=True)
class Made:
    """Records and the folder of their pictures."""

    records: tuple[Record, ...]
    folder: Path
    results: Results


@pytest.fixture(scope="session")
def make_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Results folders of any size of picture."""

    def make(side: int = 96, prompts: tuple[str, ...] = PROMPTS) -> Results:
        return Results(tmp_path_factory.mktemp("results"), side, prompts)

    return make


@pytest.fixture(scope="session")
def kinds() -> tuple[Kind, ...]:
    """What the six configurations are like."""
    return SIX


@pytest.fixture(scope="session")
def six(make_results: Callable[..., Results]) -> Made:
    """The grid of eight by six, and a model of random weights beside it."""
    results = make_results()
    records = [results.record(kind, number) for number, kind in enumerate(SIX)]
    records.append(random_weights(results))
    return Made(tuple(records), results.folder, results)


def random_weights(results: Results) -> Record:
    """Speed only: pictures that show nothing, latents that were compared."""
    load = results.workload()
    load = replace(load, model=replace(load.model, name="sd15-random", random_weights=True), steps=4)
    record = results.record(Kind("openvino", "bf16", 8.4, 1.0), 50, workload=load)
    images = tuple(replace(facts, metrics={}) for facts in record.images)
    gates = tuple(g for g in record.parity.gates if g.level != "image")
    why = ("pictures not judged: the weights are random",)
    return dataclasses.replace(
        record, images=images, parity=replace(record.parity, gates=gates), verdict="valid", reasons=why
    )
