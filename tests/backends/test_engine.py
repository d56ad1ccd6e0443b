"""Probing and importing engines."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from kiln.backends import engine, registry
from kiln.backends.device_report import list_devices
from kiln.backends.engine import Engine, parse_version
from kiln.errors import BackendUnavailable


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an importable module ``kiln_fake_engine``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engine, "_failures", {})
    path = tmp_path / "kiln_fake_engine.py"
    path.write_text("answer = 42\n")
    yield path
    sys.modules.pop("kiln_fake_engine", None)


FAKE = Engine("kiln_fake_engine", ("numpy",), (1,), "cpu")


def test_probe_does_not_import(module: Path) -> None:
    found = FAKE.probe()
    assert found.available
    assert found.version == importlib.metadata.version("numpy")
    assert "kiln_fake_engine" not in sys.modules
    assert FAKE.load().answer == 42


def test_missing(module: Path) -> None:
    missing = Engine("kiln_no_such_engine", ("nothing",), (1,), "cpu")
    assert not missing.probe().available
    with pytest.raises(BackendUnavailable, match=r"not installed: pip install 'kiln-diffusion\[cpu\]'"):
        missing.load()


def test_too_old(module: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"is too old, Kiln needs 9999\.1 or newer"):
        Engine("kiln_fake_engine", ("numpy",), (9999, 1), "cpu").load()


@pytest.mark.parametrize("how", ["raise OSError('libfoo.so.1: cannot open\\nshared object')", "1 / 0"])
def test_broken_is_remembered(module: Path, how: str) -> None:
    module.write_text(how)
    assert FAKE.probe().available
    with pytest.raises(BackendUnavailable, match="is installed but does not load") as caught:
        FAKE.load()
    assert "\n" not in str(caught.value)
    assert not FAKE.probe().available
    assert FAKE.probe().reason == str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2026.4.1-22982-e213", (2026, 4, 1)), ("1.24.0", (1, 24, 0)), ("2.13.0+cpu", (2, 13, 0)), ("", ())],
)
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert parse_version(text) == expected


def test_device_report() -> None:
    rows = list_devices()
    assert {row.backend for row in rows} == set(registry.names())
    for row in rows:
        assert row.available == (not row.reason) == bool(row.device)
        assert not row.available or (row.name and row.precisions and row.version)


def test_device_report_of_a_broken_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine, "_failures", {"onnxruntime": "onnxruntime is installed but does not load: gone"}
    )
    [row] = [row for row in list_devices() if row.backend == "onnxruntime"]
    assert not row.available
    assert "gone" in row.reason
