"""The contract of all backends, on the providers that need hardware, with a stand-in for their engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONTRACT = [str(HERE.parent / f"contract/test_backend_{part}.py") for part in ("contract", "cache")]

DYNAMIC = "onnxruntime-cuda or onnxruntime-openvino"
# What does not hold for engines that compile for fixed shapes, and what the contract says of engines that
# keep no files of their own; test_onnxruntime_providers.py and _engine_cache.py have the opposite of both.
STATIC = "(onnxruntime-webgpu or onnxruntime-tensorrt or onnxruntime-migraphx)"
EXCEPT = "not dynamic and not one_input_fixed and not batches and not second_time"


@pytest.mark.parametrize(("words", "least"), [(DYNAMIC, 60), (f"{STATIC} and {EXCEPT}", 75)])
def test_contract(words: str, least: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fakes_onnxruntime", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", f"--basetemp={tmp_path}", "-k", words, *CONTRACT]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    [passed] = re.findall(r"(\d+) passed", run.stdout)
    assert int(passed) >= least, run.stdout
