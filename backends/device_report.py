"""List every backend with its devices, for ``kiln devices``."""

from __future__ import annotations

from dataclasses import dataclass

from .registry import get_backend, names, why_unusable


@dataclass(frozen=True)
class DeviceRow:
    """One device of one backend, or one backend that has none, with the reason."""

    backend: str
    device: str
    name: str
    precisions: tuple[str, ...]
    version: str
    available: bool
    reason: str = ""


def list_devices() -> list[DeviceRow]:
    """One row for each device of each backend; a backend that cannot be used has one row that says why.

    Loads every engine that is installed, which takes a second or two. Never raises for a broken engine.
    """
    rows = []
    for name in names():
        backend = get_backend(name)
        reason = why_unusable(backend)
        version = backend.probe().version
        if reason:
            rows.append(DeviceRow(name, "", "", (), version, False, reason))
            continue
        rows += [DeviceRow(name, d.id, d.name, d.precisions, version, True) for d in backend.devices()]
    return rows
