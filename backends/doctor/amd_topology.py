"""The AMD GPUs of a machine, from sysfs: no ROCm package is needed.

Sources: Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c for what the files hold; the way ollama reads them
(discover/amd_linux.go).
"""

from __future__ import annotations

from dataclasses import dataclass

from .amd_cards import Card, card_of, gfx_name
from .pci import PciDevice, pci_devices
from .system import System, number

VENDOR = 0x1002
TOPOLOGY = "/sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class AmdGpu:
    """One GPU as the compute driver sees it; ``index`` counts as HIP does, in the order of the nodes.

    ``vram`` is its own memory in bytes, ``gtt`` what it may use of the machine's; None where not said.
    """

    index: int
    gfx: str
    card: Card | None
    source: str
    render: str
    vram: int | None
    vram_used: int | None
    gtt: int | None

    @property
    def title(self) -> str:
        """``gfx1100 (RX 7900 XTX, ...)``."""
        return f"{self.gfx} ({self.card.names})" if self.card else self.gfx

    @property
    def integrated(self) -> bool:
        """Whether it is part of the processor."""
        return bool(self.card and self.card.integrated)


def amd_pci(system: System) -> list[PciDevice]:
    """AMD's GPUs on the PCI bus."""
    return pci_devices(system, VENDOR)


def amd_gpus(system: System) -> list[AmdGpu]:
    """The GPUs the compute driver offers, without processors."""
    found: list[AmdGpu] = []
    for node in system.names(TOPOLOGY):
        source = f"{TOPOLOGY}/{node}/properties"
        fields = system.fields(source)
        gfx = gfx_name(number(fields.get("gfx_target_version", "")) or 0)
        if not gfx:
            continue
        minor = fields.get("drm_render_minor", "")
        render = f"/dev/dri/renderD{minor}" if minor not in ("", "0") else ""
        memory = [
            number(system.read(f"/sys/class/drm/renderD{minor}/device/mem_info_{name}"))
            for name in ("vram_total", "vram_used", "gtt_total")
        ]
        found.append(AmdGpu(len(found), gfx, card_of(gfx), source, render, *memory))
    return found


def useful_gpus(system: System) -> list[AmdGpu]:
    """The GPUs worth computing on: without those that are only there to drive a screen."""
    return [gpu for gpu in amd_gpus(system) if not (gpu.card and gpu.card.display)]


def concerns(system: System) -> bool:
    """Whether AMD's checks have anything to look at: a GPU that is more than a screen's driver."""
    gpus = amd_gpus(system)
    return bool(useful_gpus(system)) if gpus else bool(amd_pci(system))
