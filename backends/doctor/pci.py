"""The GPUs and accelerators on the PCI bus, whether a driver has them or not."""

from __future__ import annotations

from dataclasses import dataclass

from .system import System, number

DISPLAY, ACCELERATOR = 0x03, 0x12  # PCI base classes; NPUs and Instinct MI300 are processing accelerators


@dataclass(frozen=True)
class PciDevice:
    """A PCI device: address, ids, base class and the kernel driver bound to it, if any."""

    address: str
    vendor: int
    device: int
    base_class: int
    driver: str

    @property
    def line(self) -> str:
        """As evidence: ``0000:03:00.0: 1002:744c, driver amdgpu``."""
        return f"{self.address}: {self.vendor:04x}:{self.device:04x}, driver {self.driver or 'none'}"


def pci_devices(system: System, vendor: int) -> list[PciDevice]:
    """The GPUs and accelerators of one vendor, by address."""
    found = []
    for address in system.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{address}"
        ids = [number(system.read(f"{folder}/{name}")) for name in ("vendor", "device", "class")]
        if None in ids or ids[0] != vendor:
            continue
        _, device, pci_class = (value or 0 for value in ids)
        if pci_class >> 16 in (DISPLAY, ACCELERATOR):
            driver = system.fields(f"{folder}/uevent", "=").get("DRIVER", "")
            found.append(PciDevice(address, vendor, device, pci_class >> 16, driver))
    return found
