"""Faster, slower or not significant: by simulation, with times as machines have them; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kiln.benchmarks.harness.noise import aa_floor
from kiln.benchmarks.records.compare import DEFAULT_FLOOR, Comparison, compare
from kiln.benchmarks.records.record import AdapterFacts, Effective, NoiseReport, Record, WorkloadFacts

Make = Callable[..., Record]
Times = Callable[..., list[float]]
TRIALS = 400
# 19 of 20, with seeds: the same trials in each run.
ENOUGH = 0.95 * TRIALS
GRID = [(10, 0.01), (10, 0.03), (20, 0.02), (30, 0.03)]


def trials(
    make: Make, times: Times, count: int, sigma: float, slower: float, floor: float | None
) -> Iterator[Comparison]:
    one, other = make(), make(run="20260102T000000Z-bbbbbbbb")
    for seed in range(TRIALS):
        a = times(1.0, sigma, count, 2 * seed)
        b = times(1.0 + slower, sigma, count, 2 * seed + 1)
        noise = NoiseReport(floor=floor)
        yield compare(timed(one, a, noise), timed(other, b, noise))


def timed(record: Record, seconds: list[float], noise: NoiseReport) -> Record:
    """The record with other times; the rest is as it was, ``stats`` too, which ``compare`` does not read."""
    rows = tuple(replace(record.samples[0], index=i, seconds=s) for i, s in enumerate(seconds))
    return replace(record, samples=rows, noise=noise)


@pytest.mark.parametrize("floor", [None, 0.0], ids=["floor of 5 %", "no floor"])
@pytest.mark.parametrize(("count", "sigma"), GRID)
def test_the_same_is_not_significant(
    make_record: Make, times: Times, count: int, sigma: float, floor: float | None
) -> None:
    found = [one.answer for one in trials(make_record, times, count, sigma, 0.0, floor)]
    assert found.count("not significant") >= ENOUGH
    assert set(found) <= {"not significant", "slower", "faster"}


@pytest.mark.parametrize(("count", "sigma"), GRID[1:])
def test_both_hold_with_the_floor_of_an_a_a_pair(
    make_record: Make, times: Times, count: int, sigma: float
) -> None:
    """Each trial's floor is measured by a pair of its own, lucky ones among them."""
    one, other = make_record(), make_record(run="20260102T000000Z-bbbbbbbb")
    same, slower = [], []
    for seed in range(TRIALS):
        a, b, first, second = (times(1.0, sigma, count, 4 * seed + i) for i in range(4))
        floor = aa_floor(timed(one, first, NoiseReport()).samples, timed(one, second, NoiseReport()).samples)
        noise = NoiseReport(floor=floor)
        same.append(compare(timed(one, a, noise), timed(other, b, noise)).answer)
        late = [1.1 * seconds for seconds in b]
        slower.append(compare(timed(one, a, noise), timed(other, late, noise)).answer)
    assert same.count("not significant") >= ENOUGH
    assert slower.count("slower") >= ENOUGH


@pytest.mark.parametrize(("count", "sigma"), GRID)
def test_a_slowdown_of_10_percent_is_found(make_record: Make, times: Times, count: int, sigma: float) -> None:
    found = list(trials(make_record, times, count, sigma, 0.1, None))
    assert sum(one.answer == "slower" for one in found) >= ENOUGH
    covered = sum(one.interval[0] <= 1.1 <= one.interval[1] for one in found if one.interval)
    assert covered >= 0.9 * TRIALS


def test_it_is_found_the_other_way_round(make_record: Make, times: Times) -> None:
    slow, fast = times(1.1, 0.02, 20, 1), times(1.0, 0.02, 20, 2)
    one, other = make_record(slow), make_record(fast, run="20260102T000000Z-bbbbbbbb")
    assert compare(one, other).answer == "faster"
    assert compare(other, one).answer == "slower"


@pytest.mark.parametrize(("floor", "answer"), [(0.01, "slower"), (0.08, "not significant")])
def test_an_effect_has_to_exceed_the_noise_floor(
    make_record: Make, times: Times, floor: float, answer: str
) -> None:
    one = make_record(times(1.0, 0.01, 30, 1), floor=0.001)
    other = make_record(times(1.05, 0.01, 30, 2), floor=floor, run="20260102T000000Z-bbbbbbbb")
    found = compare(one, other)
    assert (found.answer, found.floor, found.floor_measured) == (answer, floor, True)


def test_without_a_measured_floor_there_is_the_default(make_record: Make, times: Times) -> None:
    one = make_record(times(1.0, 0.005, 30, 1))
    other = make_record(times(1.03, 0.005, 30, 2), run="20260102T000000Z-bbbbbbbb")
    found = compare(one, other)
    assert (found.answer, found.floor, found.floor_measured) == ("not significant", DEFAULT_FLOOR, False)
    assert found.interval is not None
    assert found.interval[0] > 1


def turns(
    make: Make, samples: Any, times: Times, seed: int, slower: float, drift: float
) -> tuple[Record, Record]:
    """Two configurations that took turns on a machine that became slower all the while."""
    count = 16
    rising = np.linspace(1.0, 1.0 + drift, count)
    a = [float(v) for v in rising * times(1.0, 0.004, count, 2 * seed)]
    b = [float(v) for v in rising * times(1.0 + slower, 0.004, count, 2 * seed + 1)]
    # One after the other in each round: both starts before the next round's.
    starts = np.concatenate([[0], np.cumsum([int((x + y) * 1e9) + 10 for x, y in zip(a, b, strict=True)])])
    first, second = samples(a, 1), samples(b, 1)
    first = tuple(replace(s, started_ns=int(t)) for s, t in zip(first, starts, strict=False))
    second = tuple(
        replace(s, started_ns=int(t + x * 1e9) + 5) for s, t, x in zip(second, starts, a, strict=False)
    )
    return (
        make(timed=first, floor=0.01),
        make(timed=second, floor=0.01, name="onnxruntime", label="onnxruntime fp32"),
    )


def test_what_took_turns_is_compared_round_by_round(
    make_record: Make, make_samples: Any, times: Times
) -> None:
    found, alone = [], []
    for seed in range(60):
        one, other = turns(make_record, make_samples, times, seed, 0.03, 0.3)
        found.append(compare(one, other))
        alone.append(compare(replace(one, run="20260102T000000Z-bbbbbbbb"), other))
    assert all(one.paired for one in found)
    assert not any(one.paired for one in alone)
    assert sum(one.answer == "slower" for one in found) >= 57
    # The drift hides 3 % where the samples are two heaps.
    assert sum(one.answer == "slower" for one in alone) <= 3


def test_what_took_turns_and_is_the_same_is_not_significant(
    make_record: Make, make_samples: Any, times: Times
) -> None:
    found = []
    for seed in range(100):
        one, other = turns(make_record, make_samples, times, seed, 0.0, 0.3)
        found.append(compare(*(replace(r, noise=NoiseReport(floor=0.0)) for r in (one, other))).answer)
    assert found.count("not significant") >= 95


def test_one_after_the_other_is_not_taking_turns(make_record: Make, make_samples: Any, times: Times) -> None:
    one = make_record(timed=make_samples(times(1.0, 0.01, 12, 1), 1))
    later = make_samples(times(1.0, 0.01, 12, 2), 1, start_ns=int(60e9))
    other = make_record(timed=later, name="onnxruntime", label="onnxruntime fp32")
    assert not compare(one, other).paired


def changed_workload(load: WorkloadFacts) -> list[tuple[str, WorkloadFacts]]:
    return [
        ("steps: 4 and 5", replace(load, steps=5)),
        ("width: 16 and 24", replace(load, width=24)),
        ("cfg_scale: 7.0 and 3.0", replace(load, cfg_scale=3.0)),
        ("sampler: euler and ddim", replace(load, sampler="ddim")),
        ("seed: 5 and 6", replace(load, seed=6)),
        ("model.digest", replace(load, model=replace(load.model, digest="f" * 64))),
        (
            "model.storage.unet: fp16 and int8",
            replace(load, model=replace(load.model, storage={"unet": "int8"})),
        ),
        ("adapters[0].unet_strength", replace(load, adapters=(AdapterFacts("a", "a" * 64, 0.5, 0.5),))),
        ("prompts_digest", replace(load, prompts_digest="0" * 64)),
        ("negative_prompt: nothing and blurry", replace(load, negative_prompt="blurry")),
    ]


@pytest.mark.parametrize("index", range(10))
def test_other_work_is_refused_and_named(make_record: Make, make_workload: Any, index: int) -> None:
    text, load = changed_workload(make_workload())[index]
    found = compare(make_record(), make_record(load=load, run="20260102T000000Z-bbbbbbbb"))
    assert found.answer == "refused"
    assert found.ratio is None
    assert any(reason.startswith(text) for reason in found.reasons), found.reasons


def test_names_of_the_same_work_may_differ(make_record: Make, make_workload: Any) -> None:
    load = make_workload()
    load = replace(load, id="other@2", tier="full", model=replace(load.model, name="mine"))
    assert compare(make_record(), make_record(load=load, run="x")).answer == "not significant"


def test_models_may_be_what_is_compared(make_record: Make, make_workload: Any) -> None:
    load = make_workload()
    small = replace(load, model=replace(load.model, digest="f" * 64, storage={"unet": "int8"}))
    one, other = make_record(), make_record(load=small, run="x")
    assert compare(one, other).answer == "refused"
    assert compare(one, other, across_models=True).answer == "not significant"
    assert compare(one, make_record(load=replace(small, steps=9), run="x"), across_models=True).reasons == (
        "steps: 4 and 9",
    )


def test_invalid_records_and_few_samples_are_refused(make_record: Make) -> None:
    bad = make_record(verdict="invalid", reasons=("a gate failed",), run="x")
    assert compare(make_record(), bad).reasons == ("the candidate is invalid: a gate failed",)
    few = make_record([1.0, 1.1, 1.2], run="x")
    assert compare(few, make_record()).reasons == ("the baseline has 3 samples; expected 4 at least",)


def test_noise_and_other_surroundings_are_said(make_record: Make) -> None:
    noisy = NoiseReport("noisy", ("others took 9 %",))
    other = make_record(run="x", name="onnxruntime", noise=noisy, verdict="noisy", label="b")
    other = replace(other, noise=noisy, environment={**other.environment, "packages": {"numpy": "9"}})
    found = compare(make_record(), other)
    assert found.notes == ("the candidate is noisy: others took 9 %",)
    assert "requested name: openvino and onnxruntime" in found.differences
    assert "unet provider: CPU and CPUExecutionProvider" in found.differences
    assert "package numpy: 2.4.6 and 9" in found.differences


def test_two_machines_are_said_or_refused(make_record: Make) -> None:
    one = make_record()
    other = replace(
        make_record(run="x"), environment={**one.environment, "cpu": "Other", "gpus": [{"name": "G"}]}
    )
    found = compare(one, other)
    assert found.answer == "not significant"
    assert found.differences[:2] == ("cpu: Test CPU and Other", 'gpus: [] and ["G"]')
    found = compare(one, other, same_machine=True)
    assert found.reasons == (
        "another machine: cpu: Test CPU and Other",
        'another machine: gpus: [] and ["G"]',
    )


def test_settings_in_force_are_no_fixed_facts(make_record: Make) -> None:
    other = make_record(run="x", effective={"unet": Effective("openvino", "1.0", "CPU", "cpu", "bf16", 2)})
    found = compare(make_record(), other)
    assert found.answer == "not significant"
    assert "unet precision: fp32 and bf16" in found.differences


@pytest.mark.parametrize(("slower", "fails"), [(1.1, True), (1.04, False), (0.8, False)])
def test_slower_than_a_limit(make_record: Make, times: Times, slower: float, fails: bool) -> None:
    one = make_record(times(1.0, 0.005, 30, 1), floor=0.01)
    other = make_record(times(slower, 0.005, 30, 2), floor=0.01, run="x")
    assert compare(one, other).slower_than(0.05) is fails
