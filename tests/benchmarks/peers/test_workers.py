"""Each project draws what Kiln draws, from the same weights, prompt and noise, and says what it used.

diffusers and optimum-onnx are in the test environment. The others need a Python of their own, which
``KILN_PEER_OPTIMUM_INTEL=PYTHON`` and the like name; without it they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import venv
from pathlib import Path

import numpy as np
import pytest

from kiln.api import ImageReady, Pipeline, Request, Settings, StepFinished
from kiln.benchmarks.parity import THRESHOLDS, psnr_db, relative_l2
from kiln.benchmarks.peers.folder import write_folder
from kiln.benchmarks.peers.registry import PROJECTS, check_peer, find_peer
from kiln.bundle import open_bundle
from kiln.errors import UsageError
from kiln.runtime.noise import make_generators

HERE = ("diffusers", "optimum-onnx")
SIDE, STEPS, SEED = 128, 4, 7
PROMPT, NEGATIVE = "a red house by the sea", "rain"


class Worker:
    """The other end of the wire."""

    def __init__(self, peer, job):
        env = peer.environment | {"KILN_BENCH_STARTED_NS": str(time.monotonic_ns())}
        self.process = subprocess.Popen(
            peer.command(job), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = json.loads(self.process.stdout.readline())

    def ask(self, do, **arguments):
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(300)
        finally:
            self.process.kill()
            self.process.stdout.close()


def peer_named(name):
    python = os.environ.get("KILN_PEER_" + name.upper().replace("-", "_").replace(".", "_"))
    if name == "stable-diffusion.cpp":
        pytest.skip("stable-diffusion.cpp knows the sizes of the real SD1 only, not those of the tiny one")
    if python is None and name not in HERE:
        pytest.skip(f"{name} needs a Python of its own; none is named")
    return find_peer(name, python)


def write_job(folder, bundle, peer, **changes):
    noise = np.stack([g.randn((4, SIDE // 8, SIDE // 8)) for g in make_generators("cpu", SEED, 1)])
    np.save(folder / "noise.npy", np.stack([noise, -noise]))
    workload = {
        "prompts": [PROMPT, PROMPT],
        "negative_prompt": NEGATIVE,
        "sampler": "euler",
        "schedule": "normal",
    }
    workload |= {"steps": STEPS, "cfg_scale": 4.0, "width": SIDE, "height": SIDE, "batch": 1, "seed": SEED}
    requested = {"name": peer.name, "device": "auto", "precision": "fp32", "threads": 1}
    job = {
        "bundle": str(bundle),
        "model": str(write_folder(open_bundle(bundle), folder / "model")),
        "workload": workload | changes.get("workload", {}),
        "requested": requested | {"options": dict(peer.project.options)} | changes.get("requested", {}),
        "cache": changes.get("cache"),
        "scratch": str(folder),
        "noise": str(folder / "noise.npy"),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


@pytest.fixture(scope="module")
def own(tiny_bundle):
    """Kiln's latents after each step, and its image."""
    with Pipeline.open(tiny_bundle, Settings("openvino", "fp32")) as pipeline:
        events = list(
            pipeline.generate(Request(PROMPT, NEGATIVE, SIDE, SIDE, steps=STEPS, cfg_scale=4.0, seed=SEED))
        )
    latents = [event.latents for event in events if isinstance(event, StepFinished)]
    return np.stack(latents), next(event.image for event in events if isinstance(event, ImageReady))


@pytest.mark.parametrize("name", PROJECTS)
def test_draws_what_kiln_draws(name: str, tiny_bundle: Path, own, tmp_path: Path) -> None:
    peer = peer_named(name)
    job = write_job(tmp_path, tiny_bundle, peer)
    with Worker(peer, job) as worker:
        assert worker.ready["kind"] == "ready"
        assert worker.ready["imports"] > 0
        converted = worker.ask("convert")
        assert converted["kind"] == "done", converted
        loaded = worker.ask("load")
        assert loaded["kind"] == "done", loaded
        assert set(loaded["effective"]) == {"text_encoder", "unet", "vae_decoder"}
        told = "unknown" if name == "openvino-genai" else "fp32"
        assert {facts["precision"] for facts in loaded["effective"].values()} == {told}
        ask = {"prompt": 0, "seed": SEED, "save": str(tmp_path / "image.npy")}
        if peer.gives_latents:
            ask["latents"] = str(tmp_path / "latents.npy")
        drawn = worker.ask("draw", **ask)
        assert drawn["kind"] == "done", drawn
        other = worker.ask("draw", prompt=1, seed=SEED, save=str(tmp_path / "other.npy"))
        assert other["kind"] == "done", other
        assert worker.ask("memory")["rss"]["value"] > 1e6
    assert 0 < sum(drawn["components"].values()) <= drawn["seconds"]
    assert len(drawn["unet_steps"]) == STEPS
    image = np.load(tmp_path / "image.npy")
    assert (image.shape, image.dtype) == ((1, SIDE, SIDE, 3), np.uint8)
    expected_latents, expected = own
    if peer.gives_latents:
        latents = np.load(tmp_path / "latents.npy")
        assert latents.shape == expected_latents.shape
        limit = THRESHOLDS["sampler_latents_relative_l2"]
        assert limit.holds(relative_l2(latents[-1], expected_latents[-1]))
    assert THRESHOLDS["sampler_image_psnr_db"].holds(psnr_db(image[0], expected))
    # The companion: other noise is another picture.
    assert not THRESHOLDS["sampler_image_psnr_db"].holds(
        psnr_db(np.load(tmp_path / "other.npy")[0], expected)
    )


@pytest.mark.parametrize("name", ["diffusers", "diffusers-compile"])
def test_diffusers_in_bf16(name: str, tiny_bundle: Path, own, tmp_path: Path) -> None:
    peer = peer_named(name)
    cache = tmp_path / "cache"
    job = write_job(tmp_path, tiny_bundle, peer, requested={"precision": "bf16"}, cache=str(cache))
    with Worker(peer, job) as worker:
        loaded = worker.ask("load")
        assert loaded["kind"] == "done", loaded
        assert {facts["precision"] for facts in loaded["effective"].values()} == {"bf16"}
        drawn = worker.ask("draw", prompt=0, seed=SEED, latents=str(tmp_path / "latents.npy"))
        assert drawn["kind"] == "done", drawn
    assert cache.exists() == bool(peer.project.options.get("compile"))  # what is compiled lies there
    near = relative_l2(np.load(tmp_path / "latents.npy")[0], own[0][0])  # after one step
    assert near > 0
    assert THRESHOLDS["component_bf16_relative_l2"].holds(near)


def test_refuses_what_it_cannot_share(tiny_bundle: Path, tmp_path: Path) -> None:
    peer = find_peer("diffusers")
    job = write_job(tmp_path, tiny_bundle, peer, workload={"sampler": "ddim"})
    with Worker(peer, job) as worker:
        answer = worker.ask("load")
        assert (answer["kind"], answer["type"]) == ("error", "ValueError")
        assert answer["text"] == "peers are compared with the sampler euler, not with ddim normal"
        assert worker.ask("memory")["kind"] == "done"  # it lives on


def test_a_python_without_the_project_is_refused_before_anything_runs(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    for name, project in PROJECTS.items():
        peer = find_peer(name, str(tmp_path / "bare/bin/python"))
        with pytest.raises(UsageError) as error:
            check_peer(peer)
        assert f"lacks {', '.join(project.modules)}; " in str(error.value)
        assert str(error.value).endswith(f"expected: pip install {project.install}")


def test_a_program_that_is_no_python_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^--peer diffusers: .*false does not run as a Python; expected that of"
    ):
        check_peer(find_peer("diffusers", "false"))


def test_this_python_has_what_the_peers_here_need() -> None:
    for name in HERE:
        check_peer(find_peer(name))


def test_unknown_peer() -> None:
    with pytest.raises(UsageError, match="unknown peer 'a1111'; expected one of diffusers, "):
        find_peer("a1111")


def test_python_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"no-such-python is no program here; .* pip install optimum-intel"):
        find_peer("optimum-intel", "no-such-python")
