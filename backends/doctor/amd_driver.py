"""From the card to a device file that may be opened: kernel driver, compute device, permissions."""

from __future__ import annotations

from .amd_topology import TOPOLOGY, amd_gpus, amd_pci, concerns
from .container import container_kind
from .finding import Finding, absent, failure, ok
from .permission import container_fix, device_permission
from .system import System

KFD = "/dev/kfd"


def check_driver(system: System) -> list[Finding]:
    """D-AMD-DRV: the amdgpu driver is loaded and has the cards."""
    cards = amd_pci(system)
    if not concerns(system):
        only = [f"{gpu.title}, {gpu.source}: drives screens only" for gpu in amd_gpus(system)]
        return [absent("D-AMD-DRV", "there is no AMD GPU to compute on", *only)]
    seen = [card.line for card in cards]
    loaded = system.exists("/sys/module/amdgpu")
    bound = not cards or any(card.driver == "amdgpu" for card in cards)
    if loaded and bound:
        version = system.read("/sys/module/amdgpu/version")
        return [
            ok("D-AMD-DRV", f"the amdgpu driver is loaded {version}".rstrip(), "/sys/module/amdgpu", *seen)
        ]
    if loaded:
        other = ", ".join(sorted({card.driver or "no driver" for card in cards}))
        text = f"the amdgpu driver is loaded but the card belongs to {other}"
        fix = ["lspci -nnk -d 1002:", "sudo dmesg | grep -i amdgpu"]
        return [failure("D-AMD-DRV", text, seen, fix)]
    where = container_kind(system)
    fix = (
        ["Load the driver on the host: sudo modprobe amdgpu."]
        if where
        else ["sudo modprobe amdgpu", "sudo dmesg | grep -i amdgpu"]
    )
    return [
        failure(
            "D-AMD-DRV", "an AMD GPU, but no amdgpu driver", ["/sys/module/amdgpu is missing", *seen], fix
        )
    ]


def check_kfd(system: System) -> list[Finding]:
    """D-AMD-KFD: the compute device exists and offers a GPU."""
    if not concerns(system) or not system.exists("/sys/module/amdgpu"):
        return [absent("D-AMD-KFD", "there is no AMD driver to ask")]
    gpus = amd_gpus(system)
    if system.node(KFD) is not None:
        if gpus:
            return [ok("D-AMD-KFD", f"{KFD} is there", *(f"{gpu.gfx}: {gpu.source}" for gpu in gpus))]
        text = "the driver offers no GPU for computing"
        fix = ["sudo dmesg | grep -iE 'kfd|atomics'", "Old GPUs, and slots without PCIe atomics, have none."]
        return [
            failure("D-AMD-KFD", text, [f"{KFD} is there", f"no gfx_target_version below {TOPOLOGY}"], fix)
        ]
    kind = container_kind(system)
    if kind:
        return [
            failure(
                "D-AMD-KFD",
                f"{KFD} was not passed into this container",
                [f"{KFD} is missing", kind],
                container_fix([KFD, "/dev/dri"]),
            )
        ]
    fix = ["sudo dmesg | grep -i kfd", "Old GPUs and kernels without HSA_AMD have no compute device."]
    return [failure("D-AMD-KFD", f"the driver is loaded but {KFD} is missing", [f"{KFD} is missing"], fix)]


def check_permission(system: System) -> list[Finding]:
    """D-AMD-PERM: this process may open the device files; if not, is a group missing or only a login."""
    wanted = [KFD, *dict.fromkeys(gpu.render for gpu in amd_gpus(system) if gpu.render)]
    if not concerns(system) or system.node(KFD) is None:
        return [absent("D-AMD-PERM", "there is no compute device to open")]
    if system.user is None:
        return [absent("D-AMD-PERM", "whose permissions to look at is not known")]
    return [device_permission("D-AMD-PERM", system, wanted)]
