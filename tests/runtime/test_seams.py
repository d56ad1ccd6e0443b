"""What the harness uses of the runtime: watched sessions, loading ahead, another check of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.backends.base import Session
from kiln.bundle import Bundle, open_bundle
from kiln.exporters.resolve import bundled_models
from kiln.runtime.choosing import vae_factor
from kiln.runtime.events import ImageReady, PhaseFinished
from kiln.runtime.pipeline import Pipeline
from kiln.runtime.request import Request
from kiln.runtime.sessions import Sessions
from kiln.runtime.settings import Settings

NULL = Settings("null", cache=False)


@pytest.fixture(scope="module")
def emoji() -> Bundle:
    return open_bundle(bundled_models()["emoji"])


@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_prepared_is_what_a_picture_needs(emoji: Bundle, scale: float, batch: int) -> None:
    request = Request("owl", steps=2, cfg_scale=scale, count=batch, batch_size=batch, width=96)
    with Pipeline.open(emoji, NULL) as pipeline:
        loaded = [e.detail for e in pipeline.prepare(request) if isinstance(e, PhaseFinished)]
        assert loaded == ["text_encoder", "unet", "vae_decoder"]
        events = list(pipeline.generate(request))
    assert [e for e in events if isinstance(e, PhaseFinished) and e.phase == "load"] == []
    assert sum(isinstance(e, ImageReady) for e in events) == batch


def test_every_session_is_wrapped_once(emoji: Bundle) -> None:
    seen = []

    def wrap(component: str, session: Session) -> Session:
        seen.append(component)
        return session

    with Pipeline(emoji, Sessions(emoji, NULL, wrap=wrap)) as pipeline:
        for seed in (1, 2):
            list(pipeline.generate(Request("owl", steps=2, seed=seed)))
    assert seen == ["text_encoder", "unet", "vae_decoder"]


class Watched:
    """A session that tells when it runs and when it is closed."""

    def __init__(self, component: str, inner: Session, told: list[str]) -> None:
        self.in_force = inner.in_force
        self._component, self._inner, self._told = component, inner, told

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._told[-1:] != [f"run {self._component}"]:
            self._told.append(f"run {self._component}")
        return self._inner.run(feeds)

    def close(self) -> None:
        self._told.append(f"close {self._component}")
        self._inner.close()


@pytest.mark.parametrize("last", [False, True])
def test_what_is_needed_no_more_is_closed(emoji: Bundle, last: bool) -> None:
    told: list[str] = []
    sessions = Sessions(emoji, NULL, wrap=lambda component, inner: Watched(component, inner, told))
    request = Request("owl", steps=2, count=4, batch_size=2)
    with Pipeline(emoji, sessions) as pipeline:
        images = [e for e in pipeline.generate(request, last=last) if isinstance(e, ImageReady)]
    encoder, unet, decoder = "text_encoder", "unet", "vae_decoder"
    # The second batch has the shapes of the first.
    runs = [f"run {name}" for name in (encoder, unet, decoder, unet, decoder)]
    if last:
        runs.insert(1, f"close {encoder}")
        runs.insert(5, f"close {unet}")
        assert told == [*runs, f"close {decoder}"]
    else:
        assert told == [*runs, *(f"close {name}" for name in (encoder, unet, decoder))]
    for image in images:
        assert set(image.record.in_force) == {encoder, unet, decoder}


def test_a_check_of_ones_own_sees_the_pixels(emoji: Bundle) -> None:
    seen: list[tuple[tuple[int, ...], str]] = []

    def check(pixels: np.ndarray, component: str) -> None:
        seen.append((pixels.shape, component))

    with Pipeline(emoji, Sessions(emoji, NULL), check) as pipeline:
        list(pipeline.generate(Request("owl", steps=1)))
    assert seen == [((1, 64, 64, 3), "vae_decoder")]


def test_the_factor_is_that_of_the_vae(emoji: Bundle) -> None:
    assert vae_factor(emoji) == Pipeline.open(emoji, NULL).vae_factor == 4
