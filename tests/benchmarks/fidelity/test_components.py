"""Components on real engines in child processes: what passes, and one planted bad component that does not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.fidelity import Trial, component_gates, measure_components
from kiln.benchmarks.fidelity.calls import INDEX, read_calls, recorded_components
from kiln.benchmarks.fidelity.child import Child, FidelityError, child
from kiln.benchmarks.fidelity.components import _row, judge, recording
from kiln.benchmarks.fidelity.drawing import read_drawn
from kiln.benchmarks.fidelity.sampling import USUAL, Sampling
from kiln.benchmarks.harness.process import Limits
from kiln.benchmarks.records.record import Gate, Requested, WorkloadFacts
from kiln.bundle import Bundle
from kiln.errors import StorageError

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

REFERENCE = Requested("kiln", "openvino", "CPU", "fp32")
TESTED = Requested("kiln", "onnxruntime", "cpu", "fp32")
COMPONENTS = {"text_encoder", "unet", "vae_decoder"}

Change = Callable[[np.ndarray], np.ndarray]
Plant = Callable[[Path, str, str, Change], Bundle]


def failed(gates: list[Gate]) -> set[tuple[str, str]]:
    return {(gate.where, gate.metric) for gate in gates if not gate.passed}


def test_two_engines_in_fp32_are_near(emoji: Bundle, workload: WorkloadFacts, recordings: Path) -> None:
    report = measure_components(Trial(emoji, TESTED, REFERENCE, workload, recordings=recordings))
    assert not failed(list(report.gates))
    assert {gate.where for gate in report.gates} == COMPONENTS
    assert {one.provider for one in report.effective.values()} == {"CPUExecutionProvider"}
    # Two engines do not round alike: figures of exactly nothing would mean that one was compared with itself.
    assert all(0 < row.distance.relative_l2 < 1e-5 for row in report.rows)
    # Both steps of the first prompt, both prompts through the text encoder.
    assert [row.where for row in report.rows if row.component == "unet"] == [
        "prompt 1, step 1 of 2",
        "prompt 1, step 2 of 2",
    ]
    assert {row.where for row in report.rows if row.component == "text_encoder"} == {"prompt 1", "prompt 2"}


@pytest.fixture(scope="module")
def worker() -> Iterator[Child]:
    """One process for all planted bundles."""
    with child() as made:
        yield made


PLANTED = [
    ("unet", "conv_out.weight", lambda w: w * np.float32(1.01), {"relative_l2"}),
    ("unet", "conv_out.weight", lambda w: w[[1, 0, 2, 3]], {"relative_l2", "cosine"}),
    ("unet", "conv_out.bias", lambda b: b * np.float32("nan"), {"relative_l2", "cosine", "nonfinite"}),
    (
        "vae_decoder",
        "decoder.layers.0.weight",
        lambda w: w + np.random.default_rng(0).normal(0, 0.05, w.shape),
        {"relative_l2", "cosine"},
    ),
    (
        "text_encoder",
        "text_model.final_layer_norm.weight",
        lambda w: w[::-1],
        {"relative_l2", "cosine"},
    ),
]


@pytest.mark.parametrize(
    ("component", "tensor", "change", "metrics"),
    PLANTED,
    ids=["unet 1 % off", "unet channels swapped", "unet NaN", "vae noisy", "text encoder reversed"],
)
def test_one_bad_component_is_named(
    component: str,
    tensor: str,
    change: Change,
    metrics: set[str],
    workload: WorkloadFacts,
    recordings: Path,
    emoji: Bundle,
    plant: Plant,
    worker: Child,
    tmp_path: Path,
) -> None:
    """The reference's recording is that of the right bundle, and the backend runs the wrong weights."""
    bundle = plant(tmp_path / "planted", component, tensor, change)
    trial = Trial(emoji, TESTED, REFERENCE, workload, recordings=recordings)
    with recording(trial, USUAL) as folder:
        found = worker.ask(
            "replay", bundle=str(bundle.path), requested=asdict(TESTED), folder=str(folder), cache=False
        )
    gates = judge([_row(row) for row in found["rows"]], dict.fromkeys(COMPONENTS, "fp32"), emoji, None)
    assert failed(gates) == {(component, metric) for metric in metrics}


def test_another_bundle_is_reported(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path, plant: Plant, tmp_path: Path
) -> None:
    scaled = plant(tmp_path / "scaled", "unet", "conv_out.weight", lambda w: w * np.float32(1.5))
    gates = component_gates(Trial(scaled, TESTED, REFERENCE, workload, against=emoji, recordings=recordings))
    assert not failed(gates)
    figure = next(g for g in gates if (g.where, g.metric) == ("unet", "relative_l2"))
    assert figure.limit is None
    assert figure.value == pytest.approx(0.5, rel=0.2)


def test_a_recording_is_made_once_and_holds_what_was_drawn(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path
) -> None:
    trial = Trial(emoji, TESTED, REFERENCE, workload, recordings=recordings)
    with recording(trial, USUAL) as folder:
        made = (folder / INDEX).stat().st_mtime_ns
        assert set(recorded_components(folder)) == COMPONENTS
        latents, images = read_drawn(folder)
    assert latents.shape == (1, 2, 1, 4, 16, 16)
    assert (images.shape, images.dtype) == ((1, 64, 64, 3), np.uint8)
    with recording(trial, USUAL) as again:
        assert (again, (again / INDEX).stat().st_mtime_ns) == (folder, made)
        calls = list(read_calls(again, "unet"))
    assert [call.guided for call in calls] == [True, True]
    assert calls[0].feeds["sample"].shape == (2, 4, 16, 16)
    assert calls[0].feeds["timestep"] > calls[1].feeds["timestep"]
    with recording(replace(trial, workload=replace(workload, seed=8)), USUAL) as another:
        assert another != folder


def test_a_reference_that_gives_nan_judges_nothing(
    workload: WorkloadFacts, plant: Plant, tmp_path: Path
) -> None:
    broken = plant(tmp_path / "broken", "unet", "conv_out.bias", lambda b: b * np.float32("nan"))
    with pytest.raises(FidelityError, match=r"nothing can be judged by this reference.*unet gave"):
        component_gates(Trial(broken, TESTED, REFERENCE, workload))


def test_an_engine_that_refuses_is_an_error_with_its_reason(
    emoji: Bundle, workload: WorkloadFacts, recordings: Path
) -> None:
    asked = replace(TESTED, precision="bf16")
    with pytest.raises(FidelityError, match="parity, replay: ONNX Runtime computes in fp32 on a processor"):
        component_gates(Trial(emoji, asked, REFERENCE, workload, recordings=recordings))


def test_options_reach_the_engine(emoji: Bundle, workload: WorkloadFacts, recordings: Path) -> None:
    asked = replace(REFERENCE, options={"NUM_STREAMS": "2", "PERFORMANCE_HINT": "THROUGHPUT"})
    report = measure_components(Trial(emoji, asked, REFERENCE, workload, recordings=recordings))
    assert {str(one.settings["NUM_STREAMS"]) for one in report.effective.values()} == {"2"}


def test_a_child_that_dies_is_told_with_its_signal() -> None:
    with child() as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(FidelityError, match="parity, replay: the process was ended by SIGKILL"):
            worker.ask("replay", bundle="", requested={}, folder="", cache=False)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            Limits(idle_s=2.0, total_s=600.0),
            r"hung: no answer to replay in \d+ s, the last \d+ s without a word",
        ),
        (Limits(idle_s=600.0, total_s=3.0), r"gave no answer to replay within \d+ s; 3 s are the limit"),
    ],
    ids=["idle", "total"],
)
def test_a_child_that_hangs_is_given_up(limits: Limits, said: str, emoji: Bundle, tmp_path: Path) -> None:
    """It waits for a recording that nobody writes: the list of calls is a pipe."""
    os.mkfifo(tmp_path / INDEX)
    asked = {"bundle": str(emoji.path), "requested": asdict(TESTED), "folder": str(tmp_path), "cache": False}
    with child(limits=limits) as worker:
        with pytest.raises(FidelityError, match=f"^parity, replay: the process {said}"):
            worker.ask("replay", **asked)
        assert worker.pid not in sessions_of_children()


def sessions_of_children() -> list[int]:
    """Processes of this one that lead a session of their own and still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError):
            continue
        if int(parent) == os.getpid() and session == path.parent.name and state not in "ZX":
            found.append(int(session))
    return found


def test_an_unfinished_recording_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no finished recording"):
        recorded_components(tmp_path)
    with pytest.raises(StorageError, match="holds no drawn latents"):
        read_drawn(tmp_path)


def test_sampling_never_asks_for_more_than_there_is(workload: WorkloadFacts) -> None:
    assert Sampling(5, 50, 4).of(workload) == Sampling(2, 2, 4)
