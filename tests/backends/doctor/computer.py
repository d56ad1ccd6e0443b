"""A computer made of small files: what Linux says of processor, memory and cards, and what engines answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from kiln.backends import registry

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


class Computer:
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

    def file(self, name: str, text: str | bytes = "") -> Self:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def fact(self, **facts: Any) -> Self:
        self.facts |= facts
        return self

    def set(self, **variables: str) -> Self:
        self.facts["environment"] |= variables
        return self

    def groups(self, *gids: int) -> Self:
        self.facts["user"]["groups"] = [USER, *gids]
        return self

    def device(self, name: str, gid: int = RENDER, mode: str = "0660") -> Self:
        self.facts["nodes"][name] = {"gid": gid, "mode": mode}
        return self

    def no_device(self, name: str) -> Self:
        del self.facts["nodes"][name]
        return self

    # Hardware

    def processor(self, kind: str, threads: int = 8) -> Self:
        flags = f"flags\t\t: fpu {FLAGS.get(kind, kind)}"
        one = f"processor\t: 0\nmodel name\t: Test {kind}\n{flags}\n"
        return self.file("proc/cpuinfo", "\n".join([one] * threads))

    def memory(self, total: float, available: float) -> Self:
        kib = [int(size * GIB / 1024) for size in (total, available)]
        return self.file("proc/meminfo", f"MemTotal: {kib[0]} kB\nMemFree: 1 kB\nMemAvailable: {kib[1]} kB\n")

    def pci(self, address: str, vendor: int, device: int, driver: str, base_class: int = 0x03) -> Self:
        folder = f"sys/bus/pci/devices/{address}"
        self.file(f"{folder}/vendor", f"0x{vendor:04x}\n").file(f"{folder}/device", f"0x{device:04x}\n")
        self.file(f"{folder}/class", f"0x{base_class:02x}0000\n")
        return self.file(f"{folder}/uevent", f"DRIVER={driver}\n" if driver else "PCI_ID=1:1\n")

    def amd(self, gfx: str, vram: float = 24, used: float = 1, gtt: float = 16) -> Self:
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

    def nvidia(self, device: int = 0x2684, driver: str = "580.95.05", capability: str = "8.9") -> Self:
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

    def intel(self, device: int, address: str = "0000:03:00.0", driver: str = "xe") -> Self:
        """Graphics with driver, OpenCL and permissions."""
        self.pci(address, 0x8086, device, driver).file(f"sys/bus/pci/devices/{address}/drm/renderD128/dev")
        self.file("etc/OpenCL/vendors/intel.icd", "libigdrcl.so").answer("dlopen libOpenCL.so.1")
        return self.device("/dev/dri/renderD128")

    def npu(self) -> Self:
        self.pci("0000:00:0b.0", 0x8086, 0x643E, "intel_vpu", 0x12).device("/dev/accel/accel0")
        return self.answer("dlopen libze_intel_npu.so.1")

    def container(self) -> Self:
        return self.file(".dockerenv")

    def wsl(self) -> Self:
        self.file("proc/version", "Linux version 6.6.87.2-microsoft-standard-WSL2\n")
        return self.device("/dev/dxg", 0, "0666")

    def arm(self) -> Self:
        return self.file("proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 sve\n")

    def quota_v2(self, text: str) -> Self:
        return self.file("proc/self/cgroup", "0::/box\n").file("sys/fs/cgroup/box/cpu.max", f"{text}\n")

    def memory_v2(self, limit: float, used: float) -> Self:
        box = "sys/fs/cgroup/box/memory"
        self.file("proc/self/cgroup", "0::/box\n").file(f"{box}.max", f"{int(limit * GIB)}\n")
        self.file(f"{box}.stat", f"anon 1\ninactive_file {GIB}\n")
        return self.file(f"{box}.current", f"{int((used + 1) * GIB)}\n")

    def memory_v1(self, limit: float) -> Self:
        folder = "sys/fs/cgroup/memory"
        self.file("proc/self/cgroup", "4:memory:/docker\n1:cpu:/\n0::/\n")
        self.file(f"{folder}/memory.limit_in_bytes", "9223372036854771712\n")
        self.file(f"{folder}/docker/memory.limit_in_bytes", f"{int(limit * GIB)}\n")
        return self.file(f"{folder}/docker/memory.usage_in_bytes", "0\n")

    # What engines answer

    def answer(self, question: str, **value: Any) -> Self:
        self.facts["answers"][question] = {"status": "ok", "value": value}
        return self

    def gives(self, question: str, comparison: dict[str, Any]) -> Self:
        self.facts["answers"][question]["value"]["comparison"] = comparison
        return self

    def fails(self, question: str, status: str, text: str) -> Self:
        self.facts["answers"][question] = {"status": status, "text": text}
        return self
