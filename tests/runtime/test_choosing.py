"""``auto`` in the pipeline: what is chosen for a request, what is said, and what happens when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kiln.backends import auto, registry
from kiln.backends.base import GraphSource, PrepareOptions, Session
from kiln.backends.null import NullBackend
from kiln.bundle import Bundle, open_bundle
from kiln.cache_store import entries
from kiln.errors import BackendUnavailable, SessionError
from kiln.exporters.resolve import bundled_models
from kiln.runtime.choosing import unet_work
from kiln.runtime.events import Event, ImageReady, PhaseFinished, Warned
from kiln.runtime.pipeline import Pipeline
from kiln.runtime.request import Request
from kiln.runtime.settings import Settings


class Fake(NullBackend):
    """Draws ramps, but refuses the components it is told to."""

    def __init__(self, name: str, *refused: str) -> None:
        self.name, self.refused, self.prepared = name, refused, []

    prepared: list[str]

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Session:
        if source.component in self.refused:
            raise SessionError(f"no {source.component} today")
        self.prepared.append(source.component)
        session = super().prepare(source, options)
        assert session.in_force.backend == self.name
        return session


@pytest.fixture
def bundle() -> Bundle:
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    return open_bundle(bundled_models()["emoji"])


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Fake]:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    found: dict[str, Fake] = {"first": Fake("first"), "second": Fake("second")}
    monkeypatch.setattr(registry, "get_backend", lambda name: found[name])
    monkeypatch.setattr(registry, "AUTO_ORDER", tuple(found))
    return found


def run(pipeline: Pipeline, **changes: Any) -> list[Event]:
    return list(pipeline.generate(Request("red apple", seed=1, **({"steps": 2} | changes))))


def said(events: list[Event]) -> list[str]:
    return [event.detail for event in events if isinstance(event, PhaseFinished) and event.phase == "choose"]


def engines(events: list[Event]) -> set[str]:
    [ready] = [event for event in events if isinstance(event, ImageReady)]
    return {in_force.backend for in_force in ready.record.in_force.values()}


def test_what_a_request_asks(bundle: Bundle) -> None:
    request = Request("x", steps=7, count=5, batch_size=2)
    work = unet_work(bundle, request, (16, 24), 32, guided=True)
    assert work.shapes == {
        "sample": (4, 4, 16, 24),
        "timestep": (),
        "encoder_hidden_states": (4, 32, 256),
    }
    assert work.steps == 21
    assert work.parameters == 16_840_644
    assert work.architecture == bundle.manifest["components"]["unet"]["architecture"]
    assert unet_work(bundle, request, (16, 24), 32, guided=False).shapes["sample"][0] == 2


def test_the_pipeline_says_what_it_took_and_why(bundle: Bundle, backends: dict[str, Fake]) -> None:
    with Pipeline.open(bundle) as pipeline:
        events = run(pipeline)
        assert said(events) == [pipeline.choice]
    assert pipeline.choice.startswith("first: the first that works of the documented order; not measured")
    assert engines(events) == {"first"}
    assert backends["second"].prepared == []


def test_the_shapes_chosen_for_are_those_prepared(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = auto.Auto.choose

    def choose(self: Any, work: auto.Work, *args: Any, **options: Any) -> auto.Chosen:
        seen.append(dict(work.shapes))
        return real(self, work, *args, **options)

    monkeypatch.setattr(auto.Auto, "choose", choose)
    monkeypatch.setattr(registry, "AUTO_ORDER", ("null",))
    with Pipeline.open(bundle) as pipeline:
        for changes in ({}, {"count": 3, "batch_size": 2}, {"cfg_scale": 1.0, "width": 128}):
            shapes: list[dict[str, Any]] = []
            prepare = pipeline.sessions.backend.prepare
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    pipeline.sessions.backend,
                    "prepare",
                    lambda source, options, shapes=shapes, prepare=prepare: (
                        shapes.append(dict(options.shapes)) if source.component == "unet" else None,
                        prepare(source, options),
                    )[1],
                )
                run(pipeline, **changes)
            assert shapes[0] == seen[-1]


def test_a_failing_backend_is_passed_over_and_that_is_said(bundle: Bundle, backends: dict[str, Fake]) -> None:
    backends["first"].refused = ("unet",)
    with Pipeline.open(bundle) as pipeline:
        events = run(pipeline)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert warned == ["first failed, going on with second: no unet today"]
    assert engines(events) == {"second"}


def test_when_all_fail_every_reason_is_given(bundle: Bundle, backends: dict[str, Fake]) -> None:
    backends["first"].refused = ("text_encoder",)
    backends["second"].refused = ("vae_decoder",)
    with (
        Pipeline.open(bundle) as pipeline,
        pytest.raises(BackendUnavailable, match="first: no text_encoder today; second: no vae_decoder today"),
    ):
        run(pipeline)


def test_a_named_backend_never_falls_back(bundle: Bundle, backends: dict[str, Fake]) -> None:
    backends["first"].refused = ("unet",)
    with Pipeline.open(bundle, Settings("first")) as pipeline, pytest.raises(SessionError, match="no unet"):
        run(pipeline)
    assert pipeline.choice == ""


def test_tuning_hands_its_session_to_the_pipeline(bundle: Bundle, backends: dict[str, Fake]) -> None:
    with Pipeline.open(bundle, Settings(tune=True)) as pipeline:
        events = run(pipeline)
        assert "measured" in pipeline.choice
    winner = next(iter(engines(events)))
    assert backends[winner].prepared.count("unet") == 1
    [entry] = entries(("tuning",))
    assert entry.facts["order"][0] == winner
    with Pipeline.open(bundle) as later:
        assert said(run(later)) == [entry.facts["summary"]]


def test_without_tuning_nothing_is_measured(bundle: Bundle, backends: dict[str, Fake]) -> None:
    with Pipeline.open(bundle, Settings(tune=False)) as pipeline:
        assert "measuring is switched off" in said(run(pipeline, steps=3))[0]
    assert backends["second"].prepared == []
    assert entries(("tuning",)) == []
