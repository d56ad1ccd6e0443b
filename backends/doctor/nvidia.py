"""NVIDIA: driver against the CUDA of the packages, the GPU's age, and the TensorRT trap.

Sources: NVIDIA's "CUDA Compatibility", table of minor version compatibility (CUDA 12 needs driver 525,
CUDA 13 needs 580); the CUDA 13 release notes (Maxwell, Pascal and Volta are gone); onnxruntime-gpu's own
files.
"""

from __future__ import annotations

import re

from .amd_kernels import torch_build
from .container import is_wsl
from .finding import Finding, absent, failure, ok, warning
from .packages import wheel
from .pci import PciDevice, pci_devices
from .system import System, version_tuple

VENDOR = 0x10DE
DRIVER_FLOOR = {12: 525, 13: 580}
LAST_CUDA12 = "1.26.0"  # of onnxruntime-gpu
LAST_TENSORRT10 = "10.16.1.11"
TURING = (7, 5)  # the oldest compute capability of CUDA 13

# PCI device ids by generation, for machines whose driver does not answer. Source: the ids that the
# nouveau and nvidia-open drivers list by chip.
_GENERATIONS = (
    (0x1340, 0x17FF, "Maxwell", (5, 2)),
    (0x15F0, 0x15FF, "Pascal", (6, 0)),
    (0x1B00, 0x1D7F, "Pascal", (6, 1)),
    (0x1D80, 0x1DFF, "Volta", (7, 0)),
)


def nvidia_pci(system: System) -> list[PciDevice]:
    """NVIDIA's GPUs on the PCI bus."""
    return pci_devices(system, VENDOR)


def present(system: System) -> bool:
    """Whether there is an NVIDIA GPU: on the bus, as a device file, or behind WSL."""
    if nvidia_pci(system) or system.exists("/proc/driver/nvidia/version"):
        return True
    if system.node("/dev/nvidia0") is not None or system.node("/dev/nvidiactl") is not None:
        return True
    return is_wsl(system) and system.exists("/usr/lib/wsl/lib/libcuda.so.1")


def driver_version(system: System) -> str:
    """The kernel driver's version, from the module itself, empty if none is loaded."""
    found = re.search(r"Kernel Module[^\n]*?\s(\d{3,}(?:\.\d+)+)", system.read("/proc/driver/nvidia/version"))
    return found.group(1) if found else system.read("/sys/module/nvidia/version")


def cuda_majors(system: System) -> dict[str, int]:
    """The CUDA that each installed package was built for."""
    found = {}
    gpu, torch = wheel(system, "onnxruntime-gpu"), torch_build(system)
    if gpu:
        found[f"onnxruntime-gpu {gpu.distribution.version}"] = gpu.cuda_major
    if torch and torch.cuda:
        found[f"torch {torch.version}"] = version_tuple(torch.cuda)[0]
    return found


def check_driver(system: System) -> list[Finding]:
    """D-NV-DRV: a driver is loaded, new enough for the CUDA of what is installed."""
    if not present(system):
        return [absent("D-NV-DRV", "there is no NVIDIA GPU")]
    cards = nvidia_pci(system)
    evidence = [card.line for card in cards]
    version = driver_version(system)
    if not version:
        if is_wsl(system):
            return [
                ok("D-NV-DRV", "the driver is that of Windows", "/usr/lib/wsl/lib/libcuda.so.1", *evidence)
            ]
        nouveau = [c for c in cards if c.driver in ("nouveau", "nova_core")]
        text = (
            f"the card runs on {nouveau[0].driver}, which has no CUDA"
            if nouveau
            else "an NVIDIA GPU, but no NVIDIA driver"
        )
        fix = ["sudo ubuntu-drivers install", "sudo reboot"]
        return [failure("D-NV-DRV", text, [*evidence, "/proc/driver/nvidia/version is missing"], fix)]
    evidence.insert(0, f"/proc/driver/nvidia/version: {version}")
    major = version_tuple(version)[0]
    for package, cuda in cuda_majors(system).items():
        floor = DRIVER_FLOOR.get(cuda, 0)
        evidence.append(f"{package} is built for CUDA {cuda}, which needs driver {floor} or newer")
        if major < floor:
            text = f"driver {version} is too old for {package} (CUDA {cuda} needs {floor})"
            return [failure("D-NV-DRV", text, evidence, _old_driver_fix(package, cuda))]
    return [ok("D-NV-DRV", f"NVIDIA driver {version}", *evidence)]


def _old_driver_fix(package: str, cuda: int) -> list[str]:
    fix = ["sudo ubuntu-drivers install && sudo reboot"]
    if cuda == 13 and package.startswith("onnxruntime-gpu"):
        fix.append(f"Or stay on this driver: pip install 'onnxruntime-gpu[cuda,cudnn]=={LAST_CUDA12}'.")
    return fix


def check_capability(system: System) -> list[Finding]:
    """D-NV-CC: the GPU is not older than the CUDA of what is installed supports."""
    if not present(system):
        return [absent("D-NV-CC", "there is no NVIDIA GPU")]
    known = _capabilities(system)
    if not known:
        return [absent("D-NV-CC", "the compute capability is not known: the driver did not answer")]
    evidence = [f"{name}: compute capability {major}.{minor} ({how})" for name, (major, minor), how in known]
    name, oldest, _ = min(known, key=lambda row: row[1])
    cuda13 = [package for package, major in cuda_majors(system).items() if major >= 13]
    if oldest >= TURING or not cuda13:
        return [ok("D-NV-CC", f"{name}: compute capability {oldest[0]}.{oldest[1]}", *evidence)]
    text = f"{name} is older than Turing: CUDA 13, so {' and '.join(cuda13)}, has no code for it"
    fix = [f"pip install 'onnxruntime-gpu[cuda,cudnn]=={LAST_CUDA12}'"]
    if any(package.startswith("torch") for package in cuda13):
        fix.append("Install a torch built for CUDA 12.6 by PyTorch's page 'Start Locally'.")
    return [failure("D-NV-CC", text, evidence, fix)]


def _capabilities(system: System) -> list[tuple[str, tuple[int, int], str]]:
    """Name, compute capability and source for each GPU: what the driver says, else what the PCI id tells."""
    if system.ask is not None:
        answer = system.ask(("cuda-devices",))
        rows = answer.value.get("devices", []) if answer.ok else []
        if isinstance(rows, list) and rows:
            return [(str(r["name"]), (int(r["major"]), int(r["minor"])), "libcuda.so.1") for r in rows]
    found = []
    for card in nvidia_pci(system):
        for first, last, generation, capability in _GENERATIONS:
            if first <= card.device <= last:
                found.append((f"{generation} 10de:{card.device:04x}", capability, "by its PCI id"))
    return found


def check_tensorrt(system: System) -> list[Finding]:
    """D-NV-TRT: the TensorRT that is installed is the one the provider is linked to."""
    gpu = wheel(system, "onnxruntime-gpu")
    found = system.distribution("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    if gpu is None or found is None:
        return [absent("D-NV-TRT", "onnxruntime-gpu and TensorRT are not both installed")]
    linked = next(iter(gpu.sonames("TensorrtExecutionProvider", "libnvinfer")), "libnvinfer.so.10")
    want, have = int(linked.rsplit(".", 1)[1]), version_tuple(found.version)[0]
    evidence = [
        f"onnxruntime-gpu {gpu.distribution.version} is linked to {linked}",
        f"{found.name} {found.version} brings libnvinfer.so.{have}",
    ]
    if want == have:
        return [ok("D-NV-TRT", f"{found.name} {found.version} fits onnxruntime-gpu", *evidence)]
    text = f"TensorRT {found.version} does not fit: the provider wants {linked} and fails without a word"
    pinned = f"tensorrt-cu{gpu.cuda_major}=={LAST_TENSORRT10}" if want == 10 else f"tensorrt=={want}.*"
    fix = [f"pip uninstall -y {found.name}", f"pip install '{pinned}'"]
    return [failure("D-NV-TRT", text, evidence, fix)]


def check_engine(system: System) -> list[Finding]:
    """D-NV-ENGINE: something is installed that uses the GPU."""
    if not present(system):
        return [absent("D-NV-ENGINE", "there is no NVIDIA GPU")]
    packages = cuda_majors(system)
    if packages:
        return [ok("D-NV-ENGINE", f"{' and '.join(packages)} can use the NVIDIA GPU")]
    torch = torch_build(system)
    evidence = [f"torch {torch.version}: {torch.kind}"] if torch else ["torch is not installed"]
    driver = version_tuple(driver_version(system))
    pin = f"=={LAST_CUDA12}" if driver and driver[0] < DRIVER_FLOOR[13] else ""
    fix = ["pip uninstall -y onnxruntime", f"pip install 'onnxruntime-gpu[cuda,cudnn]{pin}'"]
    text = "an NVIDIA GPU, and no engine installed that uses it"
    return [warning("D-NV-ENGINE", text, [*evidence, "onnxruntime-gpu is not installed"], fix)]
