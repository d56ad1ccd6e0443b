"""OpenVINO on Intel's graphics and NPUs, against a stand-in for its API: such hardware was not there.

The stand-in has the methods and properties that the backend uses, with the values that OpenVINO's
documentation gives for these devices. That the plugins themselves behave so is not shown here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_backend
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.openvino_compile import Compiled
from kiln.errors import BackendUnavailable, SessionError

CAPABILITIES = {
    "CPU": ["FP32", "INT8", "BIN", "EXPORT_IMPORT"],
    "GPU": ["FP32", "BIN", "FP16", "INT8", "GPU_HW_MATMUL", "EXPORT_IMPORT"],
    "NPU": ["FP16", "INT8", "EXPORT_IMPORT"],
}
SHAPES = {"sample": (2, 4, 8, 12), "timestep": (), "encoder_hidden_states": (2, 7, 32)}


class FakeModel:
    """A compiled model that gives zeros and reports what it was compiled with."""

    def __init__(self, device: str, properties: dict[str, Any], executed: list[str]) -> None:
        self.device, self.properties, self.executed = device, properties, executed
        ports = {
            "sample": SHAPES["sample"],
            "timestep": (),
            "encoder_hidden_states": SHAPES["encoder_hidden_states"],
        }
        self.inputs = [self._port(name, shape) for name, shape in ports.items()]
        self.outputs = [self._port("out_sample", SHAPES["sample"])]

    def _port(self, name: str, shape: tuple[int, ...]) -> Any:
        axes = [SimpleNamespace(is_static=True, get_length=lambda n=n: n) for n in shape]
        return SimpleNamespace(any_name=name, partial_shape=axes, get_names=lambda: {name})

    def get_property(self, name: str) -> Any:
        if name == "EXECUTION_DEVICES":
            return self.executed
        if name == "SUPPORTED_PROPERTIES":
            return {
                "PERFORMANCE_HINT": "RO",
                "COMPILATION_NUM_THREADS": "RO",
                "INFERENCE_PRECISION_HINT": "RO",
            }
        if name == "COMPILATION_NUM_THREADS":
            return self.properties.get(name, 2)
        return self.properties[name]

    def create_infer_request(self) -> Any:
        zeros = np.zeros(SHAPES["sample"], np.float32)
        return SimpleNamespace(infer=lambda *args, **kwargs: {0: zeros})


class FakeCore:
    """Two graphics cards and an NPU; ``executed`` overrides where models end."""

    def __init__(self, devices: tuple[str, ...], executed: list[str] | None = None) -> None:
        self.available_devices = list(devices)
        self.executed = executed
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    def get_property(self, device: str, name: str) -> Any:
        kind = device.partition(".")[0]
        return CAPABILITIES[kind] if name == "OPTIMIZATION_CAPABILITIES" else f"Intel {device}"

    def compile(self, device: str, properties: dict[str, Any]) -> FakeModel:
        self.compiled.append((device, properties))
        first = next((d for d in self.available_devices if d.startswith(device)), device)
        return FakeModel(device, properties, self.executed or [first])


@pytest.fixture
def source(tmp_path: Any) -> GraphSource:
    return GraphSource("unet", tmp_path / "model.onnx", tmp_path / "w", {"block_out_channels": [4]}, "x")


def with_core(monkeypatch: pytest.MonkeyPatch, made: FakeCore) -> FakeCore:
    monkeypatch.setattr(openvino_backend, "core", lambda: made)
    monkeypatch.setattr(openvino_backend, "version", lambda: "2026.4.1-fake")

    def compiled_model(core: FakeCore, plan: Any) -> Compiled:
        return Compiled(core.compile(plan.device, plan.properties))

    monkeypatch.setattr(openvino_backend, "compiled_model", compiled_model)
    return made


BACKEND = openvino_backend.OpenVINOBackend()
ALL = ("CPU", "GPU.0", "GPU.1", "NPU")


def test_devices_with_what_they_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with_core(monkeypatch, FakeCore(("CPU", "GPU.0", "GPU.1", "NPU", "BATCH")))
    assert {d.id: d.precisions for d in BACKEND.devices()} == {
        "CPU": ("fp32",),
        "GPU.0": ("fp16", "fp32"),
        "GPU.1": ("fp16", "fp32"),
        "NPU": ("fp16",),
    }
    assert BACKEND.devices()[1].name == "Intel GPU.0"


@pytest.mark.parametrize(
    ("asked", "component", "device", "precision"),
    [
        ("auto", "unet", "CPU", "fp32"),
        ("gpu", "unet", "GPU", "fp16"),
        ("GPU.1", "unet", "GPU.1", "fp16"),
        ("GPU", "vae_decoder", "GPU", "fp32"),  # fp16 gives black images there
        ("NPU", "unet", "NPU", "fp16"),
    ],
)
def test_what_is_asked_of_a_device(
    source: GraphSource,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    component: str,
    device: str,
    precision: str,
) -> None:
    made = with_core(monkeypatch, FakeCore(ALL))
    monkeypatch.setattr(
        openvino_backend, "OpenVINOSession", lambda *args, **kwargs: SimpleNamespace(in_force=args[1])
    )
    shapes = SHAPES if component == "unet" else {"latent_sample": (1, 4, 8, 8)}
    chosen = GraphSource(component, source.graph_path, source.weights_path, {}, "x")
    in_force = BACKEND.prepare(chosen, PrepareOptions(shapes, device=asked)).in_force
    [(compiled_for, properties)] = made.compiled
    assert compiled_for == device
    assert in_force.precision == precision
    assert properties["PERFORMANCE_HINT"] == "LATENCY"
    assert properties["INFERENCE_PRECISION_HINT"] == {"fp32": "f32", "fp16": "f16"}[precision]
    kind = device.partition(".")[0]
    assert ("NUM_STREAMS" in properties) == (kind != "NPU")
    mode = {"fp32": "ACCURACY", "fp16": "PERFORMANCE"}[precision]
    assert properties.get("EXECUTION_MODE_HINT") == (mode if kind == "GPU" else None)
    assert in_force.provider == {"CPU": "CPU", "GPU": "GPU.0", "GPU.1": "GPU.1", "NPU": "NPU"}[device]
    assert in_force.settings["PERFORMANCE_HINT"] == "LATENCY"


def test_a_session_of_such_a_device_runs(source: GraphSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with_core(monkeypatch, FakeCore(ALL))
    session = BACKEND.prepare(source, PrepareOptions(SHAPES, device="GPU", threads=3))
    out = session.run({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})["out_sample"]
    assert out.shape == SHAPES["sample"]
    assert (session.in_force.device, session.in_force.threads) == ("GPU.0", 3)


@pytest.mark.parametrize(
    ("asked", "executed"), [("GPU", ["CPU"]), ("GPU.1", ["GPU.0"]), ("NPU", ["NPU", "CPU"]), ("CPU", [])]
)
def test_execution_elsewhere_is_refused(
    source: GraphSource, monkeypatch: pytest.MonkeyPatch, asked: str, executed: list[str]
) -> None:
    with_core(monkeypatch, FakeCore(ALL, executed or ["GPU.0"]))
    with pytest.raises(SessionError, match=f"{asked} was asked for, but OpenVINO executes on"):
        BACKEND.prepare(source, PrepareOptions(SHAPES, device=asked))


@pytest.mark.parametrize("asked", ["GPU", "GPU.0", "NPU", "AUTO:GPU,CPU", "HETERO:GPU"])
def test_a_device_that_is_not_seen(source: GraphSource, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    with_core(monkeypatch, FakeCore(("CPU",)))
    with pytest.raises(BackendUnavailable, match="OpenVINO sees CPU"):
        BACKEND.prepare(source, PrepareOptions(SHAPES, device=asked))


def test_what_an_npu_cannot(source: GraphSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with_core(monkeypatch, FakeCore(ALL))
    with pytest.raises(
        SessionError, match="fixed shapes only; unet leaves timestep, encoder_hidden_states free"
    ):
        BACKEND.prepare(source, PrepareOptions({"sample": SHAPES["sample"]}, device="NPU"))
    with pytest.raises(SessionError, match="does not compute in fp32 on NPU; use auto or one of fp16"):
        BACKEND.prepare(source, PrepareOptions(SHAPES, device="NPU", precision="fp32"))


def test_a_precision_that_is_not_in_force_is_refused(
    source: GraphSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_core(monkeypatch, FakeCore(ALL))
    options = PrepareOptions(
        SHAPES, device="GPU", precision="fp32", extra={"INFERENCE_PRECISION_HINT": "f16"}
    )
    with pytest.raises(SessionError, match="fp32 was asked for, but OpenVINO computes in fp16"):
        BACKEND.prepare(source, options)
