"""The harness's side of the wire, against small programs that misbehave."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kiln.benchmarks.harness.process import Limits, Worker, WorkerError

ROOT = Path(__file__).parents[3]
LOAD = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("wire", {str(ROOT / "benchmarks/harness/wire.py")!r})
wire = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)
"""
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def worker(program: str, **options: object) -> Worker:
    return Worker([sys.executable, "-c", LOAD + program], ENVIRONMENT, **options)  # type: ignore[arg-type]


SERVE = """
answers = wire.Answers()
answers.ready(engine="none")
def fail(): raise ValueError("a reason\\nof two lines")
def key(): return {}["shape"]
answers.serve({"load": lambda: {"seconds": 2.0}, "fail": fail, "key": key})
"""


def test_a_request_is_answered() -> None:
    with worker(SERVE) as found:
        ready = found.ready()
        assert ready["facts"] == {"engine": "none"}
        assert ready["imports"] > 0
        assert found.ask("load") == {"kind": "done", "seconds": 2.0}


def test_an_error_is_one_line_and_the_worker_lives_on() -> None:
    with worker(SERVE) as found:
        found.ready()
        with pytest.raises(WorkerError, match=r"^a reason of two lines$"):
            found.ask("fail")
        with pytest.raises(WorkerError, match=r"^KeyError: .shape.$"):
            found.ask("key")
        with pytest.raises(WorkerError, match="nothing"):
            found.ask("nothing")
        assert found.ask("load")["seconds"] == 2.0


def test_what_an_engine_prints_breaks_no_line() -> None:
    program = "answers = wire.Answers()\nprint('hello'); os.system('echo from C')\n" + SERVE.split("\n", 2)[2]
    with worker(program) as found:
        assert found.ready()["kind"] == "ready"
        assert found.ask("load")["kind"] == "done"


def test_a_log_is_shown_and_is_no_answer() -> None:
    said: list[str] = []
    program = "a = wire.Answers(); a.send({'kind': 'log', 'text': 'step 1'}); a.ready(); a.serve({})"
    with worker(program, log=said.append) as found:
        found.ready()
    assert said == ["step 1"]


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("sys.exit('no such engine')", "ended with exit code 1 during start: no such engine"),
        ("raise ImportError('no torch here')", "during start: ImportError: no torch here"),
        ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV during start"),
        ("print('plain text', flush=True); time.sleep(600)", "wrote b'plain text"),
        ("wire.Answers().send({'kind': 'done'}); time.sleep(600)", "answered start with 'done'"),
    ],
)
def test_how_it_ended_is_said(program: str, text: str) -> None:
    with worker(program) as found, pytest.raises(WorkerError) as caught:
        found.ready()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerError, match="cannot start /no/such/python: No such file"):
        Worker(["/no/such/python"], ENVIRONMENT)


def test_a_worker_that_sleeps_is_given_up() -> None:
    with worker("time.sleep(600)", limits=Limits(idle_s=1.0, total_s=600.0)) as found:
        with pytest.raises(WorkerError, match=r"the process hung: no answer to start in \d+ s"):
            found.ready()
        assert found._process.poll() is not None


def test_a_worker_that_works_without_end_is_given_up_too() -> None:
    limits = Limits(idle_s=600.0, total_s=1.0)
    with (
        worker("while True: pass", limits=limits) as found,
        pytest.raises(WorkerError, match="gave no answer to start within 1 s; 1 s are the limit"),
    ):
        found.ready()


def test_while_the_harness_is_stopped_no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypervisor or a debugger stops all processes for minutes; the clock goes on."""
    calls = itertools.count()

    def jumps() -> float:
        return time.monotonic() + (1000.0 if next(calls) > 3 else 0.0)

    clock = SimpleNamespace(monotonic=jumps, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr("kiln.benchmarks.harness.process.time", clock)
    limits = Limits(idle_s=20.0, total_s=60.0)
    with worker("time.sleep(1)\n" + SERVE, limits=limits) as found:
        assert found.ready()["kind"] == "ready"
    assert next(calls) > 4


def test_what_it_started_ends_with_it() -> None:
    program = "import subprocess\nsubprocess.Popen(['sleep', '600'])\n" + SERVE
    with worker(program) as found:
        found.ready()
        session = found.pid
    for _ in range(300):  # a process that is killed is gone a moment later
        left = [p for p in Path("/proc").glob("[0-9]*/stat") if _session(p) == session and not _is_dead(p)]
        if not left:
            return
        time.sleep(0.1)
    assert left == []


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _session(path: Path) -> int | None:
    fields = _fields(path)
    return int(fields[3]) if fields else None


def _is_dead(path: Path) -> bool:
    fields = _fields(path)
    return not fields or fields[0] in "ZX"
