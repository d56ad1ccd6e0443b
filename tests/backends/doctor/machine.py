"""A computer with software: what pip and the engines would have there, and what Kiln makes of it."""

from __future__ import annotations

import json
from typing import Any, Self

from computer import Computer

from kiln.backends.doctor.diagnosis import Diagnosis, diagnose
from kiln.backends.doctor.here import FACTS, sysroot_system

RIGHT = {"shape_right": True, "finite": True, "cosine": 0.9999999, "relative_l2": 5e-7}
CPU, MIGRAPHX = "CPUExecutionProvider", "MIGraphXExecutionProvider"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


class Machine(Computer):
    """A computer on which packages and engines are installed; methods add them, or a whole set of them."""

    def package(self, name: str, version: str) -> Self:
        info = f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
        self.file(
            f"{self.site.relative_to(self.root)}/{info}",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        return self

    def site_file(self, name: str, text: str | bytes = "") -> Self:
        return self.file(f"{self.site.relative_to(self.root)}/{name}", text)

    def rocm(self, version: str, *gfx: str) -> Self:
        """ROCm below /opt, with kernels for some GPUs; its libraries load."""
        self.file("opt/rocm/.info/version", f"{version}-98\n")
        for name in gfx:
            self.file(f"opt/rocm/lib/rocblas/library/TensileLibrary_lazy_{name}.dat")
            self.file(f"opt/rocm/lib/rocblas/library/Kernels.so-000-{name}.hsaco")
        return self.answer("dlopen libmigraphx_c.so.3").answer("dlopen libamdhip64.so.7")

    def torch_rocm(self, *kernels: str, gpus: int = 1) -> Self:
        self.package("torch", "2.11.0+rocm7.2")
        self.site_file("torch/version.py", "cuda: Optional[str] = None\nhip: Optional[str] = '7.2.4'\n")
        for name in kernels:
            self.site_file(f"torch/lib/rocblas/library/TensileLibrary_lazy_{name}.dat")
        return self._torch("7.2.4", "", gpus)

    def torch_cpu(self) -> Self:
        self.package("torch", "2.11.0+cpu")
        self.site_file("torch/version.py", "cuda: Optional[str] = None\nhip: Optional[str] = None\n")
        return self._torch("", "", 0)

    def _torch(self, hip: str, cuda: str, gpus: int) -> Self:
        rows = [{"name": "GPU", "gfx": "", "memory": 1}] * gpus
        self.answer("torch-list", version="2.11.0", hip=hip, cuda=cuda, gpus=rows, kernels=[])
        for device in ["cpu", *(f"cuda:{index}" for index in range(gpus))]:
            self.ran(f"torch-run {device}", device, half="float16")
        return self

    def openvino(self, *devices: str) -> Self:
        self.package("openvino", "2026.4.1")
        facts = {"FULL_DEVICE_NAME": "Test", "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16"]}
        rows = {name: facts | {"INFERENCE_PRECISION_HINT": "bf16"} for name in ("CPU", *devices)}
        self.answer("openvino-list", version="2026.4.1-1", devices=rows)
        for name in rows:
            self.ran(f"openvino-run {name}", name, half="bf16")
        return self

    def onnxruntime(self, name: str, version: str, *providers: str) -> Self:
        """A wheel whose providers are listed, load and run; the processor's comes last."""
        self.package(name, version)
        self.site_file("onnxruntime/capi/build_and_package_info.py", f"package_name = '{name}'\n")
        self.answer("onnxruntime-list", version=version, providers=[*providers, CPU], plugins=[])
        for provider in (*providers, CPU):
            self.ran(f"onnxruntime-run {provider}", provider, nodes={provider: 27})
        return self

    def migraphx(self, version: str = "1.27.1", rocm: str = "7.2.4") -> Self:
        self.onnxruntime("onnxruntime-migraphx", version, MIGRAPHX)
        linked = b"\0libmigraphx_c.so.3\0libamdhip64.so.7\0"
        path = f"/opt/rocm-{rocm}/lib:/opt/rocm-{rocm}/lib/migraphx/lib:/opt/rocm/lib:".encode()
        return self.provider_library(MIGRAPHX, linked + path + b"\0")

    def cuda(self, version: str = "1.31.1") -> Self:
        self.onnxruntime("onnxruntime-gpu", version, TENSORRT, CUDA)
        if version == "1.31.1":
            info = "package_name = 'onnxruntime-gpu'\ncuda_version = '13.0'\n"
            self.site_file("onnxruntime/capi/build_and_package_info.py", info)
        self.provider_library(TENSORRT, b"\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
        return self.provider_library(CUDA, b"\0libcudart.so.13\0")

    def provider_library(self, provider: str, data: bytes) -> Self:
        name = provider.removesuffix("ExecutionProvider").lower()
        path = self.site / f"onnxruntime/capi/libonnxruntime_providers_{name}.so"
        self.file(str(path.relative_to(self.root)), data)
        return self.answer(f"dlopen-provider {path}")

    def library_lacks(self, provider: str, missing: str) -> Self:
        """The provider is compiled in but does not load; a session falls back as ONNX Runtime does."""
        name = provider.removesuffix("ExecutionProvider").lower()
        path = self.site / f"onnxruntime/capi/libonnxruntime_providers_{name}.so"
        text = f"{missing}: cannot open shared object file: No such file or directory"
        self.fails(f"dlopen-provider {path}", "error", text)
        return self.fell_back(provider)

    def other_folder(self, dist: str) -> Self:
        """A distribution, ``name-version``, in a second folder on the search path."""
        name, _, version = dist.partition("-")
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        return self.file(f"usr/local/lib/python3.12/dist-packages/{dist}.dist-info/METADATA", text)

    # What an engine said when it ran

    def ran(self, question: str, where: str, half: str = "", **value: Any) -> Self:
        for precision in ("fp32", "half"):
            extra = value | ({"precision": half} if half and precision == "half" else {})
            self.answer(
                f"{question} {precision}", providers=[where], on_provider=True, comparison=RIGHT, **extra
            )
        return self

    def fell_back(self, provider: str) -> Self:
        for precision in ("fp32", "half"):
            question = f"onnxruntime-run {provider} {precision}"
            self.answer(
                question, providers=[CPU], nodes={CPU: 27}, on_provider=False, comparison=RIGHT, version="1"
            )
        return self

    # Whole machines

    def healthy_amd(self) -> Self:
        return self.amd("gfx1100").rocm("7.2.4", "gfx1030", "gfx1100").migraphx()

    def healthy_torch(self, gfx: str, **memory: float) -> Self:
        return self.amd(gfx, **memory).torch_rocm("gfx1030", gfx)

    def healthy_nvidia(self) -> Self:
        return self.nvidia().cuda()

    def relatives(self) -> Self:
        """An RX 6700 XT with a torch built for its relatives only."""
        return self.amd("gfx1031", vram=12).torch_rocm("gfx1030", "gfx1100")

    def kiln(self) -> Self:
        """What ``kiln devices`` would say: one row for each engine that is installed."""
        installed = [n for n in ("openvino", "onnxruntime", "torch") if f"{n}-list" in self.facts["answers"]]
        rows = [{"backend": n, "device": "d", "available": True, "reason": ""} for n in installed]
        none = {"backend": "torch", "device": "", "available": False, "reason": "torch is not installed"}
        return self.answer("kiln-devices", rows=rows or [none])

    def diagnose(self) -> Diagnosis:
        if self.facts["answers"] is not None and "kiln-devices" not in self.facts["answers"]:
            self.kiln()
        self.file(FACTS, json.dumps(self.facts))
        return diagnose(sysroot_system(self.root))
