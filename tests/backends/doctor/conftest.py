"""Machines made of small files: a builder that writes what Linux, pip and the engines would have there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kiln.backends import registry
from kiln.backends.doctor.diagnosis import Diagnosis, diagnose
from kiln.backends.doctor.finding import Finding, Verdict
from kiln.backends.doctor.here import FACTS, sysroot_system

GIB = 2**30
RENDER, VIDEO, USER = 992, 44, 1000

FLAGS = {
    "zen5": "sse4_2 avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16",
    "xeon": "sse4_2 avx2 fma f16c avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8",
    "cascade": "sse4_2 avx2 fma f16c avx512f avx512_vnni",
    "haswell": "sse4_2 avx2 fma f16c",
    "ivy": "sse4_2 avx f16c",
}
# What gfx_target_version, the PCI id and the card are, as the kernel gives them.
AMD = {
    "gfx1201": (120001, 0x7550),
    "gfx1200": (120000, 0x7590),
    "gfx1151": (110501, 0x1586),
    "gfx1150": (110500, 0x150E),
    "gfx1103": (110003, 0x15BF),
    "gfx1102": (110002, 0x7480),
    "gfx1101": (110001, 0x747E),
    "gfx1100": (110000, 0x744C),
    "gfx1036": (100306, 0x164E),
    "gfx1031": (100301, 0x73DF),
    "gfx1030": (100300, 0x73BF),
    "gfx1010": (100100, 0x731F),
    "gfx942": (90402, 0x74A1),
    "gfx90a": (90010, 0x740F),
    "gfx90c": (90012, 0x1638),
    "gfx900": (90000, 0x687F),
    "gfx803": (80003, 0x67DF),
    "gfx1250": (120500, 0x75FF),
}
RIGHT = {"shape_right": True, "finite": True, "cosine": 0.9999999, "relative_l2": 5e-7}
NAN = {"shape_right": True, "finite": False, "cosine": 0.0, "relative_l2": float("inf")}
WRONG = {"shape_right": True, "finite": True, "cosine": 0.83, "relative_l2": 0.6}
CPU, MIGRAPHX = "CPUExecutionProvider", "MIGraphXExecutionProvider"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


class Machine:
    """A computer with a processor, memory and a disk, and nothing else; methods add to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cards = 0
        self.facts: dict[str, Any] = {
            "environment": {},
            "user": {"name": "ada", "uid": USER, "groups": [USER, VIDEO, RENDER]},
            "python": [3, 12, 3],
            "nodes": {"/dev/null": {"gid": 0, "mode": "0666"}},
            "disk": {"free": 200 * GIB, "type": "ext4"},
            "backends": list(registry.names()),
            "answers": {},
        }
        self.site = root / "usr/lib/python3.12/site-packages"
        self.processor("zen5").memory(64, 48)
        self.file("etc/group", f"root:x:0:\nvideo:x:{VIDEO}:ada\nrender:x:{RENDER}:ada\n")

    def file(self, name: str, text: str | bytes = "") -> Machine:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def fact(self, **facts: Any) -> Machine:
        self.facts |= facts
        return self

    def set(self, **variables: str) -> Machine:
        self.facts["environment"] |= variables
        return self

    def groups(self, *gids: int) -> Machine:
        self.facts["user"]["groups"] = [USER, *gids]
        return self

    def device(self, name: str, gid: int = RENDER, mode: str = "0660") -> Machine:
        self.facts["nodes"][name] = {"gid": gid, "mode": mode}
        return self

    def no_device(self, name: str) -> Machine:
        del self.facts["nodes"][name]
        return self

    # Hardware

    def processor(self, kind: str, threads: int = 8) -> Machine:
        flags = f"flags\t\t: fpu {FLAGS.get(kind, kind)}"
        one = f"processor\t: 0\nmodel name\t: Test {kind}\n{flags}\n"
        return self.file("proc/cpuinfo", "\n".join([one] * threads))

    def memory(self, total: float, available: float) -> Machine:
        kib = [int(size * GIB / 1024) for size in (total, available)]
        return self.file("proc/meminfo", f"MemTotal: {kib[0]} kB\nMemFree: 1 kB\nMemAvailable: {kib[1]} kB\n")

    def pci(self, address: str, vendor: int, device: int, driver: str, base_class: int = 0x03) -> Machine:
        folder = f"sys/bus/pci/devices/{address}"
        self.file(f"{folder}/vendor", f"0x{vendor:04x}\n").file(f"{folder}/device", f"0x{device:04x}\n")
        self.file(f"{folder}/class", f"0x{base_class:02x}0000\n")
        return self.file(f"{folder}/uevent", f"DRIVER={driver}\n" if driver else "PCI_ID=1:1\n")

    def amd(self, gfx: str, vram: float = 24, used: float = 1, gtt: float = 16) -> Machine:
        """A GPU with driver, compute device and permissions."""
        version, device = AMD[gfx]
        self.pci(f"0000:{3 + self.cards:02x}:00.0", 0x1002, device, "amdgpu")
        self.file("sys/module/amdgpu/version", "6.14.0\n")
        nodes, minor = "sys/class/kfd/kfd/topology/nodes", 128 + self.cards
        self.file(f"{nodes}/0/properties", "cpu_cores_count 8\nsimd_count 0\ngfx_target_version 0\n")
        self.cards += 1
        self.file(
            f"{nodes}/{self.cards}/properties",
            f"simd_count 96\nvendor_id 4098\ngfx_target_version {version}\ndrm_render_minor {minor}\n",
        )
        memory = f"sys/class/drm/renderD{minor}/device/mem_info"
        for name, size in (("vram_total", vram), ("vram_used", used), ("gtt_total", gtt)):
            self.file(f"{memory}_{name}", f"{int(size * GIB)}\n")
        return self.device("/dev/kfd").device(f"/dev/dri/renderD{minor}")

    def nvidia(self, device: int = 0x2684, driver: str = "580.95.05", capability: str = "8.9") -> Machine:
        """A GPU; a driver that is a version is NVIDIA's, another one a kernel driver's name."""
        own = driver[:1].isdigit()
        self.pci("0000:01:00.0", 0x10DE, device, "nvidia" if own else driver)
        if own:
            line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
            self.file("proc/driver/nvidia/version", line)
            major, minor = map(int, capability.split("."))
            row = {"name": "NVIDIA Test", "major": major, "minor": minor}
            self.answer("cuda-devices", devices=[row], cuda=13000)
        return self

    def intel(self, device: int, address: str = "0000:03:00.0", driver: str = "xe") -> Machine:
        """Graphics with driver, OpenCL and permissions."""
        self.pci(address, 0x8086, device, driver).file(f"sys/bus/pci/devices/{address}/drm/renderD128/dev")
        self.file("etc/OpenCL/vendors/intel.icd", "libigdrcl.so").answer("dlopen libOpenCL.so.1")
        return self.device("/dev/dri/renderD128")

    def npu(self) -> Machine:
        self.pci("0000:00:0b.0", 0x8086, 0x643E, "intel_vpu", 0x12).device("/dev/accel/accel0")
        return self.answer("dlopen libze_intel_npu.so.1")

    def container(self) -> Machine:
        return self.file(".dockerenv")

    # Software

    def package(self, name: str, version: str) -> Machine:
        info = f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
        self.file(
            f"{self.site.relative_to(self.root)}/{info}",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        return self

    def site_file(self, name: str, text: str | bytes = "") -> Machine:
        return self.file(f"{self.site.relative_to(self.root)}/{name}", text)

    def rocm(self, version: str, *gfx: str) -> Machine:
        """ROCm below /opt, with kernels for some GPUs; its libraries load."""
        self.file("opt/rocm/.info/version", f"{version}-98\n")
        for name in gfx:
            self.file(f"opt/rocm/lib/rocblas/library/TensileLibrary_lazy_{name}.dat")
            self.file(f"opt/rocm/lib/rocblas/library/Kernels.so-000-{name}.hsaco")
        return self.answer("dlopen libmigraphx_c.so.3").answer("dlopen libamdhip64.so.7")

    def torch_rocm(self, *kernels: str, gpus: int = 1) -> Machine:
        self.package("torch", "2.11.0+rocm7.2")
        self.site_file("torch/version.py", "cuda: Optional[str] = None\nhip: Optional[str] = '7.2.4'\n")
        for name in kernels:
            self.site_file(f"torch/lib/rocblas/library/TensileLibrary_lazy_{name}.dat")
        return self._torch("7.2.4", "", gpus)

    def torch_cpu(self) -> Machine:
        self.package("torch", "2.11.0+cpu")
        self.site_file("torch/version.py", "cuda: Optional[str] = None\nhip: Optional[str] = None\n")
        return self._torch("", "", 0)

    def _torch(self, hip: str, cuda: str, gpus: int) -> Machine:
        rows = [{"name": "GPU", "gfx": "", "memory": 1}] * gpus
        self.answer("torch-list", version="2.11.0", hip=hip, cuda=cuda, gpus=rows, kernels=[])
        for device in ["cpu", *(f"cuda:{index}" for index in range(gpus))]:
            self.ran(f"torch-run {device}", device, half="float16")
        return self

    def openvino(self, *devices: str) -> Machine:
        self.package("openvino", "2026.4.1")
        facts = {"FULL_DEVICE_NAME": "Test", "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16"]}
        rows = {name: facts | {"INFERENCE_PRECISION_HINT": "bf16"} for name in ("CPU", *devices)}
        self.answer("openvino-list", version="2026.4.1-1", devices=rows)
        for name in rows:
            self.ran(f"openvino-run {name}", name, half="bf16")
        return self

    def onnxruntime(self, name: str, version: str, *providers: str) -> Machine:
        """A wheel whose providers are listed, load and run; the processor's comes last."""
        self.package(name, version)
        self.site_file("onnxruntime/capi/build_and_package_info.py", f"package_name = '{name}'\n")
        self.answer("onnxruntime-list", version=version, providers=[*providers, CPU], plugins=[])
        for provider in (*providers, CPU):
            self.ran(f"onnxruntime-run {provider}", provider, nodes={provider: 27})
        return self

    def migraphx(self, version: str = "1.27.1", rocm: str = "7.2.4") -> Machine:
        self.onnxruntime("onnxruntime-migraphx", version, MIGRAPHX)
        linked = b"\0libmigraphx_c.so.3\0libamdhip64.so.7\0"
        path = f"/opt/rocm-{rocm}/lib:/opt/rocm-{rocm}/lib/migraphx/lib:/opt/rocm/lib:".encode()
        return self.provider_library(MIGRAPHX, linked + path + b"\0")

    def cuda(self, version: str = "1.31.1") -> Machine:
        self.onnxruntime("onnxruntime-gpu", version, TENSORRT, CUDA)
        if version == "1.31.1":
            info = "package_name = 'onnxruntime-gpu'\ncuda_version = '13.0'\n"
            self.site_file("onnxruntime/capi/build_and_package_info.py", info)
        self.provider_library(TENSORRT, b"\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
        return self.provider_library(CUDA, b"\0libcudart.so.13\0")

    def provider_library(self, provider: str, data: bytes) -> Machine:
        name = provider.removesuffix("ExecutionProvider").lower()
        path = self.site / f"onnxruntime/capi/libonnxruntime_providers_{name}.so"
        self.file(str(path.relative_to(self.root)), data)
        return self.answer(f"dlopen-provider {path}")

    def library_lacks(self, provider: str, missing: str) -> Machine:
        """The provider is compiled in but does not load; a session falls back as ONNX Runtime does."""
        name = provider.removesuffix("ExecutionProvider").lower()
        path = self.site / f"onnxruntime/capi/libonnxruntime_providers_{name}.so"
        text = f"{missing}: cannot open shared object file: No such file or directory"
        self.fails(f"dlopen-provider {path}", "error", text)
        return self.fell_back(provider)

    # Whole machines

    def healthy_amd(self) -> Machine:
        return self.amd("gfx1100").rocm("7.2.4", "gfx1030", "gfx1100").migraphx()

    def healthy_torch(self, gfx: str, **memory: float) -> Machine:
        return self.amd(gfx, **memory).torch_rocm("gfx1030", gfx)

    def healthy_nvidia(self) -> Machine:
        return self.nvidia().cuda()

    def relatives(self) -> Machine:
        """An RX 6700 XT with a torch built for its relatives only."""
        return self.amd("gfx1031", vram=12).torch_rocm("gfx1030", "gfx1100")

    def wsl(self) -> Machine:
        self.file("proc/version", "Linux version 6.6.87.2-microsoft-standard-WSL2\n")
        return self.device("/dev/dxg", 0, "0666")

    def arm(self) -> Machine:
        return self.file("proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 sve\n")

    def other_folder(self, dist: str) -> Machine:
        """A distribution, ``name-version``, in a second folder on the search path."""
        name, _, version = dist.partition("-")
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        return self.file(f"usr/local/lib/python3.12/dist-packages/{dist}.dist-info/METADATA", text)

    def quota_v2(self, text: str) -> Machine:
        return self.file("proc/self/cgroup", "0::/box\n").file("sys/fs/cgroup/box/cpu.max", f"{text}\n")

    def memory_v2(self, limit: float, used: float) -> Machine:
        box = "sys/fs/cgroup/box/memory"
        self.file("proc/self/cgroup", "0::/box\n").file(f"{box}.max", f"{int(limit * GIB)}\n")
        self.file(f"{box}.stat", f"anon 1\ninactive_file {GIB}\n")
        return self.file(f"{box}.current", f"{int((used + 1) * GIB)}\n")

    def memory_v1(self, limit: float) -> Machine:
        folder = "sys/fs/cgroup/memory"
        self.file("proc/self/cgroup", "4:memory:/docker\n1:cpu:/\n0::/\n")
        self.file(f"{folder}/memory.limit_in_bytes", "9223372036854771712\n")
        self.file(f"{folder}/docker/memory.limit_in_bytes", f"{int(limit * GIB)}\n")
        return self.file(f"{folder}/docker/memory.usage_in_bytes", "0\n")

    # What engines answer

    def answer(self, question: str, **value: Any) -> Machine:
        self.facts["answers"][question] = {"status": "ok", "value": value}
        return self

    def ran(self, question: str, where: str, half: str = "", **value: Any) -> Machine:
        for precision in ("fp32", "half"):
            extra = value | ({"precision": half} if half and precision == "half" else {})
            self.answer(
                f"{question} {precision}", providers=[where], on_provider=True, comparison=RIGHT, **extra
            )
        return self

    def gives(self, question: str, comparison: dict[str, Any]) -> Machine:
        self.facts["answers"][question]["value"]["comparison"] = comparison
        return self

    def fails(self, question: str, status: str, text: str) -> Machine:
        self.facts["answers"][question] = {"status": status, "text": text}
        return self

    def fell_back(self, provider: str) -> Machine:
        for precision in ("fp32", "half"):
            question = f"onnxruntime-run {provider} {precision}"
            self.answer(
                question, providers=[CPU], nodes={CPU: 27}, on_provider=False, comparison=RIGHT, version="1"
            )
        return self

    def kiln(self) -> Machine:
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


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's CASES, one test for each, by name; see ``machine_case``."""
    if "machine_case" in metafunc.fixturenames:
        cases = metafunc.module.CASES
        metafunc.parametrize("machine_case", cases, ids=[case[0] for case in cases], indirect=True)


@pytest.fixture
def machine_case(request: pytest.FixtureRequest, machine: Machine) -> Callable[[], None]:
    """Builds a machine, diagnoses it, and compares with everything that the case says.

    A case is ``(name, build, troubles, usable, exit_code)``; the last two may be left out. ``troubles`` names
    every warning and failure that comes, by id: one more or one less fails. Its text, parts of it divided by
    ``|``, stands in the finding, in its sentence, evidence or lines to type; ``!`` before it says that it is
    a failure. ``usable`` is a backend that works, or ``""`` if none does.
    """
    _, build, troubles, *rest = request.param
    return lambda: judge(build(machine).diagnose(), troubles, *rest)


def judge(
    diagnosis: Diagnosis, troubles: dict[str, str], usable: str | None = None, exit_code: int | None = None
) -> None:
    """Compare a diagnosis with all that a case says."""
    bad = [f for f in diagnosis.findings if f.verdict in (Verdict.WARNING, Verdict.FAILURE)]
    assert {f.id for f in bad} == set(troubles), [(f.id, text_of(f)) for f in bad]
    for finding in bad:
        wanted = troubles[finding.id]
        assert (finding.verdict is Verdict.FAILURE) is wanted.startswith("!"), text_of(finding)
        parts = wanted.removeprefix("!").split("|")
        assert [part for part in parts if part not in text_of(finding)] == [], text_of(finding)
        assert finding.fix, text_of(finding)
    if usable is not None:
        assert usable in diagnosis.usable if usable else diagnosis.usable == ()
    assert diagnosis.exit_code == (exit_code if exit_code is not None else bool(bad))


@pytest.fixture(name="judge")
def judge_fixture() -> Callable[..., None]:
    return judge


def text_of(finding: Finding) -> str:
    return "\n".join([finding.summary, *finding.evidence, *finding.fix])
