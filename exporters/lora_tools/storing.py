"""What the metadata of a LoRA says of where it is from, and how its single numbers are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ... import __version__
from ..planned_file import Planned, planned

_ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-512", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
# They describe bytes that are no longer the same, or settings that are written anew.
_STALE = frozenset(
    {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata", "format"}
)


def number(value: float) -> Planned:
    """A single number such as an alpha, in float32 where that holds it exactly, else in float64."""
    with np.errstate(over="ignore"):
        exact = float(np.float32(value)) == value
    return planned(np.array(value, np.float32 if exact else np.float64), "F32" if exact else "F64")


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file that still holds for another form of it."""
    return {name: text for name, text in metadata.items() if name not in _STALE}


def lora_metadata(family: str | None, title: str, **facts: str) -> dict[str, str]:
    """What kohya-ss/sd-scripts and Stability's ModelSpec say of a LoRA; file names only, never folders.

    No date and no random id: the same inputs give the same file, to the byte.

    Args:
        family: of the base model; left out when it is not known.
        title: a name for people, such as the file's.
        facts: other fields, dots written as double underscores.
    """
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.implementation": f"kiln {__version__}",
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
    }
    if family in _ARCHITECTURES:
        architecture, version = _ARCHITECTURES[family]
        found |= {"modelspec.architecture": f"{architecture}/lora", "ss_base_model_version": version}
        found["ss_v2"] = str(family == "sd2")
    return found | {name.replace("__", "."): text for name, text in facts.items()}


def short_digest(path: Path) -> str:
    """The first 12 digits of a file's SHA-256, by which a file can be found again."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
