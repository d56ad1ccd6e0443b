"""The public names are there, are documented, and cost no engine to import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kiln import api, errors

ROOT = Path(__file__).resolve().parent.parent
HEAVY = [
    "accelerate",
    "diffusers",
    "onnx",
    "onnxruntime",
    "openvino",
    "optimum",
    "peft",
    "torch",
    "transformers",
]

LOADED = """
import json, sys
exec(sys.argv[1])
print(json.dumps(sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))
"""


def loaded_by(statement: str, names: list[str]) -> list[str]:
    """Which of the packages a statement loads in a fresh interpreter."""
    command = [sys.executable, "-c", LOADED, statement, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_names_are_there_and_sorted() -> None:
    assert [name for name in api.__all__ if not hasattr(api, name)] == []
    # Constants, classes, functions: the order that ruff gives __all__.
    kinds = [(not n.isupper(), not n[0].isupper(), n) for n in api.__all__]
    assert kinds == sorted(kinds)
    assert len(set(api.__all__)) == len(api.__all__)


def test_nothing_public_is_left_out_of_all() -> None:
    public = {n for n in vars(api) if not n.startswith("_")} - {"annotations", "Any", "Iterable"}
    modules = {"backends", "bundle", "errors", "exporters", "runtime"}
    assert public - modules == set(api.__all__)


@pytest.mark.parametrize("name", [n for n in api.__all__ if n not in ("DEFAULT_MODEL", "Event")])
def test_every_name_is_documented(name: str) -> None:
    text = getattr(api, name).__doc__ or ""
    # A dataclass without a docstring is given its signature for one.
    assert text.strip()
    assert not text.startswith(f"{name}(")


def test_every_error_is_public() -> None:
    tree = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.KilnError)}
    assert tree <= set(api.__all__)


def test_the_page_speaks_of_public_names_only() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    imported = re.findall(r"^from kiln\.api import (.+)$", text, re.MULTILINE)
    names = {name for line in imported for name in line.split(", ")}
    assert names <= set(api.__all__)
    assert len(names) > 15


def test_importing_it_loads_no_engine() -> None:
    assert loaded_by("import kiln.api", HEAVY) == []


def test_a_statement_that_loads_one_is_found() -> None:
    pytest.importorskip("onnx")
    assert "onnx" in loaded_by("import kiln.api, onnx", HEAVY)


def test_generate_gives_every_image_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if api.DEFAULT_MODEL not in api.bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    settings = api.Settings(backend="null", cache=False)
    ready = api.generate("red apple", settings=settings, steps=2, seed=5, count=3, batch_size=2)
    assert [event.record.seed for event in ready] == [5, 6, 7]
    assert [event.image.shape for event in ready] == [(64, 64, 3)] * 3
    assert {event.image.dtype for event in ready} == {np.dtype(np.uint8)}


def test_generate_refuses_what_a_request_refuses() -> None:
    with pytest.raises(api.UsageError, match="width 65"):
        api.generate("red apple", width=65)
    with pytest.raises(api.UsageError, match="no-such-model"):
        api.generate("red apple", "no-such-model")
    with pytest.raises(api.UsageError, match="cannot read the adapter"):
        api.generate("red apple", adapters=["a.safetensors:strong"])
