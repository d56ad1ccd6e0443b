"""The harness's side of the process that runs networks: start it, ask, and say what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...errors import KilnError
from ..harness.wire import Message

_TAIL = 2000  # characters of what an engine wrote before it died


class FidelityError(KilnError):
    """Parity could not be measured: the process that runs the networks failed; the text says why."""


class Child:
    """A running worker; a request is answered by one line."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log

    def ask(self, do: str, **arguments: Any) -> Message:
        """What the worker answers.

        Raises:
            FidelityError: it answered with an error, or it is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise self._gone(do) from exc
        return self.read(do)

    def read(self, what: str) -> Message:
        """The next line that is an answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message: Message = json.loads(line)
            if message["kind"] == "error":
                raise FidelityError(f"parity, {what}: {message['type']}: {message['text']}")
            if message["kind"] != "log":
                return message
        raise self._gone(what)

    def _gone(self, what: str) -> FidelityError:
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
        self._log.seek(0)
        return FidelityError(
            f"parity, {what}: the process {how}. It wrote: {self._log.read()[-_TAIL:].strip()}"
        )


@contextmanager
def child(cache: Path | None = None, *, offline: bool = True) -> Iterator[Child]:
    """A fresh process without anything loaded; it ends with the block.

    Args:
        cache: Kiln's cache in the child; None leaves it where it is.
        offline: whether libraries are kept from asking the hub.

    Raises:
        FidelityError: it could not be started, or did not get as far as its first line.
    """
    environment = dict(os.environ)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    if cache is not None:
        environment["KILN_CACHE"] = str(cache)
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.worker"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=environment,
            )
        except OSError as exc:
            raise FidelityError(f"cannot start {sys.executable}: {exc.strerror}") from exc
        made = Child(process, log)
        try:
            made.read("starting")
            yield made
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Let it finish, by the end of its input; one that does not is killed."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # it died with a request unread
                continue
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
