"""Finding backends by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kiln.backends import registry
from kiln.backends.base import Availability, Device
from kiln.errors import BackendUnavailable, UsageError


class Fake:
    """A backend that says what it is told to."""

    def __init__(self, name: str, available: bool, devices: int = 1, later: str = "") -> None:
        self.name = name
        self._available = available
        self._devices = devices
        self._later = later
        self._asked = False

    def probe(self) -> Availability:
        if self._asked and self._later:
            return Availability(False, self._later)
        return Availability(self._available, "" if self._available else f"no {self.name} here")

    def devices(self) -> tuple[Device, ...]:
        self._asked = True
        return (Device("x", "x", ("fp32",)),) * self._devices


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Backends of these tests in place of the real ones."""
    found: dict[str, Fake] = {}
    monkeypatch.setattr(registry, "get_backend", lambda name: found.get(name) or Fake(name, False))
    return found


def test_known_names() -> None:
    assert registry.names() == (
        "null",
        "torch",
        "openvino",
        "onnxruntime",
        "onnxruntime-cuda",
        "onnxruntime-tensorrt",
        "onnxruntime-migraphx",
        "onnxruntime-openvino",
        "onnxruntime-webgpu",
    )
    for name in registry.names():
        assert registry.get_backend(name).name == name
    assert set(registry.probe_all()) == set(registry.names())
    assert {entry.split(":")[0] for entry in registry.AUTO_ORDER} < set(registry.names())


def test_unknown_name() -> None:
    with pytest.raises(
        UsageError, match=r"no backend 'tensorflow'; known are auto, null, onnxruntime, .*openvino, torch"
    ):
        registry.get_backend("tensorflow")


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", {})
    registry.register("mine", "somewhere.mine:Backend")
    assert registry.names() == ("mine",)
    with pytest.raises(UsageError, match=r"already registered as somewhere\.mine:Backend"):
        registry.register("mine", "elsewhere:Backend")


@pytest.mark.parametrize(
    ("name", "target"), [("auto", "a:b"), ("A b", "a:b"), ("x", "no colon"), ("", "a:b")]
)
def test_register_refuses(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", {})
    with pytest.raises(UsageError):
        registry.register(name, target)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", ("auto", "auto")),
        ("openvino", ("openvino", "auto")),
        ("openvino:CPU", ("openvino", "CPU")),
        ("onnxruntime:cpu:0", ("onnxruntime", "cpu:0")),
    ],
)
def test_parse(text: str, expected: tuple[str, str]) -> None:
    assert registry.parse_backend(text) == expected


@pytest.mark.parametrize("text", ["", "openvino:", "auto:CPU", "nobody", "nobody:CPU", ":CPU"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        registry.parse_backend(text)


def test_a_named_backend_never_falls_back(fakes: dict[str, Fake]) -> None:
    fakes.update(
        openvino=Fake("openvino", False), onnxruntime=Fake("onnxruntime", True), torch=Fake("torch", True)
    )
    with pytest.raises(BackendUnavailable, match="the backend openvino cannot be used: no openvino here"):
        registry.require_usable(registry.get_backend("openvino"))


def test_no_engine_is_imported() -> None:
    """Neither by importing the package and the registry, nor by probing."""
    code = """
import sys
import kiln.backends, kiln.backends.registry as registry, kiln.backends.device_report
engines = {"torch", "diffusers", "transformers", "openvino", "onnxruntime", "onnx"}
assert not engines & set(sys.modules), engines & set(sys.modules)
registry.probe_all()
assert not engines & set(sys.modules), engines & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
