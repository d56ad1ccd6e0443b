"""``auto``: the documented order, what is measured and when, what is remembered, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from kiln.backends import auto as module
from kiln.backends import candidates, registry
from kiln.backends.auto import Auto, Work, repays
from kiln.backends.base import Availability, Device, GraphSource, InForce, PrepareOptions
from kiln.errors import BackendUnavailable, SessionError

NOW = 1795176000.0  # 2026-11-20
SHAPES = {"sample": (2, 4, 64, 64), "timestep": (), "encoder_hidden_states": (2, 77, 768)}
SOURCE = GraphSource("unet", Path("a"), Path("b"), {}, "digest")
# SD1.5 at 512x512: 32 TFLOP for 20 steps.
LONG = Work(SOURCE, SHAPES, 80, 860_000_000, "sd1", {"F16": 686})
SHORT = replace(LONG, steps=20)
OPTIONS = PrepareOptions(shapes=SHAPES)


@dataclass
class Fake:
    """A backend that takes ``step_s`` for a step, on the clock of the test."""

    name: str
    step_s: float = 1.0
    there: bool = True
    devices_found: tuple[Device, ...] = (Device("cpu", "a processor", ("fp32",)),)
    fails: str = ""
    scale: float = 1.0
    version: str = "1"
    loaded: int = 0
    prepared: list[str] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [0.0])

    def probe(self) -> Availability:
        return Availability(self.there, "" if self.there else f"no {self.name} here", self.version)

    def devices(self) -> tuple[Device, ...]:
        self.loaded += 1
        return self.devices_found

    def prepare(self, source: GraphSource, options: PrepareOptions) -> FakeSession:
        if self.fails:
            raise SessionError(self.fails)
        self.prepared.append(options.device)
        precision = self.devices_found[0].precisions[0]
        return FakeSession(self, InForce(self.name, "1", "p", options.device, precision, 1))


@dataclass
class FakeSession:
    backend: Fake
    in_force: InForce

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.backend.clock[0] += self.backend.step_s
        return {"out_sample": feeds["sample"] * np.float32(self.backend.scale)}

    def close(self) -> None:
        pass


class World:
    """Which backends there are, and in which order ``auto`` tries them."""

    def __init__(self, patch: pytest.MonkeyPatch, memory: Path) -> None:
        self.fakes: dict[str, Fake] = {}
        self.clock, self.memory = [0.0], memory
        patch.setattr(registry, "get_backend", lambda name: self.fakes[name])
        self._patch = patch

    def has(self, *fakes: Fake, order: tuple[str, ...] = ()) -> None:
        self.fakes = {fake.name: fake for fake in fakes}
        for fake in fakes:
            fake.clock = self.clock
        self._patch.setattr(registry, "AUTO_ORDER", order or tuple(self.fakes))

    def choose(
        self, auto: Auto, work: Work = LONG, options: PrepareOptions = OPTIONS, *, cache: bool = True
    ) -> module.Chosen:
        memory = self.memory if cache else None
        return auto.choose(work, options, memory, clock=lambda: self.clock[0], now=lambda: NOW)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    monkeypatch.delenv("KILN_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(module, "machine_facts", lambda: {"cpu": "x"})
    monkeypatch.setattr(module, "available_bytes", lambda: 64 << 30)
    monkeypatch.setattr(candidates, "_NODES", {})
    return World(monkeypatch, tmp_path / "tuning")


def card(*precisions: str) -> tuple[Device, ...]:
    return (Device("cuda:0", "a card", precisions or ("fp16", "fp32")),)


def test_the_first_that_works(world: World) -> None:
    late = Fake("torch")
    world.has(Fake("openvino", there=False), Fake("onnxruntime"), late)
    assert Auto().current.label == "onnxruntime"
    assert late.loaded == 0  # nothing that is not needed is loaded


def test_none_works_and_every_reason_is_given(world: World) -> None:
    world.has(
        Fake("openvino", there=False), Fake("onnxruntime", devices_found=()), Fake("torch", there=False)
    )
    with pytest.raises(BackendUnavailable) as caught:
        Auto()
    for text in ("openvino: no openvino here", "onnxruntime: the engine loads but", "torch: no torch here"):
        assert text in str(caught.value)


def test_an_entry_may_name_a_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", "a processor", ("fp32",))
    world.has(Fake("torch", devices_found=(*card(), cpu)), order=("torch:rocm", "torch:cuda", "torch"))
    monkeypatch.setattr(candidates, "_NODES", {"torch:rocm": ("dev/no-such-card",)})
    auto = Auto()
    assert (auto.current.label, auto.current.device) == ("torch:cuda", "cuda")
    world.has(Fake("torch", devices_found=(cpu,)), order=("torch:rocm", "torch:cuda", "torch"))
    assert Auto().current.label == "torch"


NODES = dict(candidates._NODES)


def test_an_engine_is_not_loaded_for_a_card_that_is_not_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_NODES", NODES)
    fake = Fake("torch", devices_found=card())
    world.has(fake, order=("torch:cuda",))
    candidate = candidates.Candidate.parse("torch:cuda")
    assert "no /dev/nvidiactl and no /dev/dxg" in candidate.why_unusable(tmp_path)
    assert fake.loaded == 0
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert candidate.why_unusable(tmp_path) == ""


def test_a_short_run_measures_nothing_and_loads_nothing_more(world: World) -> None:
    other = Fake("onnxruntime", 0.1)
    world.has(Fake("openvino"), other)
    auto = Auto()
    chosen = world.choose(auto, SHORT)
    assert auto.current.label == "openvino"
    assert chosen.why == (
        "openvino: the first that works of the documented order; "
        "not measured, because the run is short (20 steps, 32 TFLOP)"
    )
    assert (other.loaded, other.prepared, chosen.session) == (0, [], None)


def test_a_long_run_measures_and_remembers(world: World) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    auto = Auto()
    chosen = world.choose(auto)
    assert auto.current.label == "onnxruntime"
    assert chosen.session is not None
    assert chosen.why == ("onnxruntime (fp32): 0.7 s a step; openvino (fp32) 1.9 s; measured 2026-11-20")
    again = world.choose(auto)
    assert (again.why, again.session) == (chosen.why, None)  # the session is handed out once

    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    later = Auto()
    assert world.choose(later, SHORT).why == chosen.why  # what is known serves short runs too
    assert later.current.label == "onnxruntime"
    assert world.clock[0] > 0
    assert world.fakes["openvino"].prepared == []


@pytest.mark.parametrize(
    "change",
    [
        lambda world: replace(LONG, architecture="sdxl"),
        lambda world: replace(LONG, storage={"I8": 1}),
        lambda world: replace(LONG, shapes={**SHAPES, "sample": (2, 4, 96, 64)}),
    ],
)
def test_another_question_is_measured_again(world: World, change: Callable[[World], Work]) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    world.choose(Auto())
    world.choose(Auto(), change(world))
    assert len(list(world.memory.iterdir())) == 2


def test_a_new_engine_version_is_measured_again(world: World) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    world.choose(Auto())
    world.has(Fake("openvino", 0.2, version="2"), Fake("onnxruntime", 0.7))
    auto = Auto()
    world.choose(auto)
    assert auto.current.label == "openvino"


def test_no_tune_takes_the_order_whatever_is_known(world: World) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    world.choose(Auto())
    auto = Auto(tune=False)
    assert "measuring is switched off" in world.choose(auto).why
    assert auto.current.label == "openvino"


def test_tune_measures_all_that_work_even_for_a_short_run_and_again(world: World) -> None:
    fakes = (
        Fake("onnxruntime-cuda", 0.5, devices_found=card()),
        Fake("openvino", 0.4, devices_found=(Device("CPU", "p", ("bf16", "fp32")),)),
        Fake("torch", 0.3),
        Fake("broken", there=False),
    )
    world.has(*fakes)
    auto = Auto(tune=True)
    assert world.choose(auto, SHORT).why.startswith(
        "torch (fp32): 0.3 s a step; onnxruntime-cuda (fp16) 0.5 s;"
    )
    world.fakes["openvino"].step_s = 0.1
    world.choose(auto, SHORT)
    assert auto.current.label == "torch"  # once for each pipeline
    anew = Auto(tune=True)
    world.choose(anew, SHORT)
    assert anew.current.label == "openvino"


def test_who_cannot_win_is_not_measured(world: World) -> None:
    half = (Device("CPU", "p", ("bf16", "fp32")),)
    world.has(Fake("openvino", devices_found=half), Fake("onnxruntime", 0.1), Fake("torch", 0.1))
    chosen = world.choose(Auto())
    assert "no other could win" in chosen.why
    # Where fp32 is asked for, all compute in the same.
    fp32 = replace(OPTIONS, precision="fp32")
    world.has(Fake("openvino", devices_found=half), Fake("onnxruntime", 0.1))
    auto = Auto()
    world.choose(auto, options=fp32)
    assert auto.current.label == "onnxruntime"


def test_a_processor_is_not_measured_against_a_card(world: World) -> None:
    world.has(Fake("onnxruntime-cuda", devices_found=card()), Fake("openvino", 0.1))
    assert "no other could win" in world.choose(Auto(), replace(LONG, steps=10_000)).why
    # But against a card that may be a part of that processor.
    gpu = (Device("GPU", "a card", ("fp32",)),)
    world.has(Fake("openvino", devices_found=gpu), Fake("onnxruntime", 0.1))
    auto = Auto()
    world.choose(auto, replace(LONG, steps=10_000))
    assert auto.current.label == "onnxruntime"


def test_an_engine_that_compiles_for_minutes_is_measured_only_when_asked(world: World) -> None:
    fakes = (
        Fake("onnxruntime-cuda", devices_found=card()),
        Fake("onnxruntime-tensorrt", 0.1, devices_found=card()),
    )
    world.has(*fakes)
    assert "no other could win" in world.choose(Auto(), replace(LONG, steps=10_000)).why
    auto = Auto(tune=True)
    world.choose(auto)
    assert auto.current.label == "onnxruntime-tensorrt"


def test_what_repays() -> None:
    assert repays(replace(LONG, steps=40), 2)
    assert not repays(replace(LONG, steps=39), 2)
    assert not repays(replace(LONG, steps=79), 3)
    assert repays(replace(LONG, steps=80), 3)
    small = replace(LONG, steps=400, shapes={**SHAPES, "sample": (2, 4, 16, 16)}, parameters=16_840_644)
    assert not repays(small, 2)  # the bundled model
    assert not repays(LONG, 2, on_cpu=False)
    assert repays(replace(LONG, steps=1300), 2, on_cpu=False)


@pytest.mark.parametrize(
    ("parameters", "cells", "gmac"),
    [(859_520_964, 64, 401.6), (865_910_724, 96, 1074.6), (2_567_463_684, 128, 3380.6)],
    ids=["SD1", "SD2", "SDXL"],
)
def test_the_estimate_of_operations_is_within_a_factor_of_two(
    parameters: int, cells: int, gmac: float
) -> None:
    """Against multiplications counted operator by operator at the native size; each is two operations."""
    work = Work(SOURCE, {"sample": (1, 4, cells, cells)}, 1, parameters, "", {})
    assert gmac * 2 / 1000 / 2 < work.tflop < gmac * 2 / 1000 * 2


def test_without_a_cache_only_when_asked(world: World) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    assert "without a cache" in world.choose(Auto(), cache=False).why
    auto = Auto(tune=True)
    world.choose(auto, cache=False)
    assert auto.current.label == "onnxruntime"
    assert not world.memory.exists()


def test_two_engines_that_would_not_fit_are_not_measured(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 8 * 10**9)
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    assert "two engines need 13.8 GB, 8.0 GB are free" in world.choose(Auto()).why
    auto = Auto(tune=True)
    world.choose(auto)
    assert auto.current.label == "onnxruntime"
    assert world.choose(Auto()).why.startswith("onnxruntime")  # what is known is used all the same


def test_only_one_installed(world: World) -> None:
    world.has(Fake("openvino"), Fake("onnxruntime", there=False))
    assert "no other is installed" in world.choose(Auto()).why


def test_a_wrong_one_is_reported_and_never_used_again(world: World) -> None:
    world.has(Fake("openvino", 0.1, scale=3.0), Fake("onnxruntime"), Fake("torch", 1.5))
    auto = Auto()
    chosen = world.choose(auto, replace(LONG, steps=200))
    assert auto.current.label == "onnxruntime"
    assert [text.split(":")[0] for text in chosen.warnings] == ["openvino is not used"]
    later = Auto()
    world.choose(later)
    assert later.go_on(SessionError("out of memory")).startswith("onnxruntime failed, going on with torch")
    with pytest.raises(BackendUnavailable) as caught:
        later.go_on(SessionError("lost"))
    for text in (
        "openvino: its output is not that of onnxruntime",
        "onnxruntime: out of memory",
        "torch: lost",
    ):
        assert text in str(caught.value)


def test_one_that_fails_while_measured_is_reported(world: World) -> None:
    world.has(Fake("openvino", fails="no such operator"), Fake("onnxruntime"), Fake("torch", 1.5))
    auto = Auto()
    chosen = world.choose(auto, replace(LONG, steps=200))
    assert auto.current.label == "onnxruntime"
    assert chosen.warnings == ("openvino is not used: no such operator",)


def test_all_fail_while_measured(world: World) -> None:
    world.has(Fake("openvino", fails="no such operator"), Fake("onnxruntime", fails="out of memory"))
    with pytest.raises(BackendUnavailable, match=r"openvino: no such operator; onnxruntime: out of memory"):
        world.choose(Auto())


def test_going_on_without_measurements(world: World) -> None:
    world.has(Fake("openvino"), Fake("onnxruntime", there=False), Fake("torch"))
    auto = Auto()
    told = auto.go_on(SessionError("refuses\nthe graph"))
    assert told == "openvino failed, going on with torch: refuses the graph"
    assert auto.current.label == "torch"
    assert world.choose(auto, SHORT).why.startswith("torch: the first that works")


def test_a_remembered_winner_that_is_gone_is_replaced_and_that_is_said(world: World) -> None:
    world.has(Fake("openvino", 1.9), Fake("onnxruntime", 0.7))
    world.choose(Auto())
    world.fakes["onnxruntime"].devices_found = ()
    auto = Auto()
    why = world.choose(auto).why
    assert auto.current.label == "openvino"
    assert why.startswith("openvino: onnxruntime does not work now (the engine loads but")


def test_a_remembered_choice_costs_no_time(world: World) -> None:
    """Not timed: no engine but the one in use is loaded."""
    world.has(Fake("openvino", 0.7), Fake("onnxruntime", 1.9))
    world.choose(Auto())
    fresh = Fake("onnxruntime", 1.9)
    world.has(Fake("openvino", 0.7), fresh)
    world.choose(Auto(), SHORT)
    assert fresh.loaded == 0
