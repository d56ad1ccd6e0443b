"""Backends in real child processes that abort, crash, hang and babble: the parent says so and goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import PrepareOptions
from kiln.backends.isolation.backend import IsolatedBackend
from kiln.backends.isolation.process import Alive, Timeouts
from kiln.errors import BackendUnavailable, SessionError, UsageError

QUICK = Timeouts(start=60, prepare=1.5, run=1.5, close=5, heartbeat=0.2)
SIGNALS = [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL")]


@pytest.mark.parametrize(("how", "name"), SIGNALS)
@pytest.mark.parametrize("when", ["prepare", "run"])
def test_death_by_signal(backend: IsolatedBackend, crashing: Any, how: str, name: str, when: str) -> None:
    backend.devices()
    pid = backend.pid
    with pytest.raises(SessionError) as caught:
        backend.prepare(crashing.SOURCE, crashing.options(**{when: how})).run(crashing.FEEDS)
    text = str(caught.value)
    doing = {"prepare": "preparing", "run": "running"}[when]
    assert f"its process was ended by {name} (" in text
    assert f"while {doing} unet on device none; " in text
    assert text.startswith("crashing failed: ")
    assert ("GPU Hang" in text) == (how == "abort")
    assert ("out of memory" in text) == (how == "kill")
    assert "\n" not in text
    assert crashing.is_gone(pid)
    crashing.goes_on(backend)


def test_the_whole_output_is_in_the_note(backend: IsolatedBackend, crashing: Any) -> None:
    with pytest.raises(SessionError) as caught:
        backend.prepare(crashing.SOURCE, crashing.options(prepare="abort"))
    assert "Fatal Python error: Aborted" in "".join(caught.value.__notes__)
    assert "misbehave" in "".join(caught.value.__notes__)  # faulthandler: where it was


@pytest.mark.parametrize(("how", "status"), [("exit", 0), ("exit3", 3)])
def test_exit_midway(backend: IsolatedBackend, crashing: Any, how: str, status: int) -> None:
    session = backend.prepare(crashing.SOURCE, crashing.options(run=how))
    with pytest.raises(SessionError, match=f"its process exited with status {status} while running unet"):
        session.run(crashing.FEEDS)
    crashing.goes_on(backend)


@pytest.mark.parametrize("when", ["prepare", "run"])
@pytest.mark.parametrize("how", ["hang", "hang with the interpreter lock"])
def test_hang(crashing: Any, how: str, when: str) -> None:
    with IsolatedBackend("crashing", target=crashing.TARGET, timeouts=QUICK) as backend:
        backend.devices()
        pid = backend.pid
        start = time.monotonic()
        with pytest.raises(
            SessionError, match=r"gave no sign of life for 1\.5 s while \w+ unet on device none"
        ):
            backend.prepare(crashing.SOURCE, crashing.options(**{when: how})).run(crashing.FEEDS)
        assert 1.4 < time.monotonic() - start < 10
        assert crashing.is_gone(pid)
        crashing.goes_on(backend)


@pytest.mark.parametrize("how", ["work", "work elsewhere"])
def test_compiling_for_longer_than_the_limit_is_no_hang(crashing: Any, how: str) -> None:
    """In the child, or in a compiler that it started: as long as processor time is used."""
    seen: list[Alive] = []
    with IsolatedBackend("crashing", target=crashing.TARGET, timeouts=QUICK, on_alive=seen.append) as backend:
        start = time.monotonic()
        session = backend.prepare(crashing.SOURCE, crashing.options(prepare=how))
        assert time.monotonic() - start > 2 * QUICK.prepare - 0.5
        assert len(seen) > 5
        assert {alive.doing for alive in seen} == {"preparing unet"}
        assert seen[-1].seconds > seen[0].seconds
        assert seen[-1].cpu_seconds > seen[0].cpu_seconds
        session.run(crashing.FEEDS)


@pytest.mark.parametrize("how", ["garbage", "flood"])
def test_noise_harms_nobody(backend: IsolatedBackend, crashing: Any, how: str) -> None:
    """Also more of it than a pipe holds."""
    session = backend.prepare(crashing.SOURCE, crashing.options(prepare=how, run=how))
    assert session.run(crashing.FEEDS)["out_sample"].shape == (1, 4, 8, 8)
    session.close()


def test_last_words_after_a_flood(backend: IsolatedBackend, crashing: Any) -> None:
    session = backend.prepare(crashing.SOURCE, crashing.options(prepare="flood", run="kill"))
    with pytest.raises(SessionError, match="it last wrote: ") as caught:
        session.run(crashing.FEEDS)
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
def test_errors_come_through(
    backend: IsolatedBackend, crashing: Any, how: str, kind: type[Exception], text: str
) -> None:
    session = backend.prepare(crashing.SOURCE, crashing.options(run=how))
    pid = backend.pid
    for _ in range(2):  # the child lives on, and so does the session
        with pytest.raises(kind, match=text) as caught:
            session.run(crashing.FEEDS)
        assert type(caught.value) is kind
        assert "misbehave" in str(caught.value.__cause__)
    assert backend.pid == pid


def test_logs_come_through(backend: IsolatedBackend, crashing: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend.prepare(crashing.SOURCE, crashing.options(prepare="log"))
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("engine", "WARNING", "the compiled model is thrown away")
    ]


def test_the_other_sessions_of_a_dead_child(backend: IsolatedBackend, crashing: Any) -> None:
    first = backend.prepare(crashing.SOURCE, crashing.options())
    second = backend.prepare(crashing.SOURCE, crashing.options(run="abort"))
    with pytest.raises(SessionError, match="SIGABRT"):
        second.run(crashing.FEEDS)
    crashing.goes_on(backend)
    with pytest.raises(SessionError, match=r"cannot go on running unet: .*SIGABRT.*Prepare it again"):
        first.run(crashing.FEEDS)
    first.close()
    second.close()
    crashing.goes_on(backend)


def test_two_children_at_once(crashing: Any) -> None:
    with (
        IsolatedBackend("crashing", target=crashing.TARGET) as one,
        IsolatedBackend("crashing", target=crashing.TARGET) as two,
    ):
        bad, good = (
            one.prepare(crashing.SOURCE, crashing.options(run="segfault")),
            two.prepare(crashing.SOURCE, crashing.options()),
        )
        assert one.pid != two.pid
        with pytest.raises(SessionError, match="SIGSEGV"):
            bad.run(crashing.FEEDS)
        assert good.run(crashing.FEEDS)["out_sample"].shape == (1, 4, 8, 8)


def test_threads_take_turns(backend: IsolatedBackend, crashing: Any) -> None:
    sessions = [backend.prepare(crashing.SOURCE, crashing.options()) for _ in range(3)]
    sizes: list[tuple[int, ...]] = []

    def work(index: int) -> None:
        for _ in range(20):
            feeds = dict(crashing.FEEDS, sample=np.zeros((1, 4, 8, 8 * (index + 1)), np.float32))
            sizes.append((index, sessions[index].run(feeds)["out_sample"].shape[-1]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sizes) == [(index, 8 * (index + 1)) for index in range(3) for _ in range(20)]


def test_devices_are_asked_for_in_the_child(crashing: Any) -> None:
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    assert [device.id for device in backend.devices()] == ["none"]
    assert backend.pid is None


def test_a_child_that_dies_while_listing_devices(crashing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHING_DEVICES", "abort")
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    assert backend.probe().available
    assert backend.devices() == ()
    found = backend.probe()
    assert not found.available
    assert "ended by SIGABRT" in found.reason
    assert "looking for devices" in found.reason


def test_unknown_backend_and_options_that_no_message_can_carry(crashing: Any) -> None:
    with pytest.raises(UsageError, match="no backend 'mystery'"):
        IsolatedBackend("mystery")
    backend = IsolatedBackend("crashing", target=crashing.TARGET)
    with pytest.raises(SessionError, match="numbers, texts and lists"):
        backend.prepare(crashing.SOURCE, PrepareOptions(extra={"callback": print}))
    assert backend.pid is None


def test_a_file_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "signal.py").write_text("raise RuntimeError('taken from the working directory')")
    monkeypatch.chdir(tmp_path)
    with IsolatedBackend("null") as backend:
        assert backend.devices()


def test_settings_say_that_it_is_isolated(backend: IsolatedBackend, crashing: Any) -> None:
    found: Any = backend.prepare(crashing.SOURCE, crashing.options()).in_force
    assert found.settings["isolated"] is True
    assert (found.backend, found.device) == ("null", "none")
