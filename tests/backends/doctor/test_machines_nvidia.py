"""GeForces and Teslas: drivers, generations, TensorRT, WSL, containers."""

from __future__ import annotations

from typing import Any

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# Name, machine, troubles (``!``: a failure), what works, exit code: see machine_case in conftest.py.
CASES = [
    ("no driver", lambda m: m.nvidia(driver="").cuda(), {"D-NV-DRV": "!no NVIDIA driver|ubuntu-drivers"}),
    ("nouveau", lambda m: m.nvidia(driver="nouveau").cuda(), {"D-NV-DRV": "!runs on nouveau"}),
    (
        "driver of CUDA 12, package of CUDA 13",
        lambda m: m.nvidia(driver="550.163.01").cuda(),
        {"D-NV-DRV": "!too old for onnxruntime-gpu 1.31.1 (CUDA 13 needs 580)|cudnn]==1.26.0"},
    ),
    ("driver of CUDA 12, package of CUDA 12", lambda m: m.nvidia(driver="550.163.01").cuda("1.26.0"), {}),
    (
        "Pascal with CUDA 13",
        lambda m: m.nvidia(0x1B80, "580.95.05", "6.1").cuda(),
        {"D-NV-CC": "!older than Turing|compute capability 6.1 (libcuda.so.1)|cudnn]==1.26.0"},
    ),
    (
        "Pascal by its PCI id",
        lambda m: m.nvidia(0x1B80).fails("cuda-devices", "error", "cuInit gives 999").cuda(),
        {"D-NV-CC": "!Pascal 10de:1b80|by its PCI id"},
    ),
    (
        "Volta with CUDA 13",
        lambda m: m.nvidia(0x1DB4, "580.95.05", "7.0").cuda(),
        {"D-NV-CC": "!older than Turing"},
    ),
    (
        "TensorRT 11",
        lambda m: m.healthy_nvidia().package("tensorrt", "11.4.0").fell_back(TENSORRT),
        {
            "D-NV-TRT": "!wants libnvinfer.so.10|tensorrt-cu13==10.16.1.11",
            "D-EP-LIVE": "!fell back to CPUExecutionProvider",
        },
        "onnxruntime-cuda",
    ),
    (
        "CUDA's libraries missing",
        lambda m: m.healthy_nvidia().library_lacks(CUDA, "libcublasLt.so.13"),
        {
            "D-EP-LOAD": "!libcublasLt.so.13|pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'",
            "D-EP-LIVE": "!fell back",
        },
        "onnxruntime",
    ),
    (
        "no engine for the GPU",
        lambda m: m.nvidia().openvino().onnxruntime("onnxruntime", "1.31.1"),
        {"D-NV-ENGINE": "no engine installed|pip uninstall -y onnxruntime"},
    ),
    (
        "no engine for the GPU, old driver",
        lambda m: m.nvidia(driver="550.10").openvino(),
        {"D-NV-ENGINE": "onnxruntime-gpu[cuda,cudnn]==1.26.0"},
    ),
    ("WSL without CUDA", lambda m: m.wsl().openvino(), {"D-WSL": "no CUDA library|wsl.exe --shutdown"}),
    (
        "WSL 1",
        lambda m: m.wsl().no_device("/dev/dxg").openvino(),
        {"D-WSL": "WSL without a GPU|wsl.exe --update"},
    ),
    (
        "a container without the GPU",
        lambda m: m.container().cuda().library_lacks(CUDA, "libcuda.so.1"),
        {"D-EP-LOAD": "!docker run --gpus all ...", "D-EP-LIVE": "!fell back"},
        "onnxruntime",
    ),
    (
        "a CUDA package without a GPU",
        lambda m: m.cuda().library_lacks(CUDA, "libcuda.so.1"),
        {"D-EP-LOAD": "!pip uninstall -y onnxruntime-gpu|pip install onnxruntime", "D-EP-LIVE": "!fell back"},
        "onnxruntime",
    ),
]


def test_machine(machine_case: Any) -> None:
    machine_case()
