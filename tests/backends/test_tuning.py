"""Measuring backends against each other: fakes that take the time they are told to, on a clock of ours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kiln.backends.base import Availability, Device, GraphSource, InForce, PrepareOptions
from kiln.backends.tuning import FAILED, HOPELESS, WRONG, Measurement, distance, make_feeds, measure
from kiln.backends.tuning_memory import machine_facts, recall, remember, summarise
from kiln.errors import SessionError

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 7, 32)}
OPTIONS = PrepareOptions(shapes=SHAPES)
SOURCE = GraphSource("unet", Path("a"), Path("b"), {}, "digest")
NOVEMBER_20 = 1795176000.0  # 2026-11-20, in seconds since 1970


class Clock:
    """Seconds that pass only when a fake works."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now


@dataclass
class Fake:
    """A backend that takes ``prepare_s`` to prepare, and for its runs one after another ``step_s``."""

    name: str
    clock: Clock
    step_s: Sequence[float] = (1.0,)
    prepare_s: float = 0.0
    precision: str = "fp32"
    output: float = 1.0
    fails: str = ""
    fails_at_step: int = -1
    open: int = field(default=0, init=False)

    def probe(self) -> Availability:
        return Availability(True, "", "1")

    def devices(self) -> tuple[Device, ...]:
        return (Device("cpu", "a processor", (self.precision,)),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> FakeSession:
        self.clock.log.append(f"prepare {self.name}")
        self.clock.now += self.prepare_s
        if self.fails:
            raise SessionError(self.fails)
        self.open += 1
        return FakeSession(self, InForce(self.name, "1", "p", options.device, self.precision, 1))


@dataclass
class FakeSession:
    backend: Fake
    in_force: InForce
    runs: int = 0
    closed: bool = False

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert not self.closed
        fake = self.backend
        fake.clock.log.append(fake.name)
        fake.clock.now += fake.step_s[min(self.runs, len(fake.step_s) - 1)]
        if self.runs == fake.fails_at_step:
            raise SessionError("lost the device")
        self.runs += 1
        return {"out_sample": feeds["sample"] * np.float32(fake.output)}

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.backend.open -= 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


def race(clock: Clock, *fakes: Fake, budget_s: float = 10.0) -> Measurement:
    pairs = {fake.name: (fake, "auto") for fake in fakes}
    found = measure(pairs, SOURCE, OPTIONS, budget_s=budget_s, clock=clock)
    assert [result.label for result in found.results] == [fake.name for fake in fakes]
    assert {fake.name: fake.open for fake in fakes} == {
        fake.name: int(fake.name == found.winner and found.session is not None) for fake in fakes
    }
    return found


def verdicts(found: Measurement) -> dict[str, str]:
    return {result.label: result.verdict for result in found.results}


def test_the_fastest_wins_and_keeps_its_session(clock: Clock) -> None:
    found = race(clock, Fake("a", clock, [1.9]), Fake("b", clock, [0.9]), Fake("c", clock, [1.4]))
    assert found.winner == "b"
    assert found.order == ("b", "c", "a")
    assert found.session is not None
    assert found.session.in_force.backend == "b"
    assert [round(result.median_s, 6) for result in found.results] == [1.9, 0.9, 1.4]


def test_steps_are_interleaved_forwards_and_backwards(clock: Clock) -> None:
    race(clock, Fake("a", clock), Fake("b", clock))
    assert clock.log == ["prepare a", "a", "prepare b", "b", *"abbaabba"]


def test_two_are_in_memory_at_most(clock: Clock) -> None:
    fakes = [Fake(name, clock, [step_s]) for name, step_s in zip("abcd", (1.2, 1.0, 1.5, 0.8), strict=True)]

    class Watching(Clock):
        most = 0

        def __call__(self) -> float:
            self.most = max(self.most, sum(fake.open for fake in fakes))
            return clock.now

    watching = Watching()
    found = measure({f.name: (f, "auto") for f in fakes}, SOURCE, OPTIONS, clock=watching)
    assert found.winner == "d"
    assert watching.most == 2


def test_the_warm_up_is_not_counted(clock: Clock) -> None:
    found = race(clock, Fake("a", clock, [8.0, 0.5]), Fake("b", clock, [1.0]))
    assert found.winner == "a"
    assert found.results[0].first_s == 8.0
    assert found.results[0].median_s == 0.5


def test_one_busy_moment_does_not_decide(clock: Clock) -> None:
    found = race(clock, Fake("a", clock, [1, 1, 5, 1, 1]), Fake("b", clock, [1.2]))
    assert found.winner == "a"


def test_within_the_noise_the_documented_order_decides(clock: Clock) -> None:
    assert race(clock, Fake("a", clock, [1.04]), Fake("b", clock, [1.0])).winner == "a"
    assert race(clock, Fake("a", clock, [1.06]), Fake("b", clock, [1.0])).winner == "b"


def test_a_hopeless_one_is_dropped_after_its_first_step(clock: Clock) -> None:
    slow = Fake("slow", clock, [4.0])
    found = race(clock, Fake("a", clock), slow, Fake("b", clock, [1.5]))
    assert verdicts(found) == {"a": "", "slow": HOPELESS, "b": ""}
    assert clock.log.count("slow") == 2  # warm-up and one step
    assert found.order == ("a", "b", "slow")


def test_one_that_eats_the_budget_warming_up_is_not_run_again(clock: Clock) -> None:
    found = race(clock, Fake("a", clock), Fake("slow", clock, [20.0]))
    assert verdicts(found) == {"a": "", "slow": HOPELESS}
    assert clock.log.count("slow") == 1


def test_a_slow_one_that_came_first_is_dropped_too(clock: Clock) -> None:
    found = race(clock, Fake("slow", clock, [20.0]), Fake("a", clock))
    assert found.winner == "a"
    assert clock.log.count("slow") == 1


def test_a_hopeless_one_is_closed_before_the_next_is_loaded(clock: Clock) -> None:
    race(clock, Fake("a", clock), Fake("slow", clock, [4.0]), Fake("b", clock))
    assert clock.log[:7] == ["prepare a", "a", "prepare slow", "slow", "a", "slow", "prepare b"]


def test_the_budget_bounds_each_candidate(clock: Clock) -> None:
    found = race(clock, Fake("a", clock, [6.0]), Fake("b", clock, [5.0]))
    assert [len(result.step_s) for result in found.results] == [2, 2]


def test_a_failing_candidate_is_a_result(clock: Clock) -> None:
    broken = Fake("broken", clock, fails="refuses\nthis graph", prepare_s=3)
    found = race(clock, broken, Fake("a", clock), Fake("dies", clock, fails_at_step=2))
    assert verdicts(found) == {"broken": FAILED, "a": "", "dies": FAILED}
    assert [result.fault for result in found.results] == ["refuses this graph", "", "lost the device"]
    assert found.results[0].prepare_s == 3
    assert found.winner == "a"


def test_all_fail(clock: Clock) -> None:
    found = race(clock, Fake("a", clock, fails="x"), Fake("b", clock, fails_at_step=0))
    assert (found.winner, found.session) == ("", None)


@pytest.mark.parametrize("output", [float("nan"), float("inf"), 0.0, 1.5, -1.0])
def test_a_fast_one_that_computes_something_else_is_not_chosen(clock: Clock, output: float) -> None:
    found = race(clock, Fake("wrong", clock, [0.5], precision="bf16", output=output), Fake("a", clock))
    assert verdicts(found) == {"wrong": WRONG, "a": ""}
    assert found.winner == "a"
    assert found.order == ("a",)
    assert "its output is" in found.results[0].fault


def test_rounding_is_not_wrong(clock: Clock) -> None:
    found = race(clock, Fake("half", clock, [0.1], precision="bf16", output=1.03), Fake("a", clock))
    assert found.winner == "half"


def test_among_equals_the_odd_one_out_is_wrong(clock: Clock) -> None:
    found = race(
        clock, Fake("odd", clock, [0.5], output=3.0), Fake("a", clock), Fake("b", clock, [1.2], output=1.01)
    )
    assert verdicts(found) == {"odd": WRONG, "a": "", "b": ""}


def test_the_only_right_one_wins_though_it_was_dropped_as_hopeless(clock: Clock) -> None:
    wrong = Fake("wrong", clock, [0.1], precision="bf16", output=5.0)
    found = race(clock, wrong, Fake("slow", clock, [30.0]))
    assert verdicts(found) == {"wrong": WRONG, "slow": HOPELESS}
    assert (found.winner, found.session) == ("slow", None)


def test_an_interrupt_closes_everything(clock: Clock) -> None:
    class Interrupted(Fake):
        def prepare(self, source: GraphSource, options: PrepareOptions) -> FakeSession:
            raise KeyboardInterrupt

    first = Fake("a", clock)
    with pytest.raises(KeyboardInterrupt):
        race(clock, first, Interrupted("b", clock))
    assert first.open == 0


def test_the_device_of_the_candidate_is_used(clock: Clock) -> None:
    fake = Fake("a", clock)
    found = measure({"a:x": (fake, "x")}, SOURCE, replace(OPTIONS, device="y"), clock=clock)
    assert found.session is not None
    assert found.session.in_force.device == "x"


def test_feeds_are_what_the_contract_asks_for() -> None:
    first, second = make_feeds("unet", SHAPES), make_feeds("unet", SHAPES)
    assert {name: array.shape for name, array in first.items()} == SHAPES
    assert {str(array.dtype) for array in first.values()} == {"float32"}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["timestep"] == 500


def test_distance() -> None:
    ones = np.ones((2, 2), np.float32)
    assert distance(ones * 2, ones) == distance(ones, ones * 2) == 0.5
    assert distance(ones * 0, ones) == 1.0
    assert distance(ones * 0, ones * 0) == 0.0
    assert distance(ones, np.ones(4, np.float32)) == float("inf")
    assert not distance(ones * np.nan, ones) <= 1e9


QUESTION = {"machine": {"cpu": ["x", ("avx2",), 2]}, "shapes": {"sample": (2, 4)}, "threads": 0}


def measured(clock: Clock) -> Measurement:
    return race(
        clock,
        Fake("openvino", clock, [0.28], precision="bf16"),
        Fake("onnxruntime", clock, [0.5]),
        Fake("torch", clock, [0.1], precision="bf16", output=9.0),
        Fake("broken", clock, fails="no"),
    )


def test_there_and_back(clock: Clock, tmp_path: Path) -> None:
    assert recall(tmp_path, QUESTION) is None
    remember(tmp_path / "tuning", QUESTION, measured(clock), NOVEMBER_20)
    known = recall(tmp_path / "tuning", QUESTION)
    assert known is not None
    assert known.order == ("openvino", "onnxruntime")
    assert list(known.wrong) == ["torch"]
    assert known.summary == (
        "openvino (bf16): 0.28 s a step; onnxruntime (fp32) 0.5 s; torch wrong; broken failed; "
        "measured 2026-11-20"
    )
    assert summarise(measured(clock), NOVEMBER_20) == known.summary


def test_any_other_question_has_another_answer(clock: Clock, tmp_path: Path) -> None:
    remember(tmp_path, QUESTION, measured(clock), NOVEMBER_20)
    for change in ({"machine": {"cpu": ["y", ("avx2",), 2]}}, {"shapes": {"sample": (4, 4)}}, {"threads": 1}):
        assert recall(tmp_path, {**QUESTION, **change}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}', "null", "other"])
def test_an_answer_that_cannot_be_read_is_thrown_away(
    clock: Clock, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    remember(tmp_path, QUESTION, measured(clock), NOVEMBER_20)
    [path] = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"x"', '"z"') if text == "other" else text)
    with caplog.at_level(logging.WARNING):
        assert recall(tmp_path, QUESTION) is None
    assert "is thrown away" in caplog.text
    assert not path.exists()


def test_a_folder_that_cannot_be_written(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    remember(tmp_path / "file", QUESTION, measured(clock), NOVEMBER_20)
    assert "cannot be kept" in caplog.text


def test_a_limit_of_nothing_remembers_nothing(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE_LIMIT", "0")
    remember(tmp_path, QUESTION, measured(clock), NOVEMBER_20)
    assert list(tmp_path.iterdir()) == []


def test_machines_differ(tmp_path: Path) -> None:
    def machine(name: str, **files: str) -> dict[str, object]:
        root = tmp_path / name
        for path, text in {"proc/cpuinfo": "model name\t: CPU A\nflags\t: avx2\n", **files}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return machine_facts(root)

    card = "sys/class/drm/card0/device"
    amd = {f"{card}/vendor": "0x1002\n", f"{card}/device": "0x744c\n"}
    nvidia = {
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 1\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC\n",
    }
    found = [
        machine("plain"),
        machine("other", **{"proc/cpuinfo": "model name\t: CPU B\nflags\t: avx2\n"}),
        machine("amd", **amd),
        machine("other card", **(amd | {f"{card}/device": "0x15bf\n"})),
        machine("nvidia", **nvidia),
        machine("driver", **(nvidia | {"proc/driver/nvidia/version": "NVRM 590\n"})),
    ]
    assert all(a != b for a, b in pairwise(found))
    assert found[2]["cards"] == ["0x1002:0x744c"]
    assert found[4]["cards"] == ["NVIDIA H200"]
    assert machine("plain") == found[0]
