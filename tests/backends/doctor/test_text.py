"""How a diagnosis reads: in 80 columns, without colours when piped, and as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from kiln.backends.doctor.diagnosis import Diagnosis
from kiln.backends.doctor.text import print_diagnosis


def troubled(m: Any) -> Diagnosis:
    """A Radeon with everything wrong at once."""
    library = "libmigraphx_c.so.3"
    m.amd("gfx1031", vram=2).amd("gfx1103", gtt=30).migraphx().groups().torch_cpu()
    return m.library_lacks("MIGraphXExecutionProvider", library).fact(write_error="Read-only").diagnose()


def printed(diagnosis: Diagnosis, width: int = 80, terminal: bool = False, verbose: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, highlight=False)
    print_diagnosis(diagnosis, console, verbose)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 72])
def test_lines_fit_the_terminal_and_nothing_is_lost(machine: Any, width: int) -> None:
    diagnosis = troubled(machine)
    text = printed(diagnosis, width, verbose=True)
    wide = [line for line in text.splitlines() if len(line) > width]
    # What is to be copied stays in one piece: a command, a path.
    assert [line for line in wide if not line.strip().startswith("$ ") and " " in line.strip()] == []
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    flat = "".join(text.split())
    for finding in diagnosis.findings:
        for part in (finding.id, finding.summary, *finding.evidence, *finding.fix):
            assert "".join(part.split()) in flat


def test_piped_text_has_no_escapes_and_a_terminals_has(machine: Any) -> None:
    diagnosis = troubled(machine)
    assert "\x1b" not in printed(diagnosis)
    assert "\x1b" in printed(diagnosis, terminal=True)


def test_what_to_mend_comes_with_the_line_to_type(machine: Any) -> None:
    diagnosis = troubled(machine)
    text = printed(diagnosis)
    assert text.index("failure D-AMD-PERM") < text.index("warning D-AMD-GFX") < text.index("ok      D-PY")
    assert "$ newgrp render" in text
    assert "> Log out and in again, or restart." in text
    assert "D-NV-DRV" not in text.split()  # what does not apply is shown only with -v
    assert "- " + "      D-NV-DRV" in printed(diagnosis, verbose=True)
    assert text.rstrip().endswith("warnings.")
    assert "Works: onnxruntime, torch:cpu." in text


def test_the_engines_come_first(machine: Any) -> None:
    lines = printed(machine.openvino().diagnose()).splitlines()
    assert lines[0].split() == ["backend", "engine", "works", "fp32", "half"]
    assert lines[1].split() == ["openvino:CPU", "openvino", "2026.4.1", "yes", "1.00000", "1.00000"]


def test_the_last_line_says_when_nothing_works_or_nothing_was_run(machine: Any) -> None:
    assert "No backend works here." in printed(machine.diagnose())
    machine.fact(answers=None)
    text = printed(machine.diagnose())
    assert "No engine was started." in text
    assert "nothing was run" in text


def test_json_holds_everything(machine: Any) -> None:
    diagnosis = troubled(machine)
    document = json.loads(json.dumps(diagnosis.as_document()))
    assert document["exit_code"] == 1
    assert document["usable"] == ["onnxruntime", "torch:cpu"]
    assert {row["backend"]: row["works"] for row in document["engines"]} == {
        "onnxruntime-migraphx": False,
        "onnxruntime": True,
        "torch:cpu": True,
    }
    assert len(document["findings"]) == len(diagnosis.findings)
    assert set(document["findings"][0]) == {"id", "verdict", "summary", "evidence", "fix"}
    assert {f["verdict"] for f in document["findings"]} == {"ok", "warning", "failure", "not applicable"}
