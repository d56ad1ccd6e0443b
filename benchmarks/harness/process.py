"""The harness's side of ``wire``: start a worker, ask it, notice when it dies or hangs, and end it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ...errors import KilnError
from .wire import STARTED, Message

_POLL_S = 0.1
_MOST_S = 2.0  # between two looks at the clock; more than that passes only when this process is stopped
_ENDS_WITHIN_S = 5.0
_LOOK_EVERY_S = 5.0
_TAIL = 300
_PROTOCOL = "protocol"
# What engines print on the way out after the reason, or about themselves.
_NOISE = ("warnings.warn", "Traceback", "  File ", "    ")


class WorkerError(KilnError):
    """A measured process answered with an error, died or hung; the text is one line."""


@dataclass(frozen=True)
class Limits:
    """When a silent worker is given up.

    ``idle_s`` without a line and without using processor time, itself or any process that it has started;
    ``total_s`` for one request in any case.
    Compiling for a GPU takes up to half an hour and is silent, but never idle.
    """

    idle_s: float = 180.0
    total_s: float = 7200.0


LIMITS = Limits()


class Worker:
    """A process that measures, from its start to its end."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        name: str = "the process",
        log: Callable[[str], None] = lambda text: None,
        watch: Callable[[int], None] = lambda pid: None,
        limits: Limits = LIMITS,
    ) -> None:
        """Start it.

        Args:
            command: program and arguments.
            environment: all of its variables.
            name: what it is called when it died or hung.
            log: gets the worker's ``log`` lines.
            watch: is called with the process id some ten times a second while an answer is awaited.
            limits: when to give up.

        Raises:
            WorkerError: it cannot be started.
        """
        self._name, self._log, self._watch, self._limits = name, log, watch, limits
        self._answers: queue.Queue[Message | None] = queue.Queue()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        started = {STARTED: str(time.monotonic_ns())}
        try:
            # A session of its own: Ctrl-C is for the harness, which first keeps what was measured.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**environment, **started},
                start_new_session=True,
            )
        except OSError as exc:
            self._errors.close()
            raise WorkerError(f"cannot start {command[0]}: {exc.strerror}") from exc
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds that it and what it started have used so far."""
        return _session_cpu_seconds(self.pid)

    def ready(self) -> Message:
        """The worker's first line.

        Raises:
            WorkerError: it died, hung, or said something else.
        """
        return self._answer("start", "ready")

    def ask(self, do: str, **fields: Any) -> Message:
        """Ask and wait.

        Raises:
            WorkerError: the worker says so, died, hung, or does not keep to the protocol.
        """
        line = json.dumps({"do": do, **fields}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._epitaph(do)) from None
        return self._answer(do, "done")

    def close(self) -> None:
        """End it: kindly, then with all it started."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"do": "exit"}\n')
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_WITHIN_S)
        self.kill()

    def kill(self) -> None:
        """End it at once, with all it started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # One that waits inside a driver outlives even this; the run goes on without it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDS_WITHIN_S)
        self._reader.join(_ENDS_WITHIN_S)
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    message = None
                if not isinstance(message, dict):
                    message = {"kind": "error", "type": _PROTOCOL, "text": f"wrote {line[:80]!r}"}
                self._answers.put(message)
        self._answers.put(None)

    def _answer(self, do: str, expected: str) -> Message:
        waited = alive = looked = used = 0.0
        last = time.monotonic()
        while True:
            try:
                message = self._answers.get(timeout=_POLL_S)
            except queue.Empty:
                self._watch(self.pid)
                # A clock of its own, which stands still while this process is stopped, and all with it.
                now = time.monotonic()
                waited, last = waited + min(now - last, _MOST_S), now
                if waited - looked > min(_LOOK_EVERY_S, self._limits.idle_s / 2):
                    # Compilers work in processes of their own, so all that it started counts.
                    looked, spent = waited, self.cpu_seconds
                    if spent != used:  # less when one of them has ended that nobody waits for
                        used, alive = spent, waited
                self._check_alive(do, waited - alive, waited)
                continue
            alive = waited
            if message is None:
                raise WorkerError(self._epitaph(do))
            if message.get("kind") == "log":
                self._log(str(message.get("text", "")))
                continue
            self._watch(self.pid)
            if message.get("kind") == "error":
                if message.get("type") == _PROTOCOL:
                    self.kill()  # whatever else it says cannot be told from an answer
                kind, text = message.get("type", "error"), " ".join(str(message.get("text", "")).split())
                raise WorkerError(text if kind.endswith("Error") and text else f"{kind}: {text}")
            if message.get("kind") != expected:
                self.kill()
                raise WorkerError(f"answered {do} with {message.get('kind')!r}; expected {expected!r}")
            return message

    def _check_alive(self, do: str, idle_s: float, total_s: float) -> None:
        limits = self._limits
        if idle_s > limits.idle_s:
            still = f"{idle_s:.0f} s without a word and without using the processor"
            why = f"hung: no answer to {do} in {total_s:.0f} s, the last {still}"
        elif total_s > limits.total_s:
            why = f"gave no answer to {do} within {total_s:.0f} s; {limits.total_s:.0f} s are the limit"
        else:
            return
        self.kill()
        raise WorkerError(f"{self._name} {why}; it was ended, with all that it had started")

    def _epitaph(self, do: str) -> str:
        """How the process ended, and the last that it said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDS_WITHIN_S)
        code = self._process.poll()
        if code is None:
            how = "closed its output and lives on"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (perhaps the system ran out of memory)"
        else:
            how = f"ended with exit code {code}"
        last = self._last_words()
        return f"{self._name} {how} during {do}" + (f": {last}" if last else "")

    def _last_words(self) -> str:
        try:
            self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, self._errors.tell() - 8192))
            lines = self._errors.read().decode(errors="replace").splitlines()
        except (OSError, ValueError):
            return ""
        said = [line.strip() for line in lines if line.strip() and not line.startswith(_NOISE)]
        return said[-1][:_TAIL] if said else ""


def _session_cpu_seconds(session: int) -> float:
    """Processor time of all processes of a session, and of those they waited for; 0 where it is not said."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
