"""Whether the machine was fit to measure on: what changed while it was measured, and who else was working."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..machine import load_average
from ..records.bootstrap import ratio_interval
from ..records.record import Noise, NoiseReport, Sample
from ..records.stats import INTERVAL_LEAST
from . import nvml

# Shares of the machine's processor time in the window. What others take from the measured process shows in
# its times from a few per cent on; a hypervisor's steal is time in which nothing of ours could run.
OTHERS_NOISY, OTHERS_INVALID = 0.05, 0.50
STEAL_NOISY, STEAL_INVALID = 0.01, 0.20
FREQUENCY_DROP_NOISY = 0.10
AA_NOISY, AA_INVALID = 0.05, 0.20
DRIFT_NOISY = 0.05
_DRIFT_LEAST = 6  # samples: two thirds of fewer say nothing
_TICK_S = 1.0
# NVML bits of nvmlClocksThrottleReasons that mean heat or power: SwPowerCap, HwSlowdown, SwThermalSlowdown,
# HwThermalSlowdown, HwPowerBrakeSlowdown. Source: NVIDIA, NVML API reference, nvmlClocksThrottleReasons.
_GPU_THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class Snapshot:
    """The machine at one moment; None and empty where it does not say.

    ``busy_s``, ``steal_s`` are processor seconds of all processors since the start of the machine, ``own_s``
    those of the harness and its workers.
    """

    at: float
    processors: int
    load: float | None
    busy_s: float | None
    steal_s: float | None
    own_s: float
    throttled: int | None
    mhz: float | None
    celsius: float | None
    gpus: tuple[Mapping[str, Any], ...] = ()


def snapshot(own_s: float, root: Path = Path("/")) -> Snapshot:
    """Read it now.

    Args:
        own_s: processor seconds that the measured processes have used so far.
        root: where ``proc`` and ``sys`` lie; another folder for tests.
    """
    busy, steal = _processor_seconds(root / "proc/stat")
    return Snapshot(
        at=time.monotonic(),
        processors=os.cpu_count() or 1,
        load=load_average(),
        busy_s=busy,
        steal_s=steal,
        own_s=own_s + sum(os.times()[:2]),
        throttled=_throttled(root),
        mhz=_mhz(root),
        celsius=_celsius(root),
        gpus=tuple(nvml.state()),
    )


@dataclass
class NoiseWatch:
    """Looks at the machine before, after, and in between."""

    before: Snapshot
    frequencies: list[float] = field(default_factory=list)
    _last: float = 0.0

    def tick(self, root: Path = Path("/")) -> None:
        """Take note of the frequency, once a second at most; called when a batch has just ended."""
        if time.monotonic() - self._last >= _TICK_S:
            self._last = time.monotonic()
            mhz = _mhz(root)
            if mhz:
                self.frequencies.append(mhz)


def judge_machine(before: Snapshot, after: Snapshot, frequencies: Sequence[float] = ()) -> NoiseReport:
    """The verdict on the time between two moments."""
    found: list[tuple[Noise, str]] = []
    seconds = (after.at - before.at) * before.processors
    facts: dict[str, Any] = {"seconds": round(after.at - before.at, 3)}
    for name in ("load", "mhz", "celsius", "throttled"):
        facts[name] = {"before": getattr(before, name), "after": getattr(after, name)}
    if seconds > 0 and None not in (before.busy_s, after.busy_s, before.steal_s, after.steal_s):
        own = after.own_s - before.own_s
        others = max(0.0, (_less(after.busy_s, before.busy_s) - own) / seconds)
        steal = _less(after.steal_s, before.steal_s) / seconds
        facts |= {"others_share": round(others, 4), "steal_share": round(steal, 4)}
        found += _graded(
            others, OTHERS_NOISY, OTHERS_INVALID, "other processes took {} of the processor time"
        )
        found += _graded(steal, STEAL_NOISY, STEAL_INVALID, "the hypervisor took {} of the processor time")
    if (after.throttled or 0) > (before.throttled or 0):
        found.append(("noisy", "the processor was throttled by heat"))
    if len(frequencies) >= 4:
        quarter = len(frequencies) // 4
        first, last = mean(frequencies[:quarter]), mean(frequencies[-quarter:])
        facts["mhz"] |= {"first": round(first), "last": round(last)}
        if last < first * (1 - FREQUENCY_DROP_NOISY):
            found.append(("noisy", f"the processor's clock fell from {first:.0f} to {last:.0f} MHz"))
    found += _judge_gpus(before, after, facts)
    return report(found, facts)


def judge_samples(samples: Sequence[Sample], modes: int) -> list[tuple[Noise, str]]:
    """What the times themselves give away: two groups, or a drift from the first third to the last."""
    found: list[tuple[Noise, str]] = []
    if modes > 1:
        found.append(("noisy", "the times fall into two separate groups; the median lies in one of them"))
    third = len(samples) // 3
    if len(samples) >= _DRIFT_LEAST:
        first = median(s.seconds for s in samples[:third])
        last = median(s.seconds for s in samples[-third:])
        drift = last / first - 1
        if abs(drift) > DRIFT_NOISY and _separate(samples[:third], samples[-third:]):
            found.append(("noisy", f"the times drifted by {drift:+.1%} from the first third to the last"))
    return found


def aa_difference(first: Sequence[Sample], second: Sequence[Sample]) -> float | None:
    """The relative difference of the medians of two runs of the same; None where one has no samples."""
    if not first or not second:
        return None
    a, b = median(s.seconds for s in first), median(s.seconds for s in second)
    return abs(a / b - 1)


def aa_floor(first: Sequence[Sample], second: Sequence[Sample]) -> float | None:
    """How far apart the medians of two runs of the same may be: the noise floor of an A/A pair.

    The difference itself may be 0 by luck. This is the far end of the 95 % bootstrap interval of the ratio,
    as a distance from 1 in whichever direction is farther, so it is never less than what the spread of the
    samples leaves open. Each side is resampled by itself, as in a comparison of two runs at two times.

    Returns:
        None where a side has fewer than ``INTERVAL_LEAST`` samples, of which no interval is of 95 %.
    """
    if min(len(first), len(second)) < INTERVAL_LEAST:
        return None
    low, high = ratio_interval([s.seconds for s in first], [s.seconds for s in second])
    return max(1 / low, high) - 1


def judge_aa(difference: float) -> list[tuple[Noise, str]]:
    """What a difference between two runs of the same configuration says."""
    return _graded(difference, AA_NOISY, AA_INVALID, "two runs of the same configuration differ by {}")


def report(
    found: Sequence[tuple[Noise, str]], facts: Mapping[str, Any], floor: float | None = None
) -> NoiseReport:
    """The worst of what was found, with all reasons."""
    grades = [grade for grade, _ in found]
    verdict: Noise = "invalid" if "invalid" in grades else "noisy" if grades else "clean"
    return NoiseReport(verdict, tuple(text for _, text in found), floor, facts)


def _graded(share: float, noisy: float, invalid: float, text: str) -> list[tuple[Noise, str]]:
    if share <= noisy:
        return []
    return [("invalid" if share > invalid else "noisy", text.format(f"{share:.1%}"))]


def _separate(first: Sequence[Sample], last: Sequence[Sample]) -> bool:
    """Whether a shift is more than chance: no value of one third within the other's."""
    a, b = [s.seconds for s in first], [s.seconds for s in last]
    return max(a) < min(b) or max(b) < min(a)


def _judge_gpus(before: Snapshot, after: Snapshot, facts: dict[str, Any]) -> list[tuple[Noise, str]]:
    if not after.gpus:
        return []
    facts["gpus"] = {"before": list(before.gpus), "after": list(after.gpus)}
    found: list[tuple[Noise, str]] = []
    for index, row in enumerate(after.gpus):
        if int(row.get("throttle_reasons", 0)) & _GPU_THROTTLED:
            found.append(("noisy", f"GPU {index} was throttled by heat or power"))
    return found


def _less(after: float | None, before: float | None) -> float:
    return (after or 0.0) - (before or 0.0)


def _processor_seconds(path: Path) -> tuple[float | None, float | None]:
    """Busy and stolen seconds of all processors; columns as in proc(5): user nice system ..."""
    try:
        row = path.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = (int(n) for n in row[:8])
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None, None
    return (user + nice + system + irq + softirq) / hertz, steal / hertz


def _throttled(root: Path) -> int | None:
    """How often processors were throttled since the start; Intel's kernel driver counts it."""
    pattern = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"
    counts = [n for path in root.glob(pattern) if (n := _number(path)) is not None]
    return int(sum(counts)) if counts else None


def _mhz(root: Path) -> float | None:
    """The mean clock of all processors."""
    pattern = "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"
    clocks = [n / 1000 for path in root.glob(pattern) if (n := _number(path))]
    if not clocks:
        try:
            lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
            clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        except (OSError, ValueError, IndexError):
            return None
    return round(mean(clocks), 1) if clocks else None


def _celsius(root: Path) -> float | None:
    """The hottest of the kernel's thermal zones."""
    found = [n / 1000 for path in root.glob("sys/class/thermal/thermal_zone*/temp") if (n := _number(path))]
    return max(found, default=None)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
