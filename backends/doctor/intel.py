"""Intel: the graphics driver and its OpenCL library, which OpenVINO's GPU plugin needs, and the NPU.

Sources: OpenVINO's "Configurations for Intel GPU" and "for Intel NPU"; intel/linux-npu-driver for the library
that was called libze_intel_vpu.so before version 1.16.
"""

from __future__ import annotations

from .amd_topology import useful_gpus
from .finding import Finding, Verdict, absent, failure, ok, warning
from .nvidia import nvidia_pci
from .pci import ACCELERATOR, DISPLAY, PciDevice, pci_devices
from .permission import device_permission
from .system import System

VENDOR = 0x8086
_DRIVERS = ("i915", "xe")
_INTEGRATED = "0000:00:02.0"  # where Intel's processors have their graphics; a card is behind a bridge
ACCEL = "/dev/accel/accel0"


def gpus(system: System) -> list[PciDevice]:
    """Intel's graphics, cards and integrated ones."""
    return [d for d in pci_devices(system, VENDOR) if d.base_class == DISPLAY]


def npus(system: System) -> list[PciDevice]:
    """Intel's neural processing units."""
    return [d for d in pci_devices(system, VENDOR) if d.base_class == ACCELERATOR]


def cards(system: System) -> list[PciDevice]:
    """The graphics that are not part of the processor: Arc and Data Center GPUs."""
    return [gpu for gpu in gpus(system) if gpu.address != _INTEGRATED]


def check_gpu(system: System) -> list[Finding]:
    """D-INTEL-GPU: driver, device file and OpenCL library are there."""
    found = cards(system) or gpus(system)
    if not found:
        return [absent("D-INTEL-GPU", "there is no Intel GPU")]
    if not cards(system) and (nvidia_pci(system) or useful_gpus(system)):
        return [absent("D-INTEL-GPU", "the graphics of the Intel processor are left alone beside a card")]
    if not cards(system) and system.distribution("openvino") is None:
        return [absent("D-INTEL-GPU", "OpenVINO, which could use the Intel graphics, is not installed")]
    gpu = found[0]
    what = f"Intel {'card' if cards(system) else 'graphics'} 8086:{gpu.device:04x}"
    evidence = [gpu.line]
    if gpu.driver not in _DRIVERS:
        text = f"{what} has no driver of Intel ({gpu.driver or 'none'} is bound)"
        fix = ["sudo modprobe xe || sudo modprobe i915", "Arc B needs kernel 6.12 or newer, Arc A 6.2."]
        return [failure("D-INTEL-GPU", text, evidence, fix)]
    render = _render_node(system, gpu)
    if system.user is not None:
        permission = device_permission("D-INTEL-GPU", system, [render])
        if permission.verdict is not Verdict.OK:
            return [permission]
        evidence += permission.evidence
    missing = _missing_opencl(system)
    if missing:
        text = f"{what}: the OpenCL driver that OpenVINO needs is missing"
        fix = ["sudo apt install intel-opencl-icd ocl-icd-libopencl1"]
        return [warning("D-INTEL-GPU", text, [*evidence, *missing], fix)]
    return [ok("D-INTEL-GPU", f"{what} has driver {gpu.driver} and OpenCL", *evidence)]


def _render_node(system: System, gpu: PciDevice) -> str:
    names = system.names(f"/sys/bus/pci/devices/{gpu.address}/drm")
    return f"/dev/dri/{next((n for n in names if n.startswith('renderD')), 'renderD128')}"


def _missing_opencl(system: System) -> list[str]:
    """What of OpenCL is not there; without the live system only the registration is looked at."""
    missing = []
    vendors = [n for n in system.names("/etc/OpenCL/vendors") if "intel" in n.lower()]
    if not vendors:
        missing.append("/etc/OpenCL/vendors has no intel.icd")
    if system.ask is not None:
        answer = system.ask(("dlopen", "libOpenCL.so.1"))
        if not answer.ok:
            missing.append(f"libOpenCL.so.1: {answer.text}")
    return missing


def check_npu(system: System) -> list[Finding]:
    """D-NPU: driver, device file and Level Zero library are there. Kiln does not need an NPU."""
    found = npus(system)
    if not found:
        return [absent("D-NPU", "there is no Intel NPU")]
    if system.distribution("openvino") is None:
        return [absent("D-NPU", "OpenVINO, which could use the Intel NPU, is not installed")]
    npu = found[0]
    evidence = [npu.line]
    if npu.driver != "intel_vpu":
        fix = ["sudo modprobe intel_vpu", "sudo dmesg | grep intel_vpu"]
        return [warning("D-NPU", "an Intel NPU without its driver intel_vpu", evidence, fix)]
    if system.user is not None:
        permission = device_permission("D-NPU", system, [ACCEL])
        if permission.verdict is not Verdict.OK:
            return [permission]
        evidence += permission.evidence
    if system.ask is not None:
        names = ("libze_intel_npu.so.1", "libze_intel_vpu.so.1")
        answers = {name: system.ask(("dlopen", name)) for name in names}
        if not any(answer.ok for answer in answers.values()):
            text = "an Intel NPU without the Level Zero driver"
            seen = [f"{name}: {answer.text}" for name, answer in answers.items()]
            fix = ["Install intel-level-zero-npu and intel-driver-compiler-npu from intel/linux-npu-driver."]
            return [warning("D-NPU", text, [*evidence, *seen], fix)]
    return [ok("D-NPU", "the Intel NPU has driver, device file and library", *evidence)]
