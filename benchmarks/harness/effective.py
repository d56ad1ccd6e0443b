"""What was asked for against what is in force: a difference makes a row invalid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records.record import Effective, Requested

AUTO = "auto"

# The provider that each backend of ONNX Runtime has to report: it falls back to its CPU provider in silence.
PROVIDERS: Mapping[str, str] = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-migraphx": "MIGraphXExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
    "onnxruntime-webgpu": "WebGpuExecutionProvider",
}
_PROCESSOR = ("cpu",)


def read_effective(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Effective]:
    """What a worker told, by component.

    Raises:
        ValueError: a component without one of the facts.
    """
    try:
        return {component: Effective(**row) for component, row in rows.items()}
    except TypeError as error:
        raise ValueError(f"the worker's effective settings are not as expected: {error}") from None


def mismatches(requested: Requested, effective: Mapping[str, Effective]) -> list[str]:
    """Every difference, in words; empty if all is as asked. What was left to ``auto`` cannot differ."""
    if not effective:
        return [f"{requested.name} does not say what is in force"]
    found = []
    for component, row in effective.items():
        pairs = [
            ("backend", requested.name if requested.kind == "kiln" else AUTO, row.backend),
            ("provider", PROVIDERS.get(requested.name, AUTO), row.provider),
            ("device", requested.device, row.device),
            ("precision", requested.precision, row.precision),
            ("threads", str(requested.threads or AUTO), str(row.threads)),
        ]
        found += [
            f"{component}: the {fact} {asked} was asked for, and {told} is in force"
            for fact, asked, told in pairs
            if asked != AUTO and not _same(fact, asked, told)
        ]
    return found


def is_processor(effective: Mapping[str, Effective]) -> bool:
    """Whether the UNet, or all there is, runs on the processor."""
    row = effective.get("unet") or next(iter(effective.values()), None)
    return row is None or row.device.lower().split(":")[0].split(".")[0] in (*_PROCESSOR, "none")


def precision_of(effective: Mapping[str, Effective]) -> str:
    """The UNet's precision: what a row is called by."""
    row = effective.get("unet") or next(iter(effective.values()), None)
    return row.precision if row else ""


def _same(fact: str, asked: str, told: str) -> bool:
    if fact != "device":
        return asked == told
    # Devices are named by kind or by kind and number: cuda is cuda:0, GPU is GPU.0.
    wanted, found = asked.lower(), told.lower()
    return found == wanted or found.startswith((f"{wanted}:", f"{wanted}.")) or wanted in (f"{found}:0",)
