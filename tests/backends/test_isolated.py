"""Backends in real child processes that abort, crash, hang and babble: the parent says so and goes on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.isolation.backend import IsolatedBackend
from kiln.backends.isolation.process import Alive, Timeouts
from kiln.errors import BackendUnavailable, SessionError, UsageError

HERE = Path(__file__).parent
TARGET = "crashing_backend:CrashingBackend"
SOURCE = GraphSource("unet", Path("model.onnx"), Path("weights.safetensors"), {"out_channels": 4}, "")
FEEDS = {
    "sample": np.zeros((1, 4, 8, 8), np.float32),
    "timestep": np.array(1, np.float32),
    "encoder_hidden_states": np.zeros((1, 7, 32), np.float32),
}
QUICK = Timeouts(start=60, prepare=1.5, run=1.5, close=5, heartbeat=0.2)
SIGNALS = [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL")]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def backend() -> Iterator[IsolatedBackend]:
    """Held, so that the tests of what goes wrong start one child each."""
    with IsolatedBackend("crashing", target=TARGET) as isolated:
        yield isolated


def options(**extra: str) -> PrepareOptions:
    return PrepareOptions(extra=extra, device="none")


def is_gone(pid: int | None) -> bool:
    """Whether a process has ended; a zombie counts as there."""
    assert pid
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.1)
    return False


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def goes_on(backend: IsolatedBackend) -> None:
    """The parent can prepare again and gets right results."""
    outputs = backend.prepare(SOURCE, options()).run(FEEDS)
    assert np.array_equal(outputs["out_sample"].ravel(), np.linspace(-1, 1, 256, dtype=np.float32))


@pytest.mark.parametrize(("how", "name"), SIGNALS)
@pytest.mark.parametrize("when", ["prepare", "run"])
def test_death_by_signal(backend: IsolatedBackend, how: str, name: str, when: str) -> None:
    backend.devices()
    pid = backend.pid
    with pytest.raises(SessionError) as caught:
        backend.prepare(SOURCE, options(**{when: how})).run(FEEDS)
    text = str(caught.value)
    doing = {"prepare": "preparing", "run": "running"}[when]
    assert f"its process was ended by {name} (" in text
    assert f"while {doing} unet on device none; " in text
    assert text.startswith("crashing failed: ")
    assert ("GPU Hang" in text) == (how == "abort")
    assert ("out of memory" in text) == (how == "kill")
    assert "\n" not in text
    assert is_gone(pid)
    goes_on(backend)


def test_the_whole_output_is_in_the_note(backend: IsolatedBackend) -> None:
    with pytest.raises(SessionError) as caught:
        backend.prepare(SOURCE, options(prepare="abort"))
    assert "Fatal Python error: Aborted" in "".join(caught.value.__notes__)
    assert "misbehave" in "".join(caught.value.__notes__)  # faulthandler: where it was


@pytest.mark.parametrize(("how", "status"), [("exit", 0), ("exit3", 3)])
def test_exit_midway(backend: IsolatedBackend, how: str, status: int) -> None:
    session = backend.prepare(SOURCE, options(run=how))
    with pytest.raises(SessionError, match=f"its process exited with status {status} while running unet"):
        session.run(FEEDS)
    goes_on(backend)


@pytest.mark.parametrize("when", ["prepare", "run"])
@pytest.mark.parametrize("how", ["hang", "hang with the interpreter lock"])
def test_hang(how: str, when: str) -> None:
    with IsolatedBackend("crashing", target=TARGET, timeouts=QUICK) as backend:
        backend.devices()
        pid = backend.pid
        start = time.monotonic()
        with pytest.raises(
            SessionError, match=r"gave no sign of life for 1\.5 s while \w+ unet on device none"
        ):
            backend.prepare(SOURCE, options(**{when: how})).run(FEEDS)
        assert 1.4 < time.monotonic() - start < 10
        assert is_gone(pid)
        goes_on(backend)


@pytest.mark.parametrize("how", ["work", "work elsewhere"])
def test_compiling_for_longer_than_the_limit_is_no_hang(how: str) -> None:
    """In the child, or in a compiler that it started: as long as processor time is used."""
    seen: list[Alive] = []
    with IsolatedBackend("crashing", target=TARGET, timeouts=QUICK, on_alive=seen.append) as backend:
        start = time.monotonic()
        session = backend.prepare(SOURCE, options(prepare=how))
        assert time.monotonic() - start > 2 * QUICK.prepare - 0.5
        assert len(seen) > 5
        assert {alive.doing for alive in seen} == {"preparing unet"}
        assert seen[-1].seconds > seen[0].seconds
        assert seen[-1].cpu_seconds > seen[0].cpu_seconds
        session.run(FEEDS)


@pytest.mark.parametrize("how", ["garbage", "flood"])
def test_noise_harms_nobody(backend: IsolatedBackend, how: str) -> None:
    """Also more of it than a pipe holds."""
    session = backend.prepare(SOURCE, options(prepare=how, run=how))
    assert session.run(FEEDS)["out_sample"].shape == (1, 4, 8, 8)
    session.close()


def test_last_words_after_a_flood(backend: IsolatedBackend) -> None:
    session = backend.prepare(SOURCE, options(prepare="flood", run="kill"))
    with pytest.raises(SessionError, match="it last wrote: ") as caught:
        session.run(FEEDS)
    assert str(caught.value).endswith("xxx... | the last line")
    assert len(str(caught.value)) < 1000
    assert len(caught.value.__notes__[0]) < 20_000


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("refuse", SessionError, "^this graph is refused$"),
        ("unavailable", BackendUnavailable, "^the device went away$"),
        ("bug", SessionError, "crashing failed while running unet .*: ZeroDivisionError: division by zero$"),
    ],
)
def test_errors_come_through(backend: IsolatedBackend, how: str, kind: type[Exception], text: str) -> None:
    session = backend.prepare(SOURCE, options(run=how))
    pid = backend.pid
    for _ in range(2):  # the child lives on, and so does the session
        with pytest.raises(kind, match=text) as caught:
            session.run(FEEDS)
        assert type(caught.value) is kind
        assert "misbehave" in str(caught.value.__cause__)
    assert backend.pid == pid


def test_logs_come_through(backend: IsolatedBackend, caplog: pytest.LogCaptureFixture) -> None:
    backend.prepare(SOURCE, options(prepare="log"))
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("engine", "WARNING", "the compiled model is thrown away")
    ]


def test_the_other_sessions_of_a_dead_child(backend: IsolatedBackend) -> None:
    first = backend.prepare(SOURCE, options())
    second = backend.prepare(SOURCE, options(run="abort"))
    with pytest.raises(SessionError, match="SIGABRT"):
        second.run(FEEDS)
    goes_on(backend)
    with pytest.raises(SessionError, match=r"cannot go on running unet: .*SIGABRT.*Prepare it again"):
        first.run(FEEDS)
    first.close()
    second.close()
    goes_on(backend)


def test_two_children_at_once() -> None:
    with (
        IsolatedBackend("crashing", target=TARGET) as one,
        IsolatedBackend("crashing", target=TARGET) as two,
    ):
        bad, good = one.prepare(SOURCE, options(run="segfault")), two.prepare(SOURCE, options())
        assert one.pid != two.pid
        with pytest.raises(SessionError, match="SIGSEGV"):
            bad.run(FEEDS)
        assert good.run(FEEDS)["out_sample"].shape == (1, 4, 8, 8)


def test_threads_take_turns(backend: IsolatedBackend) -> None:
    sessions = [backend.prepare(SOURCE, options()) for _ in range(3)]
    sizes: list[tuple[int, ...]] = []

    def work(index: int) -> None:
        for _ in range(20):
            feeds = dict(FEEDS, sample=np.zeros((1, 4, 8, 8 * (index + 1)), np.float32))
            sizes.append((index, sessions[index].run(feeds)["out_sample"].shape[-1]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sizes) == [(index, 8 * (index + 1)) for index in range(3) for _ in range(20)]


def test_closing_leaves_nothing() -> None:
    backend = IsolatedBackend("crashing", target=TARGET)
    before = open_files()
    for _ in range(2):
        first, second = (backend.prepare(SOURCE, options()) for _ in range(2))
        pid = backend.pid
        first.run(FEEDS)
        first.close()
        second.run(FEEDS)
        second.close()
        assert backend.pid is None
        assert is_gone(pid)
    assert open_files() == before
    assert not [name for name in os.listdir("/dev/shm") if "kiln" in name]


def test_crashes_leave_nothing() -> None:
    backend = IsolatedBackend("crashing", target=TARGET)
    before = open_files()
    for how in ("abort", "kill", "exit"):
        session = backend.prepare(SOURCE, options(run=how))
        pid = backend.pid
        with pytest.raises(SessionError):
            session.run(FEEDS)
        del session
        assert is_gone(pid)
    assert open_files() == before


def test_a_session_that_is_dropped_ends_the_child() -> None:
    backend = IsolatedBackend("crashing", target=TARGET)
    session = backend.prepare(SOURCE, options())
    pid = backend.pid
    session.run(FEEDS)
    del session
    gc.collect()
    assert backend.pid is None
    assert is_gone(pid)


def test_buffers_grow_and_are_used_again(backend: IsolatedBackend) -> None:
    session = backend.prepare(SOURCE, options())
    session.run(FEEDS)
    before = open_files()
    for size in (8, 64, 16, 128, 8):
        feeds = dict(FEEDS, sample=np.zeros((2, 4, size, size), np.float32))
        feeds["encoder_hidden_states"] = np.zeros((2, 7, 32), np.float32)
        outputs = session.run(feeds)["out_sample"]
        assert np.array_equal(outputs.ravel(), np.linspace(-1, 1, outputs.size, dtype=np.float32))
    assert open_files() == before


def test_devices_are_asked_for_in_the_child() -> None:
    backend = IsolatedBackend("crashing", target=TARGET)
    assert [device.id for device in backend.devices()] == ["none"]
    assert backend.pid is None


def test_a_child_that_dies_while_listing_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHING_DEVICES", "abort")
    backend = IsolatedBackend("crashing", target=TARGET)
    assert backend.probe().available
    assert backend.devices() == ()
    found = backend.probe()
    assert not found.available
    assert "ended by SIGABRT" in found.reason
    assert "looking for devices" in found.reason


def test_unknown_backend_and_options_that_no_message_can_carry() -> None:
    with pytest.raises(UsageError, match="no backend 'mystery'"):
        IsolatedBackend("mystery")
    backend = IsolatedBackend("crashing", target=TARGET)
    with pytest.raises(SessionError, match="numbers, texts and lists"):
        backend.prepare(SOURCE, PrepareOptions(extra={"callback": print}))
    assert backend.pid is None


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
def test_the_child_ends_with_a_parent_that_is_killed(how: str) -> None:
    parent, child = start_parent(how, "wait")
    time.sleep(0.3)
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.communicate()
    assert is_gone(child)


def test_ctrl_c_while_the_child_works() -> None:
    import signal

    parent, child = start_parent("hang", "")
    time.sleep(0.3)
    os.kill(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert is_gone(child)


def test_a_parent_that_never_closes_exits_clean() -> None:
    parent, child = start_parent("", "")
    _, errors = parent.communicate(timeout=30)
    assert (parent.returncode, errors) == (0, "")
    assert is_gone(child)


def test_a_file_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "signal.py").write_text("raise RuntimeError('taken from the working directory')")
    monkeypatch.chdir(tmp_path)
    with IsolatedBackend("null") as backend:
        assert backend.devices()


def test_settings_say_that_it_is_isolated(backend: IsolatedBackend) -> None:
    found: Any = backend.prepare(SOURCE, options()).in_force
    assert found.settings["isolated"] is True
    assert (found.backend, found.device) == ("null", "none")
