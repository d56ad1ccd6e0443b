"""NVIDIA's management library where its Python binding (nvidia-ml-py) is installed, else nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def library() -> Any:
    """The initialised ``pynvml``, None without it or without a driver."""
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
    except Exception:  # the binding maps every failure of the driver to its own class
        return None
    return pynvml


def handles() -> list[Any]:
    """One handle per GPU."""
    nvml = library()
    if nvml is None:
        return []
    with contextlib.suppress(nvml.NVMLError):
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    return []


def process_memory(pid: int) -> int | None:
    """Bytes that a process holds on all GPUs, None where the driver does not say (containers, WDDM)."""
    nvml, total = library(), 0
    for handle in handles():
        with contextlib.suppress(nvml.NVMLError):
            for row in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if row.pid == pid and row.usedGpuMemory:
                    total += int(row.usedGpuMemory)
    return total or None


def free_memory() -> int | None:
    """Bytes free on the first GPU."""
    nvml = library()
    for handle in handles():
        with contextlib.suppress(nvml.NVMLError):
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    return None


def total_energy_joules() -> float | None:
    """What all GPUs have used since the driver was loaded; Volta and newer count it."""
    nvml, total = library(), 0.0
    found = handles()
    for handle in found:
        try:
            total += nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # millijoules
        except nvml.NVMLError:
            return None
    return total if found else None


def describe() -> list[dict[str, Any]]:
    """Name, memory, driver and power limit of each GPU; no serial number and no UUID."""
    nvml, rows = library(), []
    for handle in handles():
        row: dict[str, Any] = {"vendor": "nvidia"}
        asked: dict[str, Callable[[Any], Any]] = {
            "name": lambda h: _text(nvml.nvmlDeviceGetName(h)),
            "memory_bytes": lambda h: int(nvml.nvmlDeviceGetMemoryInfo(h).total),
            "power_limit_watts": lambda h: nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
            "capability": lambda h: ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(h))),
            "driver": lambda h: _text(nvml.nvmlSystemGetDriverVersion()),
        }
        for key, read in asked.items():
            with contextlib.suppress(nvml.NVMLError):
                row[key] = read(handle)
        rows.append(row)
    return rows


def state() -> list[dict[str, Any]]:
    """What changes while measuring: clocks, temperature, power, and the reasons for throttling, as bits."""
    nvml, rows = library(), []
    for handle in handles():
        row: dict[str, Any] = {}
        asked: dict[str, Callable[[Any], Any]] = {
            "sm_clock_mhz": lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM),
            "celsius": lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda h: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
            "processes": lambda h: len(nvml.nvmlDeviceGetComputeRunningProcesses(h)),
        }
        for key, read in asked.items():
            with contextlib.suppress(nvml.NVMLError):
                row[key] = read(handle)
        rows.append(row)
    return rows


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
