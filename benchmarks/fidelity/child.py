"""The harness's side of the process that runs networks: start it, ask, and say what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import KilnError
from ..harness.process import LIMITS, Limits, Worker, WorkerError
from ..harness.wire import Message

_NAME = "the process"


class FidelityError(KilnError):
    """Parity could not be measured: the process that runs the networks failed; the text says why."""


class Child:
    """A running worker; a request is answered by one line."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._worker.pid

    def ask(self, do: str, **arguments: Any) -> Message:
        """What the worker answers.

        Raises:
            FidelityError: it answered with an error, it is gone, or it gave no answer within its limits and
                was ended, with all that it had started.
        """
        try:
            return self._worker.ask(do, **arguments)
        except WorkerError as error:
            raise FidelityError(f"parity, {do}: {error}") from error


@contextmanager
def child(cache: Path | None = None, *, offline: bool = True, limits: Limits = LIMITS) -> Iterator[Child]:
    """A fresh process without anything loaded; it ends with the block.

    Args:
        cache: Kiln's cache in the child; None leaves it where it is.
        offline: whether libraries are kept from asking the hub.
        limits: when it is given up.

    Raises:
        FidelityError: it could not be started, or did not get as far as its first line.
    """
    environment = dict(os.environ)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    if cache is not None:
        environment["KILN_CACHE"] = str(cache)
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.worker"]
    try:
        worker = Worker(command, environment, name=_NAME, limits=limits)
    except WorkerError as error:
        raise FidelityError(f"parity: {error}") from error
    with worker:
        try:
            worker.ready()
        except WorkerError as error:
            raise FidelityError(f"parity: {error}") from error
        yield Child(worker)
