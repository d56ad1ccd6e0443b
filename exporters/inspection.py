"""Says what a checkpoint is made of: family, networks, types, sizes, EMA."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint, open_checkpoint
from .folders import class_of


@dataclass(frozen=True)
class NetworkReport:
    """One network: its class, how many tensors and parameters, how many bytes, and tensors by stored type."""

    network: str
    class_name: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class CheckpointReport:
    """What ``kiln inspect`` prints of a checkpoint; ``file_bytes`` is the size of all files read from."""

    path: Path
    family: str
    title: str
    layout: str
    prediction_type: str
    networks: tuple[NetworkReport, ...]
    has_ema: bool
    uses_ema: bool
    ignored_tensors: int
    files: int
    file_bytes: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers of bytes and parameters are integers."""
        return {
            **asdict(self),
            "path": str(self.path),
            "networks": [asdict(network) for network in self.networks],
        }


def inspect_checkpoint(path: str | os.PathLike[str], **options: Any) -> CheckpointReport:
    """Describe a checkpoint from its headers.

    Args:
        path: anything that ``open_checkpoint`` takes.
        options: its other arguments.

    Raises:
        CheckpointError: it cannot be opened, or is of a family this version does not read (named).
    """
    with open_checkpoint(path, **options) as checkpoint:
        files = checkpoint.files()
        return CheckpointReport(
            path=checkpoint.path,
            family=checkpoint.family.name,
            title=checkpoint.match.title,
            layout=checkpoint.layout,
            prediction_type=str(checkpoint.scheduler_config.get("prediction_type", "epsilon")),
            networks=tuple(_network_report(checkpoint, network) for network in checkpoint.networks),
            has_ema=checkpoint.has_ema,
            uses_ema=checkpoint.uses_ema,
            ignored_tensors=len(checkpoint.ignored),
            files=len(files),
            file_bytes=sum(file.stat().st_size for file in files),
            fingerprint=checkpoint.fingerprint(),
        )


def _network_report(checkpoint: Checkpoint, network: str) -> NetworkReport:
    infos = checkpoint.tensors(network).values()
    return NetworkReport(
        network=network,
        class_name=class_of(checkpoint.config(network)),
        tensors=len(infos),
        parameters=sum(info.size for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=dict(Counter(info.dtype for info in infos).most_common()),
    )
