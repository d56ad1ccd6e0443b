"""A calibration: which ranges the activations have, kept in a file for the checkpoint it was measured on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache import cache_folder
from ...errors import UsageError
from .quantize import ActivationRange

FORMAT = "kiln-calibration"
VERSION = 2
BUNDLE_FILE = "calibration.json"  # its name inside a bundle


@dataclass(frozen=True)
class Calibration:
    """Ranges of activations, and what of the UNet was left in higher precision.

    ``architecture`` is the digest of the UNet's graph, ``fingerprint`` the checkpoint that was measured.
    ``ranges`` are those of the UNet's tensors, ``decoder_ranges`` of the VAE's decoder: where there are none,
    its activations stay as they are. ``kept`` names the layers that stay in the type the rest has because
    quantizing them hurt, ``sensitivity`` the error each group caused by itself, largest first, and
    ``multiplications`` those of one run, by group; of an earlier Kiln's none are known. ``facts`` say how it
    was measured.
    """

    architecture: str
    fingerprint: str
    ranges: Mapping[str, ActivationRange]
    kept: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    multiplications: Mapping[str, float] = field(default_factory=dict)
    decoder_ranges: Mapping[str, ActivationRange] = field(default_factory=dict)

    def ranges_of(self, component: str) -> Mapping[str, ActivationRange]:
        """The ranges of a component's activations, by tensor; of most there are none."""
        return {"unet": self.ranges, "vae_decoder": self.decoder_ranges}.get(component, {})

    @property
    def counted(self) -> bool:
        """Whether the multiplications of every group are known."""
        return self.multiplications.keys() == self.sensitivity.keys()

    def to_json(self) -> bytes:
        """The file's content."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "facts": dict(self.facts),
            "kept": list(self.kept),
            "sensitivity": dict(self.sensitivity),
            "multiplications": dict(self.multiplications),
            "ranges": _rows(self.ranges),
            "symmetric": sorted(name for name, given in self.ranges.items() if given.symmetric),
            "decoder_ranges": _rows(self.decoder_ranges),
        }
        return (json.dumps(value, indent=1) + "\n").encode()


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        UsageError: it is missing, or is not what ``Calibration.to_json`` writes.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"the calibration {path} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is no calibration: {str(exc)[:200]}") from exc
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise UsageError(
            f"{path} is no calibration of version {VERSION}; make one with --precision int8-full"
        )
    try:
        symmetric = frozenset(map(str, value["symmetric"]))
        return Calibration(
            str(value["architecture"]),
            str(value["fingerprint"]),
            _ranges(value["ranges"], symmetric),
            tuple(str(name) for name in value["kept"]),
            {str(name): float(error) for name, error in value["sensitivity"].items()},
            dict(value["facts"]),
            {str(name): _count(count) for name, count in value.get("multiplications", {}).items()},
            _ranges(value.get("decoder_ranges", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise UsageError(f"{path} is no calibration: {exc!r:.200}") from exc


def _rows(ranges: Mapping[str, ActivationRange]) -> dict[str, list[float]]:
    return {name: [given.low, given.high] for name, given in sorted(ranges.items())}


def _ranges(rows: Mapping[str, Any], symmetric: frozenset[str] = frozenset()) -> dict[str, ActivationRange]:
    return {str(name): _range(row, symmetric=name in symmetric) for name, row in rows.items()}


def _range(row: Any, *, symmetric: bool) -> ActivationRange:
    low, high = (float(bound) for bound in row)
    if not (-float("inf") < low <= high < float("inf")):
        raise ValueError(f"a range from {low} to {high}")
    return ActivationRange(low, high, symmetric)


def _count(value: Any) -> float:
    count = float(value)
    if not 0 < count < float("inf"):
        raise ValueError(f"{value} multiplications")
    return count


def check_calibration(given: Calibration, architecture: str, fingerprint: str, where: str) -> None:
    """Check that a calibration belongs to a checkpoint.

    Raises:
        UsageError: it was measured on another architecture or another checkpoint.
    """
    for what, measured, wanted in (
        ("architecture", given.architecture, architecture),
        ("checkpoint", given.fingerprint, fingerprint),
    ):
        if measured != wanted:
            raise UsageError(
                f"{where} was measured on another {what} ({measured[:12]}, this one is {wanted[:12]}); "
                "leave --calibration out, and it is measured anew"
            )


def kept_path(architecture: str, fingerprint: str) -> Path:
    """Where this machine keeps the calibration of a checkpoint."""
    return cache_folder("calibrations") / f"{fingerprint[:24]}-{architecture}.json"


def save_calibration(given: Calibration, path: Path) -> None:
    """Write a calibration whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(given.to_json())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
