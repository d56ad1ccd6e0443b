"""Which wheel is installed, which libraries load, which GPUs there are: on folders that look like one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from kiln.backends import onnxruntime_gpus as gpus
from kiln.backends import onnxruntime_wheel as wheel
from kiln.backends import registry
from kiln.backends.onnxruntime_cuda import NEEDS as CUDA
from kiln.backends.onnxruntime_gpus import Gpu, amd_gpus, choose, nvidia_gpus
from kiln.backends.onnxruntime_migraphx import NEEDS as MIGRAPHX
from kiln.backends.onnxruntime_nvidia import precisions
from kiln.errors import BackendUnavailable

pytest.importorskip("onnxruntime")


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_wheels(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.31.1")
    install(tmp_path, "onnxruntime_gpu", "1.31.0")
    install(tmp_path, "onnxruntime-ep-openvino", "1.8.1")  # a plug-in lies elsewhere
    assert wheel.wheels([str(tmp_path)]) == [("onnxruntime-gpu", "1.31.0"), ("onnxruntime", "1.31.1")]
    assert wheel.wheels([str(tmp_path / "empty")]) == []


def test_here_it_is_found() -> None:
    assert wheel.wheels()
    assert (wheel.capi() / "onnxruntime_inference_collection.py").is_file()


def test_wrong_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "capi", lambda: tmp_path)
    monkeypatch.setattr(wheel, "wheels", lambda: [("onnxruntime", "1.31.1")])
    monkeypatch.setattr(wheel, "load_library", lambda name, folders=(): "")
    reason = CUDA.probe().reason
    assert "onnxruntime 1.31.1 is installed, without CUDAExecutionProvider" in reason
    assert "pip uninstall -y onnxruntime && pip install 'kiln-diffusion[cuda]'" in reason
    (tmp_path / CUDA.library).touch()
    assert CUDA.probe().available


def test_two_wheels_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "capi", lambda: tmp_path)
    monkeypatch.setattr(wheel, "wheels", lambda: [("onnxruntime-gpu", "1.31.1"), ("onnxruntime", "1.31.1")])
    assert "pip uninstall -y onnxruntime-gpu onnxruntime &&" in CUDA.probe().reason


def test_driver_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those that the provider's library was linked to."""
    monkeypatch.setattr(wheel, "capi", lambda: tmp_path)
    (tmp_path / MIGRAPHX.library).write_bytes(b"\0libmigraphx_c.so.3\0libamdhip64.so.99\0")
    reason = MIGRAPHX.probe().reason
    assert reason.startswith("libamdhip64.so.99 does not load (")
    assert "install the ROCm" in reason


def test_linked_name(tmp_path: Path) -> None:
    assert wheel.linked_name(tmp_path / "nothing", "liba.so") == "liba.so"
    (tmp_path / "x").write_bytes(b"xlibazso.1\0liba.so\0liba.so.12\0")
    assert wheel.linked_name(tmp_path / "x", "liba.so") == "liba.so.12"


def test_load_library(tmp_path: Path) -> None:
    assert wheel.load_library("libc.so.6") == ""
    assert "libkiln_nothing.so" in wheel.load_library("libkiln_nothing.so", [str(tmp_path)])
    (tmp_path / "libkiln_broken.so").write_text("no library")
    assert wheel.load_library("libkiln_broken.so", [str(tmp_path)])


@pytest.mark.parametrize(
    "name", ["onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-migraphx", "onnxruntime-webgpu"]
)
def test_what_is_not_here_says_why(name: str) -> None:
    backend = registry.get_backend(name)
    found = backend.probe()
    if not found.available:
        assert len(found.reason) > 20
        assert backend.devices() == ()
        assert registry.why_unusable(backend) == found.reason


class Driver:
    """NVIDIA's driver with the GPUs of a list, or an error."""

    def __init__(self, found: list[tuple[str, int, int]], status: int = 0) -> None:
        self._found, self._status = found, status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._found)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13020
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self._found[device.value][0].encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self._found[device.value][{75: 1, 76: 2}[attribute]]
        return 0


def test_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([("NVIDIA H200", 9, 0), ("NVIDIA GeForce GTX 1080", 6, 1)])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    found = nvidia_gpus()
    assert found == (
        Gpu(0, "NVIDIA H200", "9.0", "13.2"),
        Gpu(1, "NVIDIA GeForce GTX 1080", "6.1", "13.2"),
    )
    assert [precisions(gpu) for gpu in found] == [("fp16", "bf16", "fp32"), ("fp32",)]


@pytest.mark.parametrize("driver", [Driver([]), Driver([("x", 9, 0)], status=100)])
def test_nvidia_without_a_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(BackendUnavailable, match=r"offers no GPU \(CUDA error \d+\): look at nvidia-smi"):
        nvidia_gpus()


def test_nvidia_without_a_driver() -> None:
    with pytest.raises(
        BackendUnavailable, match=r"libkiln_no_cuda\.so does not load .*install NVIDIA's driver"
    ):
        nvidia_gpus("libkiln_no_cuda.so")


def amd_machine(root: Path, targets: list[int]) -> Path:
    (root / "dev").mkdir(parents=True)
    (root / "dev/kfd").touch()
    (root / "opt/rocm/.info").mkdir(parents=True)
    (root / "opt/rocm/.info/version").write_text("7.2.4\n")
    for index, target in enumerate(targets):
        node = root / gpus.TOPOLOGY / str(index)
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {target}\nvendor_id 4098\n")
    return root


def test_amd(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, [0, 110000, 90010, 90402, 110501])
    assert [(gpu.index, gpu.arch) for gpu in amd_gpus(root)] == [
        (0, "gfx1100"),
        (1, "gfx90a"),
        (2, "gfx942"),
        (3, "gfx1151"),
    ]
    assert amd_gpus(root)[0].driver == "7.2.4"


def test_amd_nodes_are_counted_not_spelt(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, [0] * 2 + [110000] * 8 + [90010])
    assert [gpu.arch for gpu in amd_gpus(root)][-1] == "gfx90a"


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda root: None, "no /dev/kfd"),
        (lambda root: amd_machine(root, [0]), "lists no GPU"),
        (lambda root: amd_machine(root, [110000]) / "dev/kfd", "may not open /dev/kfd"),
    ],
    ids=["driver", "processors", "permission"],
)
def test_amd_without(tmp_path: Path, prepare: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if prepare(tmp_path) == tmp_path / "dev/kfd":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BackendUnavailable, match=told):
        amd_gpus(tmp_path)


def test_choose() -> None:
    there = (Gpu(0, "a", "9.0", ""), Gpu(1, "b", "9.0", ""))
    assert [choose("x", "cuda", there, id).index for id in ("auto", "cuda", "CUDA:0", "cuda:1")] == [
        0,
        0,
        0,
        1,
    ]
    with pytest.raises(
        BackendUnavailable, match="the x backend has no device 'rocm:0'; it has: cuda:0, cuda:1"
    ):
        choose("x", "cuda", there, "rocm:0")
