"""What goes wrong with one configuration becomes its record, and the others go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kiln.benchmarks.fidelity import Trial
from kiln.benchmarks.fidelity.calls import INDEX
from kiln.benchmarks.fidelity.child import child
from kiln.benchmarks.harness.driver import Interrupted
from kiln.benchmarks.harness.partial import check_interrupted
from kiln.benchmarks.harness.process import Limits
from kiln.benchmarks.records.record import Gate
from kiln.errors import UsageError

Scripted = Callable[..., dict[str, Any]]


def other(scripted: Scripted) -> dict[str, Any]:
    return scripted(backend="openvino")


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ({"dies_at": 4}, "was ended by SIGKILL (perhaps the system ran out of memory) during draw"),
        ({"dies_at": 0}, "the engine says its last words"),
        ({"errs_at": 4}, "the device is gone"),
        ({"refuses": "no such precision"}, "no such precision"),
    ],
)
def test_a_failure_is_a_record_and_the_others_go_on(
    bench: Callable[..., Any], scripted: Scripted, planted: dict[str, Any], reason: str
) -> None:
    made = bench({"onnxruntime": scripted(**planted), "openvino": other(scripted)})
    outcomes = {outcome.record.requested.name: outcome for outcome in made.run()}
    broken, whole = outcomes["onnxruntime"], outcomes["openvino"]
    assert broken.failed
    assert broken.record.verdict == "invalid"
    assert any(reason in text for text in broken.record.reasons), broken.record.reasons
    assert not any("Traceback" in text or "\n" in text for text in broken.record.reasons)
    assert len(whole.record.samples) == 6
    assert whole.record.verdict == "valid", whole.record.reasons


def test_what_was_timed_before_a_crash_is_kept(bench: Callable[..., Any], scripted: Scripted) -> None:
    # Two prompts, then four of the six that were wanted.
    record = bench({"onnxruntime": scripted(dies_at=6)}).records()["onnxruntime"]
    assert len(record.samples) == 4


def test_a_hang_is_given_up(bench: Callable[..., Any], scripted: Scripted) -> None:
    made = bench({"onnxruntime": scripted(hangs_at=3)}, limits=Limits(idle_s=2.0, total_s=600.0))
    record = made.records()["onnxruntime"]
    said = "the process of onnxruntime fp32 hung: no answer to draw in "
    assert any(text.startswith(said) for text in record.reasons), record.reasons
    assert len(record.samples) == 1


def test_parity_that_hangs_makes_its_row_invalid_and_the_others_go_on(
    bench: Callable[..., Any], scripted: Scripted, tmp_path: Path
) -> None:
    """The child that looks at components is a real one; it waits for a recording that nobody writes."""
    os.mkfifo(tmp_path / INDEX)

    def hangs(trial: Trial) -> list[Gate]:
        if trial.requested.name == "onnxruntime":
            with child(limits=Limits(idle_s=2.0, total_s=600.0)) as worker:
                asked = {"bundle": str(trial.bundle.path), "requested": asdict(trial.requested)}
                worker.ask("replay", **asked, folder=str(tmp_path), cache=False)
        return []

    made = bench({"onnxruntime": scripted(), "openvino": other(scripted)})
    made.gates = hangs
    records = made.records()
    broken, whole = records["onnxruntime"], records["openvino"]
    assert broken.verdict == "invalid"
    assert any("parity, replay: the process hung: no answer" in text for text in broken.reasons)
    assert not broken.samples
    assert (whole.verdict, len(whole.samples)) == ("valid", 6), whole.reasons


def test_a_reference_that_hangs_leaves_every_row_unchecked(
    bench: Callable[..., Any], scripted: Scripted
) -> None:
    made = bench({"onnxruntime": scripted()}, limits=Limits(idle_s=2.0, total_s=600.0))
    made.reference = scripted(hangs_at=1)
    record = made.records()["onnxruntime"]
    assert record.verdict == "invalid"
    assert any(
        text.startswith("parity not checked: the reference could not be drawn: the process of ")
        and "hung: no answer to draw" in text
        for text in record.reasons
    ), record.reasons
    assert len(record.samples) == 6


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(
    bench: Callable[..., Any], scripted: Scripted
) -> None:
    made = bench({"openvino": other(scripted), "onnxruntime": scripted([1.0, 1.0, 1.01], interrupts_at=5)})
    with pytest.raises(Interrupted, match="go on with --resume"):
        made.run()
    directory = made.options.directory
    assert not (directory / "records.jsonl").exists()
    kept = {
        p.stem: json.loads(p.read_text()) for p in (directory / "partial").glob("*.json") if p.stem != "run"
    }
    assert sorted(len(row["record"]["samples"]) for row in kept.values()) == [3, 3]
    run = json.loads((directory / "partial/run.json").read_text())["run"]

    with pytest.raises(UsageError, match="--resume, drop it with --fresh"):
        check_interrupted(directory, resume=False, fresh=False)
    check_interrupted(directory, resume=True, fresh=False)
    made.scripts["onnxruntime"] = scripted([2.0])
    records = made.records(resume=True)
    assert {record.run for record in records.values()} == {run}
    # Those of the first process stay, those of the second are added until there are enough.
    assert [s.seconds for s in records["onnxruntime"].samples] == [1.01, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert [s.index for s in records["onnxruntime"].samples] == [0, 1, 2, 3, 4, 5]
    assert len(records["onnxruntime"].warmups) > 2
    assert not (directory / "partial").exists()


def test_what_is_finished_is_not_measured_again(bench: Callable[..., Any], scripted: Scripted) -> None:
    made = bench({"onnxruntime": scripted()})
    key = made.configurations()[0].key
    made.scripts["onnxruntime"] = scripted(interrupts_at=4)
    with pytest.raises(Interrupted):
        made.run()
    path = made.options.directory / "partial/run.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps(plan | {"done": [key]}))
    assert made.run(resume=True) == []


def test_there_must_be_something_to_resume(bench: Callable[..., Any], scripted: Scripted) -> None:
    with pytest.raises(UsageError, match="holds no interrupted run; leave --resume out"):
        bench({"onnxruntime": scripted()}).run(resume=True)


def test_another_plan_is_not_resumed(bench: Callable[..., Any], scripted: Scripted) -> None:
    made = bench({"onnxruntime": scripted(interrupts_at=3)})
    with pytest.raises(Interrupted):
        made.run()
    made.scripts = {"openvino": other(scripted)}
    with pytest.raises(UsageError, match="was interrupted with other options"):
        made.run(resume=True)


def test_without_parity_a_row_says_so_and_does_not_fail_the_run(
    bench: Callable[..., Any], scripted: Scripted
) -> None:
    (outcome,) = bench({"onnxruntime": scripted(wrong_picture=True)}, parity=False).run()
    assert outcome.record.verdict == "invalid"
    assert outcome.record.reasons == ("parity not checked: --no-parity",)
    assert not outcome.failed


def test_an_unstable_warm_up_is_noisy(bench: Callable[..., Any], scripted: Scripted) -> None:
    times = [1.0 + 0.1 * (i % 2) for i in range(10)] + [1.0] * 6
    record = bench({"onnxruntime": scripted(times)}).records()["onnxruntime"]
    assert record.verdict == "noisy"
    assert "not stable after 10 warm-ups" in record.reasons


def test_cold_and_cached_loads_are_told_apart(bench: Callable[..., Any], scripted: Scripted) -> None:
    cached = scripted(load=0.5)
    cached["effective"]["unet"]["from_cache"] = True
    record = bench({"onnxruntime": cached, "openvino": other(scripted)}, cold=True).records()
    assert record["onnxruntime"].phases.compile_cold == 0.5
    assert record["onnxruntime"].phases.load_cached == 0.5
    assert record["onnxruntime"].phases.components["unet"] == {"compile_cold": 0.5, "load_cached": 0.5}
    # What does not cache has no cached load, whatever its second load took.
    assert record["openvino"].phases.compile_cold == 2.0
    assert record["openvino"].phases.load_cached is None


def test_an_a_a_pair_sets_the_floor(bench: Callable[..., Any], scripted: Scripted) -> None:
    made = bench({"onnxruntime": scripted()}, aa=True)
    (outcome,) = made.run()
    assert outcome.record.noise.floor == 0.0  # all times were equal
    assert "A/A: two runs of onnxruntime fp32 differ by 0.00%; noise floor 0.00%" in made.said


def test_an_a_a_pair_that_agrees_by_luck_has_the_floor_of_its_spread(
    bench: Callable[..., Any], scripted: Scripted
) -> None:
    times = [1.0, 1.0, 0.95, 1.0, 1.05, 0.96, 1.0, 1.04]  # both halves are the same, to the letter
    (outcome,) = bench({"onnxruntime": scripted(times)}, aa=True).run()
    assert outcome.record.noise.floor is not None
    assert 0.03 < outcome.record.noise.floor < 0.10
    assert outcome.record.verdict == "valid", outcome.record.reasons


def test_an_a_a_pair_of_few_samples_tells_no_floor(
    bench: Callable[..., Any], scripted: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    made = bench({"onnxruntime": scripted()}, aa=True, min_batches={"cpu": 4, "gpu": 4})
    (outcome,) = made.run()
    assert outcome.record.noise.floor is None
    assert any(text.endswith("too few to tell the noise floor") for text in made.said)


def test_what_does_not_fit_together_takes_turns_in_groups(
    bench: Callable[..., Any], scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiln.benchmarks.harness.lane_groups.available_bytes", lambda: 5_000_000_000)
    made = bench({"onnxruntime": scripted(), "openvino": other(scripted)}, cold=True)
    records = made.records()
    assert "memory: 2 configurations take turns in 2 groups" in made.said
    for number, name in enumerate(("onnxruntime", "openvino"), 1):
        assert any(f"group {number} of 2" in text for text in records[name].remarks)
        assert (records[name].verdict, records[name].reasons) == ("valid", ())
        assert len(records[name].samples) == 6
