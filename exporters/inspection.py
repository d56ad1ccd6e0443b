"""Says what a bundle, a checkpoint or an adapter is made of: family, networks, types, sizes, adapters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle, is_bundle, open_bundle
from ..errors import AdapterError, CheckpointError, UsageError
from .adapters.inspection import AdapterInspection, inspect_adapter
from .checkpoints import Checkpoint, open_checkpoint
from .embeddings.base import EmbeddingRef
from .embeddings.pictures import is_picture
from .embeddings.reading import read_embeddings
from .families import foreign_family
from .folders import class_of
from .parts import open_weights
from .single_files import read_single_file
from .tensors import TensorInfo


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
            networks=_networks(checkpoint),
            has_ema=checkpoint.has_ema,
            uses_ema=checkpoint.uses_ema,
            ignored_tensors=len(checkpoint.ignored),
            files=len(files),
            file_bytes=sum(file.stat().st_size for file in files),
            fingerprint=checkpoint.fingerprint(),
        )


def _networks(checkpoint: Checkpoint) -> tuple[NetworkReport, ...]:
    return tuple(
        _network_report(network, checkpoint.config(network), checkpoint.tensors(network).values())
        for network in checkpoint.networks
    )


def _network_report(network: str, config: Mapping[str, Any], infos: Iterable[TensorInfo]) -> NetworkReport:
    infos = list(infos)
    return NetworkReport(
        network=network,
        class_name=class_of(config),
        tensors=len(infos),
        parameters=sum(info.size for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=dict(Counter(info.dtype for info in infos).most_common()),
    )


def inspect_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe whatever lies at ``path``: a bundle, a checkpoint, one network's weights, or an adapter.

    Returns:
        Plain values for JSON. ``kind`` is ``bundle``, ``checkpoint``, ``weights``, ``adapter``,
        ``embedding``, or ``other`` for an adapter of something that Kiln does not run, which ``what`` names.
        Numbers of bytes end in ``_bytes``; ``storage`` counts tensors by the type they are stored in.

    Raises:
        UsageError: there is nothing at ``path``.
        BundleError, CheckpointError, AdapterError: it is damaged, or is nothing that Kiln knows.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no file or folder {path}; expected a bundle, a checkpoint or an adapter")
    if path.is_dir():
        if is_bundle(path):
            return _bundle(open_bundle(path))
        whole = (path / "model_index.json").exists() or (path / "unet").is_dir()
        return _checkpoint(inspect_checkpoint(path)) if whole else _folder(path)
    return _file(path)


def _folder(path: Path) -> dict[str, Any]:
    """A folder that PEFT wrote; any other is no checkpoint, and the error says so."""
    try:
        return _adapter(inspect_adapter(path))
    except AdapterError as exc:
        if "adapter_config.json" in os.listdir(path):
            raise
        raise CheckpointError(
            f"{path}: is no bundle (no kiln.json), no diffusers folder (no model_index.json, no unet) "
            "and no adapter folder (no adapter_model.safetensors)"
        ) from exc


def _file(path: Path) -> dict[str, Any]:
    """A weights file: an adapter when a module in it is of a known format, else a checkpoint."""
    refused = None
    try:
        found = inspect_adapter(path)
        if found.formats:
            return _adapter(found)
    except AdapterError as exc:
        refused = exc
    embeddings = _embeddings(path)
    if embeddings:
        return embeddings
    with ExitStack() as stack:
        names = open_weights(path, stack).infos
        if refused and (foreign_family(names) or "").startswith("an adapter"):
            raise refused
    with ExitStack() as stack:
        single = read_single_file(path, False, stack)
        if single.match is None:
            reports = [
                _network_report(network, part.config, [entry.info for entry in part.entries.values()])
                for network, part in single.parts.items()
            ]
            size = path.stat().st_size
            return {"kind": "weights", "path": str(path), "size_bytes": size, "networks": _rows(reports)}
    return _checkpoint(inspect_checkpoint(path))


def _embeddings(path: Path) -> dict[str, Any] | None:
    """The tokens of a textual inversion embedding; None for a file that is none."""
    try:
        found = read_embeddings(EmbeddingRef(path))
    except AdapterError:
        if is_picture(path):  # and so nothing else
            raise
        return None
    rows = [
        {
            "token": e.token,
            "vectors": e.count,
            "family": e.family,
            "widths": [v.shape[1] for v in e.vectors.values()],
        }
        for e in found
    ]
    return {"kind": "embedding", "path": str(path), "embeddings": rows, "size_bytes": path.stat().st_size}


def _rows(reports: Iterable[NetworkReport]) -> dict[str, dict[str, Any]]:
    return {
        report.network: {
            "class": report.class_name,
            "tensors": report.tensors,
            "parameters": report.parameters,
            "size_bytes": report.nbytes,
            "storage": dict(report.dtypes),
        }
        for report in reports
    }


def _checkpoint(report: CheckpointReport) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "path": str(report.path),
        "family": report.family,
        "title": report.title,
        "layout": report.layout,
        "prediction_type": report.prediction_type,
        "networks": _rows(report.networks),
        "has_ema": report.has_ema,
        "ignored_tensors": report.ignored_tensors,
        "files": report.files,
        "size_bytes": report.file_bytes,
        "fingerprint": report.fingerprint,
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest, files = bundle.manifest, bundle.manifest["files"]
    rows = {}
    for component in bundle.components:
        facts = manifest["components"][component]
        sizes = [row["size"] for name, row in files.items() if name.startswith(f"{component}/")]
        rows[component] = {
            "class": class_of(bundle.config(component)),
            "tensors": sum(facts["storage"].values()),
            "parameters": facts["parameters"],
            "size_bytes": sum(sizes),
            "storage": dict(facts["storage"]),
            "opset": facts["opset"],
        }
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "name": bundle.name,
        "family": bundle.family,
        "prediction_type": manifest.get("prediction_type", "epsilon"),
        "components": rows,
        "adapters": [
            {name: fact for name, fact in asdict(adapter).items() if fact is not None}
            for adapter in bundle.adapters
        ],
        "embeddings": [
            {"token": e.token, "vectors": len(e.ids), "sha256": e.sha256} for e in bundle.embeddings
        ],
        "source": dict(manifest.get("source", {})),
        "size_bytes": sum(row["size"] for row in files.values()),
        "digest": bundle.content_digest,
        "kiln_version": manifest.get("kiln_version"),
    }


def _adapter(found: AdapterInspection) -> dict[str, Any]:
    known = found.kind == "adapter"
    return {
        "kind": "adapter" if known else "other",
        **({} if known else {"what": found.kind}),
        "path": str(found.path),
        "family": found.family,
        "family_reason": found.family_reason,
        "formats": dict(found.formats),
        "dialects": dict(found.dialects),
        "modules": dict(found.modules),
        "ranks": {str(rank): count for rank, count in found.ranks.items()},
        "alphas": {f"{alpha:g}": count for alpha, count in found.alphas.items()},
        "storage": dict(found.dtypes),
        "unknown_keys": list(found.loose_keys),
        "metadata": dict(found.metadata),
        "size_bytes": found.size_bytes,
    }
