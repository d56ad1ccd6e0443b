"""Any backend, in a child process: the parent survives what an engine does, says what it was, and goes on."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from ...errors import BackendError, KilnError
from ..base import Availability, Device, GraphSource, InForce, PrepareOptions
from ..session import CheckedSession, fixed_shapes
from .blocks import Block, plan
from .messages import Message, pack_task
from .process import Alive, Child, Timeouts
from .target import load_backend, target_of

log = logging.getLogger(__name__)


class IsolatedBackend:
    """A registered backend in a process of its own.

    All its sessions share one child, which is started when first needed and ends with its last session; used
    as a context manager, the child stays until the end of the block, which saves starting the engine again.
    When a child dies, its sessions are lost, and ``prepare`` starts a new one. Requests are carried out one
    at a time.

    Args:
        name: the backend's registered name.
        target: ``module:class`` of a backend that the registry does not know.
        timeouts: how long to wait for what.
        on_alive: called now and then while the child works, e.g. to show that compiling goes on.
    """

    def __init__(
        self,
        name: str,
        *,
        target: str = "",
        timeouts: Timeouts | None = None,
        on_alive: Callable[[Alive], None] | None = None,
    ) -> None:
        self.name = name
        self._inner = load_backend(name, target)
        self._timeouts, self._on_alive = timeouts or Timeouts(), on_alive
        self._starting = threading.RLock()
        self._tenancy: _Tenancy | None = None
        self._held = 0
        self._devices: tuple[Device, ...] = ()
        self._failure = ""

    def __enter__(self) -> Self:
        self._held += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held -= 1
        if not self._held:
            self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is no child."""
        tenancy = self._tenancy
        return tenancy.child.pid if tenancy and tenancy.child.alive else None

    def probe(self) -> Availability:
        """What the backend itself says, in this process: that imports no engine. A child that did not get
        as far as listing devices makes it unavailable, with the reason.
        """
        found = self._inner.probe()
        return Availability(False, self._failure, found.version) if self._failure else found

    def devices(self) -> tuple[Device, ...]:
        """The devices, asked for in the child and then remembered; empty when the child fails."""
        with self._starting:
            if not self._devices and not self._failure:
                try:
                    self._devices = self._ask_for_devices()
                except BackendError as error:
                    self._failure = str(error)
                self._end_if_empty()
        return self._devices

    def prepare(self, source: GraphSource, options: PrepareOptions) -> IsolatedSession:
        """Load one component in the child.

        Raises:
            BackendUnavailable: as the backend itself, or no child can be started.
            SessionError: as the backend itself; or the child died or hung, and the text says how, on which
                device, at which component, and what it wrote last.
        """
        task = pack_task(source, options)
        with self._starting:
            tenancy = self._tenant()
            number = tenancy.move_in()
        try:
            answer, _ = tenancy.child.ask(
                {"kind": "prepare", "session": number, "task": task, "dropped": tenancy.take_dropped()},
                doing=f"preparing {source.component}",
                seconds=self._timeouts.prepare,
                device=f"device {options.device}",
                patient=True,
            )
            in_force = InForce(**answer["in_force"])
        except BaseException:
            tenancy.move_out(number)
            self._end_if_empty()
            raise
        in_force = replace(in_force, settings={**in_force.settings, "isolated": True})
        return IsolatedSession(self, tenancy, number, source, options, in_force)

    def close(self) -> None:
        """End the child; its sessions are closed with it."""
        with self._starting:
            tenancy, self._tenancy = self._tenancy, None
            if tenancy:
                tenancy.child.stop()

    def _ask_for_devices(self) -> tuple[Device, ...]:
        tenancy = self._tenant()
        number = tenancy.move_in()  # else the child would end with a session that is collected meanwhile
        try:
            answer, _ = tenancy.child.ask(
                {"kind": "devices"}, doing="looking for devices", seconds=self._timeouts.start
            )
        finally:
            tenancy.move_out(number)
        return tuple(Device(one["id"], one["name"], tuple(one["precisions"])) for one in answer["devices"])

    def _tenant(self) -> _Tenancy:
        """The child, started if there is none that lives."""
        with self._starting:
            if not (self._tenancy and self._tenancy.child.alive):
                child = Child(self.name, self._timeouts, self._on_alive)
                self._tenancy = _Tenancy(child, keep=lambda: self._held > 0)
                opening = {"kind": "open", "name": self.name, "target": target_of(self._inner)}
                child.ask(opening, doing="starting", seconds=self._timeouts.start)
            return self._tenancy

    def _end_if_empty(self) -> None:
        with self._starting:
            if self._tenancy and not self._held and not self._tenancy.tenants:
                self.close()


class IsolatedSession(CheckedSession):
    """One component prepared in a child."""

    def __init__(
        self,
        backend: IsolatedBackend,
        tenancy: _Tenancy,
        number: int,
        source: GraphSource,
        options: PrepareOptions,
        in_force: InForce,
    ) -> None:
        super().__init__(source, in_force, fixed_shapes(source, options))
        self._backend, self._tenancy, self._number = backend, tenancy, number
        self._inputs: Block | None = None
        self._outputs: Block | None = None
        self._dropped = weakref.finalize(self, tenancy.drop, number)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        layout, size = plan(feeds)
        fds = []
        if self._inputs is None or self._inputs.size < size:
            self._inputs = _replace(self._inputs, Block.create(size))
            fds = [self._inputs.descriptor]
        self._inputs.write(feeds, layout)
        message = {"kind": "run", "session": self._number, "arrays": layout, "size": self._inputs.size}
        answer, got = self._ask(message, f"running {self.component}", self._tenancy.child.timeouts.run, fds)
        if got:
            self._outputs = _replace(self._outputs, Block(got[0], answer["size"]))
        assert self._outputs  # comes with the first answer
        return {name: view.copy() for name, view in self._outputs.read(answer["arrays"]).items()}

    def _release(self) -> None:
        self._dropped.detach()
        child = self._tenancy.child
        try:
            if child.alive:
                self._ask(
                    {"kind": "close", "session": self._number},
                    f"closing {self.component}",
                    child.timeouts.close,
                )
        except KilnError as error:
            log.warning("%s", error)  # closing is not where a user wants to be stopped; the child is gone
        finally:
            self._inputs = _replace(self._inputs, None)
            self._outputs = _replace(self._outputs, None)
            self._tenancy.move_out(self._number)
            self._backend._end_if_empty()

    def _ask(
        self, message: Message, doing: str, seconds: float, fds: list[int] | None = None
    ) -> tuple[Message, list[int]]:
        message = {**message, "dropped": self._tenancy.take_dropped()}
        device = f"device {self.in_force.device}"
        return self._tenancy.child.ask(message, fds or [], doing=doing, seconds=seconds, device=device)


class _Tenancy:
    """Which sessions live in a child. One that was collected unclosed is closed at the next request."""

    def __init__(self, child: Child, keep: Callable[[], bool]) -> None:
        self.child, self._keep = child, keep
        self.tenants: set[int] = set()
        self._numbers = itertools.count(1)
        self._collected: list[int] = []

    def move_in(self) -> int:
        number = next(self._numbers)
        self.tenants.add(number)
        return number

    def move_out(self, number: int) -> None:
        self.tenants.discard(number)

    def drop(self, number: int) -> None:
        """Called by the garbage collector, in any thread and at any time: it must not wait for a lock."""
        self.tenants.discard(number)
        self._collected.append(number)
        if not self.tenants and not self._keep():
            self.child.kill("its last session was dropped")

    def take_dropped(self) -> list[int]:
        taken, self._collected = self._collected, []
        return taken


def _replace(old: Block | None, new: Any) -> Any:
    if old:
        old.close()
    return new
