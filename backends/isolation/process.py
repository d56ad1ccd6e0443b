"""The parent's side of a child process: start it, ask it, watch it, and end it so that nothing remains."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import BackendError, BackendUnavailable, SessionError
from .death import describe_end, last_words
from .messages import Channel, ChannelClosedError, Message, unpack_error

SEARCH_PATH = "PYTHONPATH"  # carries this process's ``sys.path`` over

_CHUNK = 65536
_KEPT_BYTES = 16384  # of what the child writes
_TICK = 1.0  # seconds between two looks at a child that is silent
_KILL_SECONDS = 5.0
_WORKING = 0.01  # share of one core: more is work, less is a thread that wakes up to send a heartbeat


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a child is given up and killed.

    ``start`` bounds loading the interpreter, and listing devices, which loads the engine; ``run`` one run.
    ``prepare`` bounds the time without a sign of life: compiling for a GPU can take an hour, and as long as
    the child uses the processor it is taken to work. ``heartbeat`` is how often it reports.
    """

    start: float = 180.0
    prepare: float = 900.0
    run: float = 900.0
    close: float = 10.0
    heartbeat: float = 5.0


@dataclass(frozen=True)
class Alive:
    """A sign of life: what the child does, for how many seconds, and the processor seconds it used so far."""

    doing: str
    seconds: float
    cpu_seconds: float


class Child:
    """One child process with one backend in it.

    Args:
        backend: the backend's name, for messages.
        timeouts: how long to wait for what.
        on_alive: called with each heartbeat, in the thread that waits.

    Raises:
        BackendUnavailable: the process cannot be started.
    """

    def __init__(
        self, backend: str, timeouts: Timeouts, on_alive: Callable[[Alive], None] | None = None
    ) -> None:
        self.backend, self.timeouts, self._on_alive = backend, timeouts, on_alive
        self.end = ""  # how it ended, once it has
        self._lock = threading.RLock()
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                _command(theirs.fileno(), timeouts.heartbeat),
                stdin=subprocess.PIPE,  # the lifeline: closed by the system when this process ends
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent
                env=os.environ | {SEARCH_PATH: os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
        except OSError as error:
            ours.close()
            os.close(reading)
            raise BackendUnavailable(f"no process can be started for {backend}: {error}") from error
        finally:
            theirs.close()
            os.close(writing)
        self._channel = Channel(ours)
        self._output = _Output(reading)
        self._finalizer = weakref.finalize(self, _clean_up, self._process, self._channel, self._output)
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return not self.end

    def ask(
        self,
        message: Message,
        fds: Sequence[int] = (),
        *,
        doing: str,
        seconds: float,
        device: str = "",
        patient: bool = False,
    ) -> tuple[Message, list[int]]:
        """Send a request and wait for its answer.

        Args:
            message: the request; see ``child.py`` for the kinds.
            fds: descriptors to send along.
            doing: what is asked for, for messages: ``"running unet"``.
            seconds: how long to wait.
            device: where it runs, for messages.
            patient: count ``seconds`` from the last sign of life, not from the beginning.

        Raises:
            KilnError: what the child raised, of the same class and text.
            SessionError: it ended or was silent for too long, and is gone now.
        """
        where = f" on {device}" if device else ""
        with self._lock:
            if self.end:
                raise SessionError(f"{self.backend} cannot go on {doing}: {self.end}. Prepare it again")
            try:
                self._channel.send(message, fds)
                answer, got = self._wait(doing, seconds, patient)
            except ChannelClosedError:
                raise self._died(doing + where) from None
            except TimeoutError:
                raise self._hung(doing + where, seconds) from None
            except BaseException:  # Ctrl-C above all: the answer to this would be taken for the next one's
                self.kill("it was interrupted")
                raise
        if answer["kind"] == "error":
            raise unpack_error(answer, f"{self.backend} failed while {doing}{where}")
        return answer, got

    def stop(self) -> None:
        """End it in order, or by force when it does not react; afterwards nothing of it remains."""
        with self._lock:
            if not self.end:
                self.end = "its process was closed"
                with suppress(ChannelClosedError):
                    self._channel.send({"kind": "exit"})
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(self.timeouts.close)
            self._finalizer()

    def kill(self, why: str) -> None:
        """End it by force. Needs no lock, so a finalizer may call it in any thread."""
        self.end = self.end or why
        self._finalizer()

    def _wait(self, doing: str, seconds: float, patient: bool) -> tuple[Message, list[int]]:
        start = last_sign = time.monotonic()
        used = using = 0.0
        while True:
            left = last_sign + seconds - time.monotonic()
            received = self._channel.receive(max(0.001, min(left, _TICK)))
            kind = received[0]["kind"] if received else ""
            if received and kind not in ("alive", "log"):
                return received
            now = time.monotonic()
            if patient:  # never less than before: a compiler may end between two reads of one sum
                using = max(using, _group_cpu_seconds(self.pid))
            if received and kind == "log":
                _relog(received[0])
            elif received:
                using = max(using, received[0]["cpu_seconds"])  # where there is no /proc to look at
                if self._on_alive:
                    self._on_alive(Alive(doing, now - start, using))
            # A deadlock costs no processor time, while a heartbeat alone comes from a thread that lives on.
            if patient and using - used > _WORKING * (now - last_sign):
                last_sign, used = now, using
            if now - last_sign > seconds:
                raise TimeoutError
            if not received and self._process.poll() is not None:  # a grandchild may hold the socket open
                raise ChannelClosedError

    def _died(self, doing: str) -> BackendError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)  # the socket closes a moment before the process is gone
        code = self._process.poll()
        how, advice = describe_end(code) if code is not None else ("closed its socket", "prepare again")
        return self._gone(f"its process {how} while {doing}", advice)

    def _hung(self, doing: str, seconds: float) -> BackendError:
        _kill(self._process)
        state = "" if self._process.poll() is not None else f", and {describe_end(None)[0]}"
        return self._gone(
            f"its process gave no sign of life for {seconds:g} s while {doing}, and was killed{state}",
            "a GPU that hangs needs its driver reset (see dmesg); with a slow machine allow more time",
        )

    def _gone(self, how: str, advice: str) -> BackendError:
        self.kill(how)
        output = self._output.kept()
        words = last_words(output)
        text = f"{self.backend} failed: {how}; {advice}" + (f"; it last wrote: {words}" if words else "")
        error = SessionError(text)
        if output:
            error.add_note("the child's output ended with:\n" + output.decode(errors="replace"))
        return error


class _Output:
    """Reads what a child writes, so that it never waits for us, and keeps the end of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, name="kiln child output", daemon=True)
        self._thread.start()

    def kept(self) -> bytes:
        """The last 16 KiB."""
        self._thread.join(1.0)  # what was written before the end is still in the pipe
        return bytes(self._kept)

    def _read(self) -> None:
        with open(self._descriptor, "rb", buffering=0) as pipe:
            while data := pipe.read(_CHUNK):
                self._kept += data
                del self._kept[:-_KEPT_BYTES]


def _clean_up(process: subprocess.Popen[bytes], channel: Channel, output: _Output) -> None:
    """Leave nothing behind; runs when a child is stopped, collected, or the interpreter exits."""
    _kill(process)
    channel.close()
    if process.stdin:
        process.stdin.close()
    output.kept()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started (compilers), and wait until it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def _command(descriptor: int, heartbeat: float) -> list[str]:
    if not sys.executable:
        raise BackendUnavailable("this Python does not know its own program, so it cannot start another one")
    level = logging.getLogger(__name__).getEffectiveLevel()
    arguments = [descriptor, heartbeat, level, os.environ.get(SEARCH_PATH, "")]
    # -P: a file in the working directory must not stand in for a module.
    return [sys.executable, "-P", "-X", "faulthandler", "-m", f"{__package__}.child", *map(str, arguments)]


def _relog(message: Message) -> None:
    logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])


def _group_cpu_seconds(group: int, proc: Path = Path("/proc")) -> float:
    """Processor seconds that a process group has used, the compilers it started included; 0 without /proc.

    Fields 5 (pgrp) and 14 to 17 of ``/proc/PID/stat``, see proc(5): utime and stime in clock ticks, and
    those of the children that it has waited for, so that a compiler that has ended still counts.
    """
    ticks = 0
    for folder in proc.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
