"""Radeons and Instincts: driver, permissions, kernels, overrides, libraries, and what engines do on them."""

from __future__ import annotations

from typing import Any

RENDER, VIDEO = 992, 44  # as conftest.py numbers the groups
MIGRAPHX = "MIGraphXExecutionProvider"
NAN = {"shape_right": True, "finite": False, "cosine": 0.0, "relative_l2": 0.0}
WRONG = {"shape_right": True, "finite": True, "cosine": 0.83, "relative_l2": 0.6}
UNOFFICIAL = "without support"

# Name, machine, troubles (``!``: a failure), what works, exit code: see machine_case in conftest.py.
CASES = [
    (
        "no driver",
        lambda m: m.pci("0000:03:00.0", 0x1002, 0x744C, "").openvino(),
        {"D-AMD-DRV": "!no amdgpu driver|sudo modprobe amdgpu"},
        "openvino:CPU",
        1,
    ),
    (
        "card given to a virtual machine",
        lambda m: m.pci("0000:03:00.0", 0x1002, 0x744C, "vfio-pci").file("sys/module/amdgpu/v").openvino(),
        {"D-AMD-DRV": "!belongs to vfio-pci", "D-AMD-KFD": "!/dev/kfd is missing"},
    ),
    (
        "driver without compute device",
        lambda m: m.healthy_amd().no_device("/dev/kfd"),
        {"D-AMD-KFD": "!/dev/kfd is missing|dmesg"},
    ),
    (
        "container without /dev/kfd",
        lambda m: m.healthy_amd().no_device("/dev/kfd").container(),
        {"D-AMD-KFD": "!not passed into this container|docker run --device=/dev/kfd --device=/dev/dri"},
    ),
    (
        "container without /dev/dri",
        lambda m: m.healthy_amd().no_device("/dev/dri/renderD128").container(),
        {"D-AMD-PERM": "!renderD128 is missing|--device=/dev/kfd"},
    ),
    (
        "too old for computing",
        lambda m: (
            m.pci("0000:03:00.0", 0x1002, 0x6798, "amdgpu")
            .file("sys/module/amdgpu/version")
            .device("/dev/kfd")
            .openvino()
        ),
        {"D-AMD-KFD": "!offers no GPU for computing|PCIe atomics"},
    ),
    (
        "in no group",
        lambda m: m.file("etc/group", f"video:x:{VIDEO}:\nrender:x:{RENDER}:\n").groups().healthy_amd(),
        {"D-AMD-PERM": "!not in the group render|sudo usermod -aG render $USER"},
    ),
    (
        "in the wrong group",
        lambda m: (
            m.file("etc/group", f"video:x:{VIDEO}:ada\nrender:x:{RENDER}:\n").groups(VIDEO).healthy_amd()
        ),
        {"D-AMD-PERM": "!not in the group render|sudo usermod -aG render $USER"},
    ),
    (
        "added to the group, not logged in again",
        lambda m: m.healthy_amd().groups(VIDEO),
        {"D-AMD-PERM": "!log in again|newgrp render"},
    ),
    (
        "container without the group",
        lambda m: m.file("etc/group", "root:x:0:\n").healthy_amd().groups().container(),
        {"D-AMD-PERM": f"!container lacks the group {RENDER}|--group-add {RENDER}"},
    ),
    (
        "integrated graphics beside a card",
        lambda m: m.healthy_amd().amd("gfx1103", gtt=32),
        {
            "D-AMD-IGPU": "integrated graphics beside a card|export HIP_VISIBLE_DEVICES=0",
            "D-AMD-GFX": UNOFFICIAL,
        },
    ),
    (
        "integrated graphics first, and visible",
        lambda m: (
            m.amd("gfx1103", gtt=32)
            .amd("gfx1100")
            .torch_rocm("gfx1100", "gfx1103")
            .set(HIP_VISIBLE_DEVICES="0")
        ),
        {"D-AMD-IGPU": "among the visible|export HIP_VISIBLE_DEVICES=1", "D-AMD-GFX": UNOFFICIAL},
    ),
    (
        "override of another family",
        lambda m: m.healthy_amd().set(HSA_OVERRIDE_GFX_VERSION="10.3.0"),
        {"D-AMD-OVR": "!gfx1100 does not run code of gfx1030|unset HSA_OVERRIDE_GFX_VERSION"},
    ),
    (
        "override of another family, where something is lacking",
        lambda m: m.amd("gfx1101").torch_rocm("gfx1030", "gfx1100").set(HSA_OVERRIDE_GFX_VERSION="10.3.0"),
        {"D-AMD-OVR": "!gfx1101 does not run code of gfx1030|export HSA_OVERRIDE_GFX_VERSION=11.0.0"},
    ),
    (
        "override that names the GPU itself",
        lambda m: m.healthy_amd().set(HSA_OVERRIDE_GFX_VERSION="11.0.0"),
        {"D-AMD-OVR": "what the GPU is anyway|unset"},
    ),
    (
        "override that is none",
        lambda m: m.healthy_amd().set(HSA_OVERRIDE_GFX_VERSION="gfx1100"),
        {"D-AMD-OVR": "!no version like 10.3.0"},
    ),
    (
        "override not needed",
        lambda m: m.healthy_torch("gfx1101").set(HSA_OVERRIDE_GFX_VERSION="11.0.0"),
        {"D-AMD-OVR": "not needed|unset HSA_OVERRIDE_GFX_VERSION"},
    ),
    (
        "override needed",
        lambda m: m.relatives(),
        {
            "D-AMD-OVR": "!override needed: torch 2.11.0+rocm7.2|export HSA_OVERRIDE_GFX_VERSION=10.3.0",
            "D-AMD-GFX": UNOFFICIAL,
        },
    ),
    (
        "override needed and set",
        lambda m: m.relatives().set(HSA_OVERRIDE_GFX_VERSION="10.3.0"),
        {"D-AMD-GFX": UNOFFICIAL},
        "torch:rocm",
    ),
    (
        "override to kernels that are not there",
        lambda m: m.amd("gfx1031").torch_rocm("gfx1100").set(HSA_OVERRIDE_GFX_VERSION="10.3.0"),
        {"D-AMD-OVR": "!no package has kernels for gfx1030", "D-AMD-GFX": UNOFFICIAL},
    ),
    (
        "RDNA1 with packages for others",
        lambda m: m.amd("gfx1010", vram=8).torch_rocm("gfx1030").set(HSA_OVERRIDE_GFX_VERSION="10.3.0"),
        {"D-AMD-OVR": "!gfx1010 does not run code of gfx1030", "D-AMD-GFX": f"RX 5700 XT|{UNOFFICIAL}"},
    ),
    (
        "RDNA1 with packages for others, no override",
        lambda m: m.amd("gfx1010", vram=8).torch_rocm("gfx1030"),
        {"D-AMD-OVR": "!no override helps|packages built for gfx1010", "D-AMD-GFX": UNOFFICIAL},
    ),
    ("RDNA1 with its own packages", lambda m: m.healthy_torch("gfx1010", vram=8), {"D-AMD-GFX": UNOFFICIAL}),
    (
        "RDNA2",
        lambda m: m.healthy_torch("gfx1030", vram=16),
        {"D-AMD-GFX": f"RX 6950 XT|{UNOFFICIAL}"},
        "torch:rocm",
    ),
    ("Radeon 780M", lambda m: m.healthy_torch("gfx1103", vram=4, gtt=14), {"D-AMD-GFX": UNOFFICIAL}),
    (
        "Vega 64",
        lambda m: m.healthy_torch("gfx900", vram=8),
        {"D-AMD-GFX": "does not test it, without support"},
    ),
    (
        "Vega graphics of a Ryzen 5000G",
        lambda m: m.amd("gfx90c", vram=2, gtt=16).openvino(),
        {"D-AMD-GFX": "!no current ROCm has code|--backend openvino"},
        "openvino:CPU",
    ),
    (
        "RX 580",
        lambda m: m.amd("gfx803", vram=8).openvino(),
        {"D-AMD-GFX": "!no current ROCm has code"},
    ),
    (
        "a GPU from the future",
        lambda m: m.healthy_torch("gfx1250"),
        {"D-AMD-GFX": "gfx1250 is not in Kiln's table"},
    ),
    (
        "torch for the processor",
        lambda m: m.amd("gfx1100").torch_cpu(),
        {
            "D-AMD-TORCH": "CPU only build and cannot use the AMD GPU|pip uninstall -y torch",
            "D-AMD-ENGINE": "no engine installed",
        },
        "torch:cpu",
    ),
    (
        "no engine for the GPU",
        lambda m: m.amd("gfx1100").openvino(),
        {"D-AMD-ENGINE": "no engine installed that uses it|torch:rocm"},
    ),
    (
        "MIGraphX without ROCm",
        lambda m: m.amd("gfx1100").migraphx().library_lacks(MIGRAPHX, "libmigraphx_c.so.3"),
        {
            "D-AMD-LIB": "!libmigraphx_c.so.3 and libamdhip64.so.7: not to be loaded|Install ROCm 7.2.4",
            "D-EP-LOAD": "!compiled in, but its library does not load|libmigraphx_c.so.3: cannot open",
            "D-EP-LIVE": "!compiled in, but fell back to CPUExecutionProvider without an error",
        },
        "onnxruntime",
        1,
    ),
    (
        "MIGraphX forgotten",
        lambda m: (
            m.healthy_amd()
            .fails("dlopen libmigraphx_c.so.3", "error", "libmigraphx_c.so.3: cannot open shared object file")
            .library_lacks(MIGRAPHX, "libmigraphx_c.so.3")
        ),
        {
            "D-AMD-LIB": "!sudo apt install migraphx",
            "D-EP-LOAD": "!cannot open",
            "D-EP-LIVE": "!fell back",
        },
    ),
    (
        "another ROCm",
        lambda m: m.amd("gfx1100").rocm("7.1.1", "gfx1100").migraphx(),
        {"D-AMD-LIB": "built for ROCm 7.2.4, here is ROCm 7.1.1|/opt/rocm-7.2.4 is searched first"},
    ),
    (
        "the last onnxruntime-rocm",
        lambda m: (
            m.amd("gfx1100")
            .torch_rocm("gfx1100")
            .onnxruntime("onnxruntime-rocm", "1.22.2", "ROCMExecutionProvider")
            .provider_library("ROCMExecutionProvider", b"")
        ),
        {"D-AMD-LIB": "!gave up in 1.23|pip install onnxruntime-migraphx"},
    ),
    (
        "variables that override options",
        lambda m: m.healthy_amd().set(ORT_MIGRAPHX_FP16_ENABLE="1", HIP_LAUNCH_BLOCKING="1"),
        {"D-AMD-ENV": "ORT_MIGRAPHX_FP16_ENABLE=1|unset HIP_LAUNCH_BLOCKING ORT_MIGRAPHX_FP16_ENABLE"},
    ),
    (
        "variables that cancel each other",
        lambda m: m.healthy_amd().set(ORT_MIGRAPHX_FP16_ENABLE="1", ORT_MIGRAPHX_BF16_ENABLE="1"),
        {"D-AMD-ENV": "switch both off"},
    ),
    (
        "little memory on the card",
        lambda m: m.healthy_torch("gfx1100", vram=2, used=0.1),
        {"D-AMD-VRAM": "has 2.0 GiB; Stable Diffusion 1.5|-W 384"},
    ),
    (
        "memory of the card in use",
        lambda m: m.healthy_torch("gfx1100", vram=16, used=14),
        {"D-AMD-VRAM": "2.0 GiB free of 16.0 GiB|fuser"},
    ),
    (
        "kernels that abort",
        lambda m: m.healthy_torch("gfx1100").fails(
            "torch-run cuda:0 fp32", "crash", "killed by SIGABRT. HSA_STATUS_ERROR_INVALID_ISA"
        ),
        {"D-EP-LIVE": "!the process died in fp32|SIGABRT|D-AMD-OVR"},
        "torch:cpu",
        1,
    ),
    (
        "a hang",
        lambda m: m.healthy_amd().fails(
            f"onnxruntime-run {MIGRAPHX} fp32", "timeout", "no answer within 120 s"
        ),
        {"D-EP-LIVE": "!hangs in fp32|kiln doctor --timeout 600"},
        "onnxruntime",
    ),
    (
        "NaN in half precision",
        lambda m: m.healthy_amd().gives(f"onnxruntime-run {MIGRAPHX} half", NAN),
        {"D-NUM": "!half gives NaN or infinity|an image would be black"},
        "onnxruntime-migraphx",
    ),
    (
        "wrong numbers",
        lambda m: (
            m.healthy_amd()
            .gives(f"onnxruntime-run {MIGRAPHX} fp32", WRONG)
            .gives(f"onnxruntime-run {MIGRAPHX} half", WRONG)
            .fails(f"onnxruntime-run {MIGRAPHX} half", "error", "no")
        ),
        {"D-NUM": "!fp32 gives wrong numbers|cosine 0.83", "D-EP-LIVE": "refuses half precision"},
        "onnxruntime",
    ),
    (
        "no half precision",
        lambda m: m.healthy_amd().fails(f"onnxruntime-run {MIGRAPHX} half", "error", "not supported"),
        {"D-EP-LIVE": "refuses half precision|not supported|--precision fp32"},
        "onnxruntime-migraphx",
    ),
    (
        "half precision aborts",
        lambda m: m.healthy_amd().fails(f"onnxruntime-run {MIGRAPHX} half", "crash", "killed by SIGSEGV"),
        {"D-EP-LIVE": "!died in half precision|SIGSEGV"},
        "onnxruntime-migraphx",
    ),
    (
        "nodes left on the processor",
        lambda m: m.healthy_amd().answer(
            f"onnxruntime-run {MIGRAPHX} fp32",
            providers=[MIGRAPHX, "CPUExecutionProvider"],
            nodes={MIGRAPHX: 2, "CPUExecutionProvider": 5},
            on_provider=True,
            comparison={"shape_right": True, "finite": True, "cosine": 1.0, "relative_l2": 0.0},
        ),
        {"D-EP-LIVE": "5 nodes of a small network ran on the processor"},
        "onnxruntime-migraphx",
    ),
]


def test_machine(machine_case: Any) -> None:
    machine_case()
