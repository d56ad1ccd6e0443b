"""``kiln doctor`` as a command: its exit codes, its two outputs, what it refuses, and this very machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kiln.backends.doctor.here import FACTS
from kiln.commands.doctor import doctor
from kiln.errors import UsageError

RIGHT = {"shape_right": True, "finite": True, "cosine": 1.0, "relative_l2": 0.0}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(doctor, [str(word) for word in words])


def write(root: Path, **facts: Any) -> Path:
    """A machine with a processor, memory and a disk, and the facts given."""
    flags = "fpu avx2 fma f16c avx512f avx512_vnni avx512_bf16"
    files = {
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: Test\nflags\t\t: {flags}\n",
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        FACTS: json.dumps({"python": [3, 12, 1], "disk": {"free": 10**12, "type": "ext4"}} | facts),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def openvino(comparison: dict[str, Any]) -> dict[str, Any]:
    """The answers of an OpenVINO whose processor plugin computes this."""
    ran = {"providers": ["CPU"], "on_provider": True, "comparison": comparison, "precision": "bf16"}
    values: dict[str, Any] = {
        "openvino-list": {"version": "2026.4.1", "devices": {"CPU": {}}},
        "openvino-run CPU fp32": ran,
        "openvino-run CPU half": ran,
        "kiln-devices": {"rows": [{"backend": "openvino", "device": "CPU", "available": True, "reason": ""}]},
    }
    return {question: {"status": "ok", "value": value} for question, value in values.items()}


def test_exit_0_when_all_is_in_order(tmp_path: Path) -> None:
    root = write(tmp_path, distributions={"openvino": "2026.4.1"}, answers=openvino(RIGHT))
    result = run("--sysroot", root)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Works: openvino:CPU. 0 failures, 0 warnings." in result.stdout


def test_exit_1_for_something_to_mend(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"distributions": {"openvino": "2026.4.1"}, "answers": openvino(RIGHT)}
    result = run("--sysroot", write(tmp_path, **facts, write_error="Read-only file system"))
    assert result.exit_code == 1
    assert "1 failure, 0 warnings" in result.stdout
    assert "$ export KILN_CACHE=" in result.stdout


def test_exit_2_when_no_backend_works(tmp_path: Path) -> None:
    wrong = RIGHT | {"finite": False}
    facts: dict[str, Any] = {"distributions": {"openvino": "2026.4.1"}, "answers": openvino(wrong)}
    result = run("--sysroot", write(tmp_path, **facts))
    assert result.exit_code == 2
    assert "No backend works here." in result.stdout
    assert "NaN" in result.stdout


def test_files_alone_cannot_say_that_nothing_works(tmp_path: Path) -> None:
    result = run("--sysroot", write(tmp_path), "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["exit_code"]) == (0, 0)
    assert (document["live"], document["engines"], document["usable"]) == (False, [], [])


def test_refused(tmp_path: Path) -> None:
    for words, says in (
        (["--sysroot", tmp_path / "nowhere"], "no folder"),
        (["--timeout", "0"], "more than 0"),
        (["--timeout", "nan"], "more than 0"),
    ):
        result = run(*words)
        assert isinstance(result.exception, UsageError)
        assert says in str(result.exception)
        assert result.stdout == ""


def test_this_machine_has_engines_that_compute_what_numpy_does() -> None:
    # Live: whatever is installed here is started, and the processor's engines have to be right.
    pytest.importorskip("onnxruntime")
    result = run("--json", "--timeout", "120")
    document = json.loads(result.stdout)
    assert result.exit_code in (0, 1), [f for f in document["findings"] if f["verdict"] == "failure"]
    assert document["live"]
    assert "onnxruntime" in document["usable"]
    processor = [row for row in document["engines"] if row["backend"].endswith(("CPU", "cpu", "onnxruntime"))]
    assert [row["backend"] for row in processor if not row["works"]] == []
    assert [f for f in document["findings"] if f["id"] == "D-DOCTOR"] == []
