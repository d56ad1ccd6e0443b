"""Importing Kiln, and asking it for help or a picture, loads none of the heavy packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ["onnxruntime", "openvino"]
# Run by the Pythons of other projects, each for its own; nothing of Kiln imports them.
WORKERS = "kiln.benchmarks.peers.workers"
HEAVY = ["accelerate", "diffusers", "lycoris", "onnxscript", "optimum", "peft", "torch", "transformers"]

# Imports the modules named in order and prints {module: [what it is the first to load]}.
IMPORT_ALL = """
import importlib, json, sys
modules, unwanted = json.loads(sys.argv[1])
blame, seen = {}, set()
for module in modules:
    importlib.import_module(module)
    new = sorted(set(unwanted) & set(sys.modules) - seen)
    seen.update(new)
    if new:
        blame[module] = new
print(json.dumps(blame))
"""

# Runs the command line and prints which of the unwanted packages were loaded on the way.
RUN_COMMAND = """
import json, sys
unwanted, sys.argv = json.loads(sys.argv[1]), ["kiln", *sys.argv[2:]]
from kiln.cli import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print()
print(json.dumps([code, sorted(set(unwanted) & set(sys.modules))]))
"""


def in_new_python(script: str, *arguments: str, folder: Path | None = None) -> str:
    """Run a script in a fresh interpreter, with ``folder`` on its path; its last line of output."""
    environment = dict(os.environ)
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def first_loaders(
    modules: list[str], unwanted: list[str], folder: Path | None = None
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(
        in_new_python(IMPORT_ALL, json.dumps([modules, unwanted]), folder=folder)
    )
    return found


def all_modules() -> list[str]:
    """Every module of the package by its dotted name, packages before what is in them."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = []
    for package in sorted(set(packages) - {WORKERS}):
        files = ROOT.joinpath(*package.split(".")[1:]).glob("*.py")
        found += [package, *(f"{package}.{f.stem}" for f in files if f.stem not in {"__init__", "__main__"})]
    return sorted(found)


def test_no_module_loads_a_heavy_package() -> None:
    assert first_loaders(all_modules(), [*HEAVY, *ENGINES, WORKERS]) == {}


def test_a_module_that_does_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (tmp_path / "innocent.py").write_text("import json\n")
    (tmp_path / "planted.py").write_text("import torch\n")
    found = first_loaders(["innocent", "planted"], HEAVY + ENGINES, folder=tmp_path)
    assert found == {"planted": ["torch"]}


def test_root_module_loads_nothing() -> None:
    script = "import sys; before = set(sys.modules); import kiln; print(sorted(set(sys.modules) - before))"
    assert in_new_python(script) == "['kiln']"


def test_help_loads_no_heavy_package() -> None:
    assert json.loads(in_new_python(RUN_COMMAND, json.dumps(HEAVY + ENGINES), "--help")) == [0, []]


def test_a_picture_of_the_bundled_model_needs_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="no engine: install the cpu extra")
    arguments = ["generate", "red apple", "--steps", "2", "-o", str(tmp_path / "apple.png")]
    assert json.loads(in_new_python(RUN_COMMAND, json.dumps(HEAVY), *arguments)) == [0, []]
    assert (tmp_path / "apple.png").stat().st_size > 0
