"""The prepared components of a pipeline, on the backend that was named or that ``auto`` holds best."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack

from ..backends import registry
from ..backends.auto import Auto, Work
from ..backends.base import Backend, InForce, PrepareOptions, Session
from ..backends.compiled_cache import compiling_for
from ..backends.isolation.backend import IsolatedBackend
from ..backends.isolation.policy import with_isolation
from ..backends.openvino_backend import SHARED_SAMPLE, WHERE_POSSIBLE
from ..backends.registry import AUTO, parse_backend, require_usable
from ..bundle import Bundle
from ..cache import cache_folder
from ..errors import BackendError
from .events import Event, PhaseFinished, PhaseStarted, Warned
from .settings import Settings

Shapes = Mapping[str, tuple[int, ...]]
Wrap = Callable[[str, Session], Session]

# Guidance runs the UNet on the same latents with two prompts: the engines that use it, and their option.
_SHARED: Mapping[str, Mapping[str, object]] = {"openvino": {SHARED_SAMPLE: WHERE_POSSIBLE}}


class Sessions:
    """Prepares components when they are first needed, and keeps one session per component."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        backend: Backend | None = None,
        device: str = "auto",
        wrap: Wrap | None = None,
    ) -> None:
        """Find the backend; nothing is loaded into it yet.

        Args:
            bundle: whose components are prepared.
            settings: what the caller asks.
            backend: is used as it is, instead of the one that ``settings`` name.
            device: the device of ``backend``.
            wrap: gets each component's name and session, and gives the session to use; to watch it at work.

        Raises:
            BackendUnavailable: the backend asked for is not here, or with ``auto`` none is.
            UsageError: an unknown backend.
        """
        self.bundle, self.settings = bundle, settings
        self.choice = ""  # why ``auto`` took this backend, empty for one that was named
        self._held: dict[str, tuple[tuple[Shapes, bool], Session]] = {}
        self._in_force: dict[str, InForce] = {}
        self._process = ExitStack()  # keeps the child of a backend that runs in one
        self._wrap: Wrap = wrap or (lambda component, session: session)
        self._auto: Auto | None = None
        if backend is not None:
            self.backend, self.device = backend, device
        else:
            name, self.device = parse_backend(settings.backend)
            if name == AUTO:
                self._auto = Auto(settings.tune, settings.isolate)
                self.backend, self.device = self._auto.current.backend, self._auto.current.device
            else:
                self.backend = with_isolation(registry.get_backend(name), self.device, settings.isolate)
        self._enter()
        if self._auto is None:
            try:
                require_usable(self.backend)
            except BaseException:
                self._process.close()
                raise

    def close(self) -> None:
        """Close all sessions, and end the child process if there is one."""
        for _, session in self._held.values():
            session.close()
        self._held.clear()
        self._in_force.clear()
        self._process.close()

    @property
    def in_force(self) -> dict[str, InForce]:
        """What the engine says it uses, or used for what was released, by component."""
        return dict(self._in_force)

    def release(self, component: str) -> None:
        """Give back the memory of one component; it is prepared again when it is needed."""
        held = self._held.pop(component, None)
        if held is not None:
            held[1].close()

    def choose(self, work: Work) -> Generator[Event, None, None]:
        """Let ``auto`` settle on a backend for this work; a backend that was named stays."""
        if self._auto is None:
            return
        memory = cache_folder("tuning") if self.settings.cache else None
        yield PhaseStarted("choose", "auto")
        start = time.perf_counter()
        with compiling_for(self.bundle.name):
            chosen = self._auto.choose(work, self._options(work.shapes), memory)
        self._switch()
        if chosen.session is not None:
            self._hold("unet", (work.shapes, work.guided), chosen.session)
        for text in chosen.warnings:
            yield Warned(text)
        self.choice = chosen.why
        yield PhaseFinished("choose", time.perf_counter() - start, chosen.why)

    def get(self, component: str, shapes: Shapes, *, guided: bool = False) -> Generator[Event, None, Session]:
        """Prepare ``component`` for ``shapes`` unless it is; the generator returns the session.

        Args:
            component: its name.
            shapes: of its inputs.
            guided: whether both halves of each batch will have the same latents.

        Raises:
            BackendError: the engine refused; with ``auto``, every one that is left did.
        """
        held, wanted = self._held.get(component), (shapes, guided)
        if held and held[0] == wanted:
            return held[1]
        yield PhaseStarted("load", component)
        start = time.perf_counter()
        self.release(component)
        while True:
            try:
                with compiling_for(self.bundle.name):
                    options = self._options(shapes, guided=guided)
                    session = self.backend.prepare(self.bundle.source(component), options)
                break
            except BackendError as error:
                if self._auto is None:
                    raise
                yield Warned(self._auto.go_on(error))
                self._switch()
        session = self._hold(component, wanted, session)
        yield PhaseFinished("load", time.perf_counter() - start, component)
        return session

    def _hold(self, component: str, wanted: tuple[Shapes, bool], session: Session) -> Session:
        session = self._wrap(component, session)
        self._held[component] = (wanted, session)
        self._in_force[component] = session.in_force
        return session

    def _enter(self) -> None:
        """Keep the child process of an isolated backend until ``close``, instead of one per session."""
        if isinstance(self.backend, IsolatedBackend):
            self._process.enter_context(self.backend)

    def _switch(self) -> None:
        """Go over to the backend that ``auto`` holds for the best; nothing of the former one is kept."""
        if self._auto is None:
            return
        current = self._auto.current
        if current.backend is not self.backend or current.device != self.device:
            self.close()
            self.backend, self.device = current.backend, current.device
            self._enter()

    def _options(self, shapes: Shapes, *, guided: bool = False) -> PrepareOptions:
        return PrepareOptions(
            extra=_SHARED.get(self.backend.name, {}) if guided else {},
            shapes=shapes,
            device=self.device,
            precision=self.settings.precision,
            threads=self.settings.threads,
            cache_dir=cache_folder("compiled") if self.settings.cache else None,
        )
