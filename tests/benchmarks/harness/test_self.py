"""The harness on scripted workers: what goes in has to come out, and what is planted be found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Scripted = Callable[..., dict[str, Any]]
GIB = 1 << 30


def jittered(median: float, count: int, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(v) for v in median * np.exp(rng.normal(0, 0.03, count))]


def test_it_recovers_what_was_scripted(bench: Callable[..., Any], scripted: Scripted) -> None:
    # A process draws the two prompts, then warm-ups until two are within 3 %, then what is timed.
    warm, times = [5.0, 2.0, 2.0], jittered(2.0, 60)
    memory = {
        "rss": {"value": 5 * GIB, "method": "VmHWM"},
        "anonymous": {"value": 3 * GIB, "method": "RssAnon"},
        "file_backed": {"value": 2 * GIB, "method": "RssFile"},
    }
    made = bench({"onnxruntime": scripted(warm + times, memory=memory)}, min_batches={"cpu": 60, "gpu": 60})
    (outcome,) = made.run()
    record = outcome.record
    assert [s.seconds for s in record.warmups] == warm
    assert record.phases.first_image == 5.0
    assert [s.seconds for s in record.samples] == times
    image = record.stats.image
    assert image is not None
    assert image.median == pytest.approx(statistics.median(times), rel=0.02)
    assert image.p95 == pytest.approx(float(np.percentile(times, 95)), rel=0.02)
    for name, share in {"text_encoder": 0.05, "unet": 0.8, "sampler": 0.04, "vae_decoder": 0.1}.items():
        assert record.stats.components[name].median == pytest.approx(share * image.median, rel=0.02)
    assert record.stats.unet_step is not None
    assert record.stats.unet_step.median == pytest.approx(0.8 * image.median / 4, rel=0.02)
    assert record.stats.unattributed == pytest.approx(0.01, rel=0.02)
    assert record.memory.rss is not None
    assert record.memory.rss.value == pytest.approx(5 * GIB, rel=0.02)
    assert record.memory.anonymous is not None
    assert record.memory.anonymous.value == pytest.approx(3 * GIB, rel=0.02)
    assert record.verdict == "valid", record.reasons
    assert not outcome.failed


def test_samples_are_on_disk_when_the_run_is_over(bench: Callable[..., Any], scripted: Scripted) -> None:
    made = bench({"onnxruntime": scripted()})
    made.run()
    (line,) = (made.options.directory / "records.jsonl").read_text().splitlines()
    assert len(json.loads(line)["samples"]) == 6
    assert not (made.options.directory / "partial").exists()
    for image in json.loads(line)["images"]:
        assert (made.options.directory / image["file"]).is_file()


def test_a_planted_outlier_is_flagged_and_kept(bench: Callable[..., Any], scripted: Scripted) -> None:
    times = jittered(1.0, 30)
    times[17] = 4.0
    record = bench(
        {"onnxruntime": scripted([1.0, 1.0, *times])}, min_batches={"cpu": 30, "gpu": 30}
    ).records()
    image = record["onnxruntime"].stats.image
    assert 17 in image.outliers
    assert image.max == 4.0
    assert image.count == 30


def test_without_an_outlier_none_is_flagged(bench: Callable[..., Any], scripted: Scripted) -> None:
    times = [1.0, 1.0, *jittered(1.0, 30)]
    record = bench({"onnxruntime": scripted(times)}, min_batches={"cpu": 30, "gpu": 30}).records()
    assert record["onnxruntime"].stats.image.outliers == ()


def test_a_planted_fallback_is_invalid(bench: Callable[..., Any], scripted: Scripted) -> None:
    asked = scripted(backend="onnxruntime-cuda")
    asked["effective"]["unet"] |= {"provider": "CPUExecutionProvider"}
    record = bench({"onnxruntime-cuda": asked}).records()["onnxruntime-cuda"]
    assert record.verdict == "invalid"
    expected = "unet: the provider CUDAExecutionProvider was asked for, and CPUExecutionProvider is in force"
    assert expected in record.reasons


def test_another_precision_than_asked_for_is_invalid(bench: Callable[..., Any], scripted: Scripted) -> None:
    asked = scripted()
    asked["effective"]["unet"]["precision"] = "bf16"
    record = bench({"onnxruntime": asked}).records()["onnxruntime"]
    assert record.verdict == "invalid"
    assert "unet: the precision fp32 was asked for, and bf16 is in force" in record.reasons


def test_a_wrong_picture_is_invalid_and_shown(bench: Callable[..., Any], scripted: Scripted) -> None:
    (outcome,) = bench({"onnxruntime": scripted(wrong_picture=True)}).run()
    record = outcome.record
    assert outcome.failed
    assert record.verdict == "invalid"
    assert any(text.startswith("parity of image") for text in record.reasons)
    assert len(record.images) == len(record.parity.reference_images) == 2
    assert record.images[0].pixels != record.parity.reference_images[0].pixels


def test_the_right_picture_passes(bench: Callable[..., Any], scripted: Scripted) -> None:
    record = bench({"onnxruntime": scripted()}).records()["onnxruntime"]
    assert record.verdict == "valid", record.reasons
    assert record.images[0].pixels == record.parity.reference_images[0].pixels
    assert {gate.level for gate in record.parity.gates} == {"latents", "image"}


def test_a_bimodal_run_is_noisy(bench: Callable[..., Any], scripted: Scripted) -> None:
    fast, slow = jittered(1.0, 20, seed=1), jittered(1.6, 20, seed=2)
    times = [1.0, 1.0, *(t for pair in zip(fast, slow, strict=True) for t in pair)]
    record = bench({"onnxruntime": scripted(times)}, min_batches={"cpu": 40, "gpu": 40}).records()
    assert record["onnxruntime"].stats.image.modes == 2
    assert record["onnxruntime"].verdict == "noisy"
    assert any("two separate groups" in text for text in record["onnxruntime"].reasons)


def test_a_drift_is_noisy(bench: Callable[..., Any], scripted: Scripted) -> None:
    times = [1.0, 1.0, *(1.0 + 0.01 * i for i in range(30))]
    record = bench({"onnxruntime": scripted(times)}, min_batches={"cpu": 30, "gpu": 30}).records()[
        "onnxruntime"
    ]
    assert record.verdict == "noisy"
    assert any("drifted" in text for text in record.reasons)


def test_time_outside_of_all_components_is_said(bench: Callable[..., Any], scripted: Scripted) -> None:
    shares = {"text_encoder": 0.05, "unet": 0.8, "sampler": 0.04, "vae_decoder": 0.02}
    record = bench({"onnxruntime": scripted(shares=shares)}).records()["onnxruntime"]
    assert any("9.0% of the time is outside of all components" in text for text in record.remarks)
    assert (record.verdict, record.reasons) == ("valid", ())


def test_components_longer_than_the_whole_are_invalid(bench: Callable[..., Any], scripted: Scripted) -> None:
    shares = {"unet": 1.2, "vae_decoder": 0.02}
    record = bench({"onnxruntime": scripted(shares=shares)}).records()["onnxruntime"]
    assert record.verdict == "invalid"
    assert any("longer than the whole" in text for text in record.reasons)
