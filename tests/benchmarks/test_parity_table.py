"""The table of parity: rows of a real run, what a backend refuses, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiln.benchmarks import parity_table
from kiln.benchmarks.fidelity.limits import make_gate
from kiln.benchmarks.parity_table import TableRow, markdown

EMOJI = Path(__file__).parents[2] / "models/emoji"


def gates(psnr: float) -> tuple[object, ...]:
    return (
        make_gate("component", "unet", "relative_l2", 2e-6, "fp32"),
        make_gate("image", "image 1", "psnr_db", psnr, "fp32"),
    )


def test_a_missed_limit_is_told_below_the_table() -> None:
    good = TableRow("a fp32", gates(80.0), judged="fp32")  # type: ignore[arg-type]
    bad = TableRow("b fp32", gates(20.0), judged="fp32")  # type: ignore[arg-type]
    assert not good.failed
    text = markdown([good, bad])
    assert "| a fp32 |  | 2e-06 |" in text
    assert "80.0 |" in text
    assert "fp32: held" in text
    assert "fp32: missed" in text
    assert "* b fp32: image image 1, psnr_db 20.0, limit 50.0" in text


def test_a_run_with_a_row_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    asked = ["--backend", "onnxruntime", "--reference", "openvino", "--steps", "2", "--prompts", "1"]
    code = parity_table.main([str(EMOJI), *asked, "--precision", "fp32", "--precision", "bf16"])
    out = capsys.readouterr().out
    assert code == 0
    assert "reference: emoji on openvino fp32" in out
    assert "| onnxruntime fp32 |" in out
    assert "* onnxruntime bf16: parity, replay: ONNX Runtime computes in fp32" in out


def test_what_is_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity_table.main([str(tmp_path)]) == 1
    assert "is not a bundle" in capsys.readouterr().err
