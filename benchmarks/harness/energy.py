"""Joules by a counter of the hardware, or none: never an estimate from a data sheet.

``rapl`` is what Intel's and AMD's processors count, by Linux's powercap (readable by root only since
CVE-2020-8694); ``nvml_counter`` NVIDIA's per-GPU counter; ``amdsmi_counter`` AMD's. All count the whole
package or card, so what else runs there is in the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..records.record import Energy
from . import nvml

IDLE_S = 3.0
NONE = "none"


@dataclass
class Meter:
    """A counter of joules, by name; ``read`` gives None when it fails."""

    method: str
    read: Callable[[], float | None]


@dataclass
class EnergyUse:
    """What the timed batches of one configuration took: joules and seconds, summed batch by batch."""

    meter: Meter | None
    idle_watts: float | None = None
    joules: float = 0.0
    seconds: float = 0.0
    batches: int = 0
    _start: float | None = field(default=None, repr=False)

    def begin(self) -> None:
        """A batch is about to be drawn."""
        self._start = self.meter.read() if self.meter else None

    def end(self, seconds: float) -> None:
        """It was drawn in so many seconds."""
        now = self.meter.read() if self.meter else None
        if self._start is None or now is None:
            return
        self.joules += now - self._start
        self.seconds += seconds
        self.batches += 1

    def per_image(self, batch: int) -> Energy:
        """The figures; ``none`` when nothing was counted."""
        if self.meter is None or not self.batches:
            return Energy()
        images = self.batches * batch
        net = None
        if self.idle_watts is not None:
            net = max(0.0, self.joules - self.idle_watts * self.seconds) / images
        return Energy(self.meter.method, self.joules / images, self.idle_watts, net)


def find_meter(device: str, root: Path = Path("/")) -> Meter | None:
    """The counter for a device, None without one.

    Args:
        device: as a component reports it: ``cpu``, ``CPU``, ``cuda:0``, ``rocm:0``, ``GPU.0``, ...
        root: where ``sys`` lies; another folder for tests.
    """
    kind = device.lower().split(":")[0].split(".")[0]
    if kind in ("cuda", "nvidia"):
        found = Meter("nvml_counter", nvml.total_energy_joules)
    elif kind in ("rocm", "hip", "migraphx"):
        found = Meter("amdsmi_counter", amd_joules)
    elif kind == "cpu":
        found = Meter("rapl", Rapl(root).joules)
    else:
        return None
    return found if found.read() is not None else None


def measure_idle(meter: Meter, seconds: float = IDLE_S) -> float | None:
    """Watts while nothing of ours works."""
    before, start = meter.read(), time.monotonic()
    time.sleep(seconds)
    after = meter.read()
    if before is None or after is None:
        return None
    return (after - before) / (time.monotonic() - start)


class Rapl:
    """The package counters of powercap; see Linux Documentation/power/powercap/powercap.rst.

    Each counts microjoules up to ``max_energy_range_uj`` and begins anew, which takes a minute or more.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]  # packages, not their parts
        self._last: dict[Path, int] = {}
        self._total: float = 0.0

    def joules(self) -> float | None:
        """Since this object was first asked; None where there are no counters or they may not be read."""
        if not self._zones:
            return None
        try:
            for zone in self._zones:
                now = int((zone / "energy_uj").read_text())
                step = now - self._last.get(zone, now)
                if step < 0:
                    step += int((zone / "max_energy_range_uj").read_text())
                self._last[zone] = now
                self._total += step / 1e6
        except (OSError, ValueError):
            return None
        return self._total


def amd_joules() -> float | None:
    """What all AMD GPUs have used, by ``amdsmi`` if installed: accumulator times resolution, in µJ."""
    try:
        import amdsmi  # type: ignore[import-not-found, unused-ignore]

        amdsmi.amdsmi_init()
        total = 0.0
        for handle in amdsmi.amdsmi_get_processor_handles():
            row = amdsmi.amdsmi_get_energy_count(handle)
            count = row.get("energy_accumulator", row.get("power"))
            total += float(count) * float(row["counter_resolution"]) / 1e6
    except Exception:  # a binding that does not fit the driver raises whatever it likes
        return None
    return total
