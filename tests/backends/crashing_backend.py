"""A backend that does what engines do at their worst, and what the tests ask of it.

``options.extra`` says what goes wrong, and when.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kiln.backends.base import Availability, Backend, Device, GraphSource, PrepareOptions
from kiln.backends.null import NullBackend, NullSession
from kiln.errors import BackendUnavailable, SessionError


def misbehave(how: str) -> None:
    """One way to go wrong."""
    if how == "abort":
        os.write(2, b"HW Exception by GPU node-1 (Agent handle: 0x55) reason: GPU Hang\n")
        os.abort()
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(0)
    elif how == "exit3":
        sys.exit(3)
    elif how == "hang":
        time.sleep(600)
    elif how == "hang with the interpreter lock":
        ctypes.PyDLL(None).sleep(600)
    elif how == "garbage":
        os.write(1, b'{"kind": "done"}\n\xff\x00garbage\n' * 100)
        print("more on stdout", flush=True)
    elif how == "flood":
        for _ in range(200):
            os.write(2, b"x" * 65535 + b"\n")
        os.write(2, b"the last line\n")
    elif how == "log":
        logging.getLogger("engine").warning("the compiled model is thrown away")
    elif how == "bug":
        raise ZeroDivisionError("division\nby zero")
    elif how == "refuse":
        raise SessionError("this graph is refused")
    elif how == "unavailable":
        raise BackendUnavailable("the device went away")
    elif how == "work":
        end = time.monotonic() + 4
        while time.monotonic() < end:
            sum(range(10_000))
    elif how == "work elsewhere":
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 3: pass"], check=True)


class CrashingBackend:
    """The null backend, apart from that."""

    name = "crashing"

    def probe(self) -> Availability:
        return Availability(True, "", "1")

    def devices(self) -> tuple[Device, ...]:
        misbehave(os.environ.get("CRASHING_DEVICES", ""))
        return NullBackend().devices()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> Any:
        misbehave(str(options.extra.get("prepare", "")))
        plain = replace(options, extra={})
        return CrashingSession(NullBackend().prepare(source, plain), str(options.extra.get("run", "")))


class CrashingSession:
    """A session of the null backend that misbehaves when it runs."""

    def __init__(self, inner: NullSession, run: str) -> None:
        self.in_force, self._inner, self._how = inner.in_force, inner, run

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        misbehave(self._how)
        return self._inner.run(feeds)

    def close(self) -> None:
        self._inner.close()


TARGET = "crashing_backend:CrashingBackend"
SOURCE = GraphSource("unet", Path("model.onnx"), Path("weights.safetensors"), {"out_channels": 4}, "")
FEEDS = {
    "sample": np.zeros((1, 4, 8, 8), np.float32),
    "timestep": np.array(1, np.float32),
    "encoder_hidden_states": np.zeros((1, 7, 32), np.float32),
}


def options(**extra: str) -> PrepareOptions:
    """What goes wrong when: ``options(run="abort")``."""
    return PrepareOptions(extra=extra, device="none")


def is_gone(pid: int | None) -> bool:
    """Whether a process has ended; a zombie counts as there."""
    assert pid
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.1)
    return False


def goes_on(backend: Backend) -> None:
    """The parent can prepare again and gets right results."""
    outputs = backend.prepare(SOURCE, options()).run(FEEDS)
    assert np.array_equal(outputs["out_sample"].ravel(), np.linspace(-1, 1, 256, dtype=np.float32))
