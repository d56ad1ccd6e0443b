"""Arc cards, integrated graphics and NPUs."""

from __future__ import annotations

from typing import Any

RENDER, VIDEO = 992, 44  # as conftest.py numbers the groups

# Name, machine, troubles (``!``: a failure), what works, exit code: see machine_case in conftest.py.
CASES = [
    (
        "Arc without a driver",
        lambda m: m.intel(0xE20B, driver="").openvino(),
        {"D-INTEL-GPU": "!no driver of Intel|kernel 6.12"},
    ),
    (
        "Arc without permission",
        lambda m: (
            m.intel(0x56A0, driver="i915").file("etc/group", f"render:x:{RENDER}:\n").groups().openvino()
        ),
        {"D-INTEL-GPU": "!not in the group render|sudo usermod -aG render $USER"},
    ),
    (
        "Arc without OpenCL",
        lambda m: m.intel(0x56A0).fails("dlopen libOpenCL.so.1", "error", "cannot open").openvino(),
        {"D-INTEL-GPU": "OpenCL driver that OpenVINO needs is missing|intel-opencl-icd"},
    ),
    (
        "NPU without its library",
        lambda m: m.npu().openvino().fails("dlopen libze_intel_npu.so.1", "error", "cannot open"),
        {"D-NPU": "without the Level Zero driver|intel-level-zero-npu"},
    ),
    (
        "NPU without permission",
        lambda m: m.npu().openvino().groups(VIDEO),
        {"D-NPU": "!log in again"},
    ),
    (
        "NPU without a driver",
        lambda m: m.pci("0000:00:0b.0", 0x8086, 0x7D1D, "", 0x12).openvino(),
        {"D-NPU": "without its driver intel_vpu|modprobe intel_vpu"},
    ),
    (
        "a GPU that OpenVINO fails on",
        lambda m: (
            m.intel(0xE20B)
            .openvino("GPU")
            .fails("openvino-run GPU fp32", "error", "CL_OUT_OF_RESOURCES")
            .fails("openvino-run GPU half", "error", "CL_OUT_OF_RESOURCES")
        ),
        {"D-EP-LIVE": "!refuses fp32|CL_OUT_OF_RESOURCES"},
        "openvino:CPU",
    ),
    (
        "a GPU that OpenVINO fails on in fp32",
        lambda m: m.intel(0xE20B).openvino("GPU").fails("openvino-run GPU fp32", "error", "CL_OUT_OF"),
        {"D-EP-LIVE": "half precision only|CL_OUT_OF"},
        "openvino:GPU",
    ),
]


def test_machine(machine_case: Any) -> None:
    machine_case()
