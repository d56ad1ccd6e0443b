"""Nothing of a backend in a child process outlives its use: no process, no open file, no shared memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.isolation.backend import IsolatedBackend
from kiln.errors import SessionError

HERE = Path(__file__).parent


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_closing_leaves_nothing(crashing: Any) -> None:
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    before = open_files()
    for _ in range(2):
        first, second = (backend.prepare(crashing.SOURCE, crashing.options()) for _ in range(2))
        pid = backend.pid
        first.run(crashing.FEEDS)
        first.close()
        second.run(crashing.FEEDS)
        second.close()
        assert backend.pid is None
        assert crashing.is_gone(pid)
    assert open_files() == before
    assert not [name for name in os.listdir("/dev/shm") if "kiln" in name]


def test_crashes_leave_nothing(crashing: Any) -> None:
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    before = open_files()
    for how in ("abort", "kill", "exit"):
        session = backend.prepare(crashing.SOURCE, crashing.options(run=how))
        pid = backend.pid
        with pytest.raises(SessionError):
            session.run(crashing.FEEDS)
        del session
        assert crashing.is_gone(pid)
    assert open_files() == before


def test_a_session_that_is_dropped_ends_the_child(crashing: Any) -> None:
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    session = backend.prepare(crashing.SOURCE, crashing.options())
    pid = backend.pid
    session.run(crashing.FEEDS)
    del session
    gc.collect()
    assert backend.pid is None
    assert crashing.is_gone(pid)


def test_buffers_grow_and_are_used_again(backend: IsolatedBackend, crashing: Any) -> None:
    session = backend.prepare(crashing.SOURCE, crashing.options())
    session.run(crashing.FEEDS)
    before = open_files()
    for size in (8, 64, 16, 128, 8):
        feeds = dict(crashing.FEEDS, sample=np.zeros((2, 4, size, size), np.float32))
        feeds["encoder_hidden_states"] = np.zeros((2, 7, 32), np.float32)
        outputs = session.run(feeds)["out_sample"]
        assert np.array_equal(outputs.ravel(), np.linspace(-1, 1, outputs.size, dtype=np.float32))
    assert open_files() == before


PARENT = """
import sys, threading, time
from pathlib import Path
import numpy as np
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.isolation.backend import IsolatedBackend
source = GraphSource("unet", Path("g"), Path("w"), {"out_channels": 4}, "")
feeds = {"sample": np.zeros((1, 4, 8, 8), np.float32), "timestep": np.array(1, np.float32),
         "encoder_hidden_states": np.zeros((1, 7, 32), np.float32)}
backend = IsolatedBackend("crashing", target="crashing_backend:CrashingBackend")
session = backend.prepare(source, PrepareOptions(extra={"run": sys.argv[1]}))
session.run(feeds) if sys.argv[1] == "" else None
print(backend.pid, flush=True)
session.run(feeds)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def start_parent(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A parent in a process of its own, and the id of its child."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert parent.stdout
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize("how", ["", "hang", "hang with the interpreter lock"])
def test_the_child_ends_with_a_parent_that_is_killed(crashing: Any, how: str) -> None:
    parent, child = start_parent(how, "wait")
    time.sleep(0.3)
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.communicate()
    assert crashing.is_gone(child)


def test_ctrl_c_while_the_child_works(crashing: Any) -> None:
    parent, child = start_parent("hang", "")
    time.sleep(0.3)
    os.kill(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert crashing.is_gone(child)


def test_a_parent_that_never_closes_exits_clean(crashing: Any) -> None:
    parent, child = start_parent("", "")
    _, errors = parent.communicate(timeout=30)
    assert (parent.returncode, errors) == (0, "")
    assert crashing.is_gone(child)
