"""Machines that are in order: the doctor finds nothing to mend on any of them."""

from __future__ import annotations

from typing import Any

import pytest

CUDA = "CUDAExecutionProvider"

# Name, machine, troubles (``!``: a failure), what works, exit code: see machine_case in conftest.py.
CASES = [
    ("processor only", lambda m: m.openvino().onnxruntime("onnxruntime", "1.31.1"), {}, "openvino:CPU"),
    ("Radeon RX 7900 XTX, MIGraphX", lambda m: m.healthy_amd(), {}, "onnxruntime-migraphx"),
    ("Radeon RX 9070, torch", lambda m: m.healthy_torch("gfx1201"), {}, "torch:rocm"),
    ("Radeon RX 9060, torch", lambda m: m.healthy_torch("gfx1200", vram=8), {}, "torch:rocm"),
    ("Radeon RX 7600, torch", lambda m: m.healthy_torch("gfx1102", vram=8), {}, "torch:rocm"),
    (
        "Ryzen AI Max, torch",
        lambda m: m.healthy_torch("gfx1151", vram=0.5, used=0.1, gtt=60),
        {},
        "torch:rocm",
    ),
    ("Ryzen AI 9, torch", lambda m: m.healthy_torch("gfx1150", vram=4, gtt=14), {}, "torch:rocm"),
    ("Instinct MI300X, torch", lambda m: m.healthy_torch("gfx942", vram=192), {}, "torch:rocm"),
    ("Instinct MI210, torch", lambda m: m.healthy_torch("gfx90a", vram=64), {}, "torch:rocm"),
    ("RTX 4090", lambda m: m.healthy_nvidia(), {}, "onnxruntime-cuda"),
    ("RTX 2060, driver 580", lambda m: m.nvidia(0x1F08, capability="7.5").cuda(), {}, "onnxruntime-cuda"),
    ("Arc B580", lambda m: m.intel(0xE20B).openvino("GPU"), {}, "openvino:GPU"),
    (
        "Core Ultra laptop",
        lambda m: m.intel(0x64A0, "0000:00:02.0", "i915").npu().openvino("GPU", "NPU"),
        {},
        "openvino:NPU",
    ),
    (
        "NPU, which has no fp32",
        lambda m: m.npu().openvino("NPU").fails("openvino-run NPU fp32", "error", "f32 is not supported"),
        {},
        "openvino:NPU",
    ),
    ("Xeon with AMX", lambda m: m.processor("xeon").openvino(), {}, "openvino:CPU"),
    ("desktop Ryzen 7000, its graphics left alone", lambda m: m.amd("gfx1036").openvino(), {}),
    ("Ryzen 7000 and RTX 4090", lambda m: m.amd("gfx1036").nvidia().cuda(), {}, "onnxruntime-cuda"),
    (
        "Ryzen 7000 without groups: its graphics are left alone",
        lambda m: m.amd("gfx1036").groups().openvino(),
        {},
    ),
    (
        "Intel graphics without OpenVINO are left alone",
        lambda m: m.intel(0x4680, "0000:00:02.0", "").groups().onnxruntime("onnxruntime", "1.31.1"),
        {},
        "onnxruntime",
    ),
    (
        "Intel graphics beside an RTX are left alone",
        lambda m: m.pci("0000:00:02.0", 0x8086, 0x4680, "i915").nvidia().cuda().openvino(),
        {},
        "onnxruntime-cuda",
    ),
    (
        "container with everything passed in",
        lambda m: m.container().healthy_amd(),
        {},
        "onnxruntime-migraphx",
    ),
    ("WSL with an RTX", lambda m: m.wsl().file("usr/lib/wsl/lib/libcuda.so.1").cuda(), {}),
    ("TensorRT 10", lambda m: m.healthy_nvidia().package("tensorrt-cu13", "10.16.1.11"), {}),
    ("GTX 1080, the last ORT for CUDA 12", lambda m: m.nvidia(0x1B80, "550.10", "6.1").cuda("1.26.0"), {}),
    (
        "Radeon and its processor's graphics, hidden",
        lambda m: m.healthy_amd().amd("gfx1036").set(HIP_VISIBLE_DEVICES="0"),
        {},
    ),
    (
        "torch for the processor beside MIGraphX",
        lambda m: m.healthy_amd().torch_cpu(),
        {},
        "onnxruntime-migraphx",
    ),
    ("Arm", lambda m: m.arm().openvino(), {}, "openvino:CPU"),
]


def test_machine(machine_case: Any) -> None:
    machine_case()


def test_every_check_says_something_of_every_machine(machine: Any) -> None:
    findings = machine.openvino().diagnose().findings
    said = {finding.id for finding in findings}
    assert {"D-PY", "D-AMD-DRV", "D-NV-DRV", "D-INTEL-GPU", "D-NPU", "D-WSL", "D-HF", "D-OV"} <= said
    assert [finding for finding in findings if not finding.summary] == []


@pytest.mark.parametrize(
    ("troubles", "usable", "exit_code"),
    [
        ({}, None, None),  # one too few
        ({"D-AMD-PERM": "!", "D-AMD-KFD": "!"}, None, None),  # one too many
        ({"D-AMD-PERM": ""}, None, None),  # a failure, not a warning
        ({"D-AMD-PERM": "!not in the group video"}, None, None),
        ({"D-AMD-PERM": "!"}, "torch:rocm", None),
        ({"D-AMD-PERM": "!"}, None, 2),
    ],
)
def test_a_case_that_says_something_wrong_fails(
    machine: Any, judge: Any, troubles: dict[str, str], usable: str | None, exit_code: int | None
) -> None:
    diagnosis = machine.healthy_amd().file("etc/group", "render:x:992:\n").groups().diagnose()
    judge(diagnosis, {"D-AMD-PERM": "!not in the group render"}, "onnxruntime-migraphx", 1)
    with pytest.raises(AssertionError):
        judge(diagnosis, troubles, usable, exit_code)
