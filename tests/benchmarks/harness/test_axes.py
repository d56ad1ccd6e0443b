"""Workloads as data, and options as combinations."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.harness.axes import Axes, Variant, configurations, lora_variants, parse_size
from kiln.benchmarks.harness.jobs import Job, read_job
from kiln.benchmarks.harness.models import parse_adapters
from kiln.benchmarks.harness.workloads import (
    Changes,
    facts_of,
    initial_noise,
    load_workload,
    workloads,
)
from kiln.benchmarks.records.record import Requested
from kiln.bundle import Bundle, open_bundle
from kiln.errors import UsageError
from kiln.exporters.resolve import bundled_models


@pytest.fixture(scope="module")
def emoji() -> Bundle:
    return open_bundle(bundled_models()["emoji"])


def test_each_tier_has_a_workload_that_opens() -> None:
    found = workloads()
    assert {workload.tier for workload in found.values()} == {"quick", "standard", "full"}
    assert next(iter(found)) == "quick"
    for name, workload in found.items():
        assert workload.name == name
        assert workload.id == f"{name}@{workload.version}"
        assert workload.sampler == "euler"  # an ancestral sampler's noise no peer shares


@pytest.mark.parametrize("name", ["quick", "standard"])
def test_what_is_pinned_is_what_ships(name: str, emoji: Bundle) -> None:
    workload = load_workload(name)
    assert workload.model_digest == emoji.content_digest
    facts = facts_of(workload, emoji, 4)
    assert facts.latents_digest == workload.latents_digest
    assert (facts.width, facts.height, facts.cfg_scale) == (64, 64, 3.5)


def test_another_model_or_noise_than_pinned_is_refused(emoji: Bundle) -> None:
    quick = load_workload("quick")
    with pytest.raises(UsageError, match="starts from the noise aaaa"):
        facts_of(replace(quick, latents_digest="a" * 64), emoji, 4)
    with pytest.raises(UsageError, match="is about emoji bbbb"):
        facts_of(replace(quick, model_digest="b" * 64), emoji, 4)


def test_random_weights_are_known_by_their_source(emoji: Bundle) -> None:
    with pytest.raises(UsageError, match="about the random weights that it makes itself"):
        facts_of(load_workload("random"), emoji, 4)
    assert not facts_of(load_workload("quick"), emoji, 4).model.random_weights


def test_noise_is_that_of_torch_on_the_processor() -> None:
    torch = pytest.importorskip("torch")
    noise = initial_noise(1000, 3, 2, (8, 8))
    assert noise.shape == (3, 2, 4, 8, 8)
    assert noise.dtype == np.float32
    for prompt in range(3):
        for image in range(2):
            generator = torch.Generator("cpu").manual_seed(1000 + prompt + image)
            expected = torch.randn((4, 8, 8), generator=generator).numpy()
            np.testing.assert_allclose(noise[prompt, image], expected, atol=1e-6)
    wrong = torch.randn((4, 8, 8), generator=torch.Generator("cpu").manual_seed(1001)).numpy()
    assert not np.allclose(noise[0, 0], wrong, atol=1e-6)


def test_options_combine(emoji: Bundle) -> None:
    axes = Axes(
        backends=("null",),
        precisions=("auto", "fp32"),
        sizes=("64", "128x64"),
        batches=(1, 2),
        threads=(1, 2),
    )
    found = configurations(load_workload("quick"), axes, [Variant(emoji)])
    assert len(found) == len({c.key for c in found}) == 2 * 2 * 2 * 2
    last = found[-1]
    assert last.name == "null fp32 128x64 b2 t2"
    assert (last.workload.width, last.workload.height, last.workload.batch) == (128, 64, 2)
    assert last.requested == Requested("kiln", "null", "auto", "fp32", 2)


def test_one_value_is_not_in_the_label(emoji: Bundle) -> None:
    (found,) = configurations(
        load_workload("quick"), Axes(backends=("null",), batches=(2,)), [Variant(emoji)]
    )
    assert found.name == "null"


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (Axes(backends=("nothing",)), "there is no backend 'nothing'"),
        (Axes(precisions=("int3",)), "unknown precision 'int3'"),
        (Axes(sizes=("huge",)), "'huge' is no size; expected for example 512 or 512x768"),
        (Axes(sizes=("100x64",)), "width 100 is not a multiple of 8"),
        (Axes(backends=("null", "null")), "null is asked for twice"),
        (Axes(peers=("nobody=python",)), "unknown peer 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(axes: Axes, text: str, emoji: Bundle) -> None:
    asked = axes if axes.backends or axes.peers else replace(axes, backends=("null",))
    with pytest.raises(UsageError, match=text):
        configurations(load_workload("quick"), asked, [Variant(emoji)])


def test_sizes_and_adapters_are_parsed() -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("512x768") == (512, 768)
    assert parse_adapters("none") == ()
    assert [a.unet_strength for a in parse_adapters("emoji-flat:0.5+emoji-kiln:1")] == [0.5, 1.0]
    assert lora_variants(Axes()) == ("none",)


def test_a_workload_may_be_a_file(tmp_path: Path, emoji: Bundle) -> None:
    shipped = json.loads(
        Path(bundled_models()["emoji"], "../../benchmarks/data/workloads/quick.json").read_text()
    )
    own = tmp_path / "own.json"
    own.write_text(json.dumps(shipped | {"name": "own", "latents_digest": None, "prompts": ["owl"]}))
    assert facts_of(load_workload(str(own)), emoji, 4).id == "own@1"
    own.write_text(json.dumps(shipped | {"colour": "red"}))
    with pytest.raises(UsageError, match="says colour; known are"):
        load_workload(str(own))
    own.write_text(json.dumps({"name": "own"}))
    with pytest.raises(UsageError, match="lacks a value"):
        load_workload(str(own))
    own.write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        load_workload(str(own))
    with pytest.raises(UsageError, match="there is no workload 'nope'; expected quick"):
        load_workload("nope")


def test_a_job_comes_back_as_it_was(tmp_path: Path, emoji: Bundle) -> None:
    facts = facts_of(load_workload("quick"), emoji, 4, Changes(steps=3))
    job = Job(
        emoji.path,
        None,
        facts,
        Requested("kiln", "null", options={"a": 1}),
        None,
        tmp_path,
        tmp_path / "n.npy",
    )
    assert read_job(job.write(tmp_path / "job.json")) == job


def test_the_key_changes_with_anything_that_is_asked(emoji: Bundle) -> None:
    quick = load_workload("quick")
    found = [
        configurations(quick, Axes(backends=("null",)), [Variant(emoji)])[0].key,
        configurations(quick, Axes(backends=("null",), steps=(9,)), [Variant(emoji)])[0].key,
        configurations(quick, Axes(backends=("null",), threads=(1,)), [Variant(emoji)])[0].key,
    ]
    assert len(set(found)) == 3
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in found)
    assert hashlib.sha256(b"").hexdigest()[:16] not in found
