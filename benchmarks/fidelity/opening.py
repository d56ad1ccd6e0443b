"""Open a backend as a request names it, with the options of its own that the request has."""

from __future__ import annotations

from dataclasses import replace

from ...backends.base import Availability, Backend, Device, GraphSource, PrepareOptions, Session
from ...backends.registry import AUTO, get_backend, parse_backend, require_usable
from ...bundle import Bundle
from ...errors import UsageError
from ...runtime.sessions import Sessions, Shapes
from ...runtime.settings import Settings
from ..records.record import Requested


class _WithOptions:
    """A backend that is always given certain options of its own."""

    def __init__(self, inner: Backend, options: dict[str, object]) -> None:
        self.name = inner.name
        self._inner, self._options = inner, options

    def probe(self) -> Availability:
        return self._inner.probe()

    def devices(self) -> tuple[Device, ...]:
        return self._inner.devices()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Session:
        return self._inner.prepare(source, replace(options, extra={**options.extra, **self._options}))


def open_sessions(bundle: Bundle, requested: Requested, *, cache: bool) -> Sessions:
    """The sessions that drawing would use: same settings, same options.

    The process that calls this is a child already and may crash, so the engine runs in it; and the harness
    sees what it does, so that a compiler at work is not taken for a process that hangs.

    Raises:
        BackendUnavailable: the backend is not here.
        UsageError: an unknown backend or precision, or options for ``auto``.
    """
    place = requested.name if requested.device == "auto" else f"{requested.name}:{requested.device}"
    settings = Settings(
        place, requested.precision, requested.threads, cache=cache, tune=False, isolate="never"
    )
    if not requested.options:
        return Sessions(bundle, settings)
    name, device = parse_backend(place)
    if name == AUTO:
        raise UsageError(f"options belong to one backend; got {dict(requested.options)} for auto")
    inner = get_backend(name)
    require_usable(inner)
    return Sessions(bundle, settings, _WithOptions(inner, dict(requested.options)), device)


def session_of(sessions: Sessions, component: str, shapes: Shapes, *, guided: bool = False) -> Session:
    """A prepared component, without the events on the way.

    Raises:
        BackendError: the engine refused.
    """
    events = sessions.get(component, shapes, guided=guided)
    while True:
        try:
            next(events)
        except StopIteration as done:
            session: Session = done.value
            return session
