"""Questions to child processes: engines that abort, hang, write to stdout or raise do not harm the parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kiln.backends.doctor.child import MARK, VERBS, _nodes
from kiln.backends.doctor.children import ask_child, asker, run_child
from kiln.backends.doctor.system import Answer

ANSWER = f'print({MARK!r} + \'{{"status": "ok", "text": "", "value": {{"x": 1}}}}\', flush=True)'


@pytest.mark.parametrize(
    ("program", "status", "says"),
    [
        ("import os; os.abort()", "crash", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crash", "SIGSEGV"),
        (
            "import sys; print('HIP error 700', file=sys.stderr); sys.exit(3)",
            "crash",
            "code 3 and no answer. HIP",
        ),
        ("print('noise')", "crash", "code 0 and no answer"),
        ("import time; time.sleep(60)", "timeout", "no answer within 1 s"),
        ("raise SystemExit('bye')", "crash", "bye"),
        (f"import os; print('noise'); {ANSWER}; print('more'); os.abort()", "ok", ""),
        (f"import os; os.write(1, b'\\xff\\xfe no text \\n'); {ANSWER}", "ok", ""),
    ],
)
def test_whatever_a_child_does_is_an_answer(program: str, status: str, says: str) -> None:
    answer = run_child(program, [], 1 if "sleep" in program else 30)
    assert answer.status == status
    assert says in answer.text
    assert answer.value == ({"x": 1} if status == "ok" else {})


def test_a_child_that_hangs_takes_its_own_children_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    program = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(note)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    assert run_child(program, [], 2).status == "timeout"
    assert time.monotonic() - started < 30
    pid = int(note.read_text())
    for _ in range(100):  # until its new parent has collected it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 0)
    pytest.fail("the grandchild still runs")


def module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("import os; os.abort()", "crash", "SIGABRT"),
        ("raise ImportError('libopenvino.so: cannot open\\n  shared object')", "error", "cannot open shared"),
        ("raise KeyError('odd')", "error", "odd"),
        ("import time; time.sleep(60)", "timeout", "within 1.5 s"),
    ],
)
def test_an_engine_that_breaks_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: str, says: str
) -> None:
    module(tmp_path, "openvino", text, monkeypatch)
    answer = ask_child(("openvino-list",), 1.5 if "sleep" in text else 30)
    assert (answer.status, answer.value) == (status, {})
    assert says in answer.text


def test_libraries() -> None:
    ask = asker(30)
    assert ask(("dlopen", "libc.so.6")) == Answer("ok")
    missing = ask(("dlopen", "libkiln-has-none.so.1"))
    assert missing.status == "error"
    assert "libkiln-has-none.so.1: cannot open shared object file" in missing.text
    assert "is missing" in ask(("dlopen-provider", "/nowhere/libonnxruntime_providers_cuda.so")).text


def test_a_question_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = asker(30)
    first = ask(("dlopen", "libc.so.6"))
    monkeypatch.setattr(subprocess, "Popen", None)
    assert ask(("dlopen", "libc.so.6")) is first


def test_an_unknown_verb_is_an_error_of_ours() -> None:
    assert ask_child(("no-such-verb",), 30) == Answer("error", "'no-such-verb'")
    assert "dlopen" in VERBS


def test_the_working_directory_is_not_on_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert ask_child(("dlopen", "libc.so.6"), 30).ok


def test_where_nodes_ran_is_read_from_the_profile() -> None:
    rows = [
        ("Session", "model_run", None),
        ("Node", "MGXKernel_graph_1_0_kernel_time", "MIGraphXExecutionProvider"),
        ("Node", "Cast_1_kernel_time", "CPUExecutionProvider"),
        ("Node", "Cast_1_fence_before", "CPUExecutionProvider"),
        ("Node", "Cast_2_kernel_time", "CPUExecutionProvider"),
    ]
    profile = json.dumps(
        [{"cat": cat, "name": name, "args": {"provider": p} if p else {}} for cat, name, p in rows]
    )
    assert _nodes(profile) == {"MIGraphXExecutionProvider": 1, "CPUExecutionProvider": 2}


def test_onnxruntime_says_which_provider_ran() -> None:
    pytest.importorskip("onnxruntime")
    answer = ask_child(("onnxruntime-run", "CPUExecutionProvider", "fp32"), 120)
    assert answer.ok, answer.text
    assert answer.value["providers"] == ["CPUExecutionProvider"]
    assert answer.value["on_provider"] is True
    nodes = answer.value["nodes"]
    assert isinstance(nodes, dict)
    assert sum(nodes.values()) > 15


def test_onnxruntime_that_falls_back_is_caught() -> None:
    # The real engine: it takes a provider that it does not have, warns, and computes on the processor.
    pytest.importorskip("onnxruntime")
    answer = ask_child(("onnxruntime-run", "MIGraphXExecutionProvider", "fp32"), 120)
    assert answer.ok, answer.text
    assert answer.value["providers"] == ["CPUExecutionProvider"]
    assert answer.value["on_provider"] is False


def test_openvino_reads_back_device_and_precision() -> None:
    pytest.importorskip("openvino")
    answer = ask_child(("openvino-run", "CPU", "fp32"), 120)
    assert answer.ok, answer.text
    assert (answer.value["providers"], answer.value["precision"]) == (["CPU"], "f32")
    refused = ask_child(("openvino-run", "NPU", "fp32"), 120)
    assert refused.status in ("error", "crash")


def test_no_engine_is_imported_for_a_question_about_a_library() -> None:
    program = (
        "import sys; from kiln.backends.doctor import child; child.main(['dlopen', 'libc.so.6']);"
        "print([n for n in ('numpy', 'onnx', 'onnxruntime', 'openvino', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
