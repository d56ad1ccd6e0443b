"""Make bundles: export a checkpoint, or bake other adapters into a bundle that exists."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .. import __version__
from ..bundle import FORMAT_VERSION, MANIFEST, Bundle
from ..components import COMPONENTS, CONTRACTS
from ..errors import BundleError, CheckpointError, KilnError, UsageError
from .adapters.base import AdapterRef
from .adapters.plan import AdapterReport, BakePlan, plan_bake
from .binding import bind, check_tensors, weight_names
from .checkpoints import Checkpoint, open_checkpoint
from .graphs import architecture_digest, find_graph
from .pipeline_files import json_bytes, pipeline_files
from .publish import published
from .tensors import DTYPES, TensorInfo
from .weights import overflow, place, stored_dtype, write_weights

STORAGES = ("auto", "fp32", "fp16", "bf16")

Progress = Callable[[str, int, int], None]
"""Called with a component, bytes of it written, and its bytes in all."""


@dataclass(frozen=True)
class ExportSpec:
    """What to export, and how.

    ``storage`` is the type floating weights are stored in; ``auto`` keeps the checkpoint's own.
    ``vae`` and ``text_encoder`` name checkpoints to take those networks from. ``remember_source``
    writes the checkpoint's absolute path into the manifest, so that ``bake`` finds it again.
    ``cfg_scale`` is the guidance that ``generate`` uses for this model unless it is told one.
    """

    model: Path
    output: Path
    adapters: tuple[AdapterRef, ...] = ()
    storage: str = "auto"
    name: str | None = None
    variant: str | None = None
    ema: bool = False
    vae: Path | None = None
    text_encoder: Path | None = None
    overwrite: bool = False
    remember_source: bool = True
    cfg_scale: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what of each adapter was applied."""

    output: Path
    size_bytes: int
    adapters: tuple[AdapterReport, ...]


def export(spec: ExportSpec, progress: Progress | None = None) -> ExportReport:
    """Bake a checkpoint and adapters into a bundle, torch-free for the architectures that ship.

    Some 128 MB of tensors are in memory. The bundle appears under its name when it is complete.

    Raises:
        UsageError: an unknown storage type.
        CheckpointError: the checkpoint is unreadable, incomplete or of another family.
        AdapterError: an adapter is unreadable, of another family, or matches nothing.
        GraphError: an architecture that is not shipped, and torch is not there to trace it.
        StorageError: the output exists, or the disk refused.
    """
    if spec.storage not in STORAGES:
        raise UsageError(f"unknown precision {spec.storage!r}; weights are stored as {', '.join(STORAGES)}")
    with open_checkpoint(
        spec.model, variant=spec.variant, ema=spec.ema, vae=spec.vae, text_encoder=spec.text_encoder
    ) as checkpoint:
        source: dict[str, Any] = {
            "path": None,
            "layout": checkpoint.layout,
            "fingerprint": checkpoint.fingerprint(),
        }
        if spec.remember_source:
            source["path"] = str(Path(spec.model).resolve())
            source["options"] = {
                "variant": spec.variant,
                "ema": spec.ema,
                "vae": str(spec.vae.resolve()) if spec.vae else None,
                "text_encoder": str(spec.text_encoder.resolve()) if spec.text_encoder else None,
            }
        name = spec.name or spec.output.resolve().name
        defaults = {} if spec.cfg_scale is None else {"cfg_scale": spec.cfg_scale}
        writer = _Writer(checkpoint, spec.adapters, spec.storage, progress, defaults)
        return writer.write(spec.output, name=name, source=source, overwrite=spec.overwrite)


def bake(
    bundle: Bundle,
    output: Path,
    adapters: tuple[AdapterRef, ...],
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Make a new bundle with other adapters from one that exists, by rewriting weights only.

    The weights come from the checkpoint that the bundle remembers, or from the bundle itself when
    nothing is baked into it; a baked bundle whose checkpoint is gone cannot be unbaked.

    Raises:
        BundleError: the checkpoint is gone or has changed, and the bundle has adapters inside.
        AdapterError: an adapter is unreadable, of another family, or matches nothing.
        StorageError: the output exists, or the disk refused.
    """
    with _unbaked(bundle) as checkpoint:
        storage = str(bundle.manifest.get("storage", "auto"))
        defaults = bundle.manifest.get("defaults", {})
        base = None if bundle.adapters else bundle
        writer = _Writer(checkpoint, adapters, storage, progress, defaults, base)
        source = dict(bundle.manifest["source"])
        if checkpoint.path == bundle.path:
            source = {"path": str(bundle.path.resolve()), "layout": "bundle"}
            source["fingerprint"] = checkpoint.fingerprint()
        return writer.write(output, name=name or output.resolve().name, source=source, overwrite=overwrite)


def _unbaked(bundle: Bundle) -> Checkpoint:
    """The checkpoint that ``bundle`` was made of, before any adapter."""
    source = bundle.manifest["source"]
    state = "is not known"
    if source.get("path"):
        path = Path(source["path"])
        try:
            checkpoint = open_checkpoint(path, **source.get("options", {}))
        except KilnError as exc:
            state = f"is gone ({exc})"
        else:
            if checkpoint.fingerprint() == source["fingerprint"]:
                return checkpoint
            checkpoint.close()
            state = f"has changed ({path})"
    if not bundle.adapters:
        return open_checkpoint(bundle.path)
    raise BundleError(
        f"{bundle.path} has adapters inside and cannot be unbaked: the checkpoint it was made of {state}. "
        "Export the checkpoint again: kiln export MODEL -o BUNDLE --lora ..."
    )


class _Writer:
    """Writes one bundle: the networks of a checkpoint with adapters added, and their graphs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: tuple[AdapterRef, ...],
        storage: str,
        progress: Progress | None,
        defaults: Mapping[str, Any],
        base: Bundle | None = None,
    ) -> None:
        absent = {CONTRACTS[c].network for c in COMPONENTS} - set(checkpoint.networks)
        if absent:
            options = " and ".join(f"--{network.replace('_', '-')} FILE" for network in sorted(absent))
            raise CheckpointError(f"{checkpoint.path} has no {' and '.join(sorted(absent))}; give {options}")
        self.checkpoint, self.storage, self.base = checkpoint, storage, base
        self.defaults = dict(defaults)
        self.progress = progress or (lambda component, done, total: None)
        self.files: dict[str, dict[str, Any]] = {}
        # A path of the machine that the checkpoint was saved on is nobody's business.
        self.configs = {
            network: {k: v for k, v in checkpoint.config(network).items() if k != "_name_or_path"}
            for network in checkpoint.networks
        }
        self.tensors = {network: checkpoint.tensors(network) for network in checkpoint.networks}
        self.graphs = {c: find_graph(c, self.configs[CONTRACTS[c].network]) for c in COMPONENTS}
        for component, graph in self.graphs.items():
            check_tensors(component, weight_names(graph), self.tensors[CONTRACTS[component].network])
        shapes = {n: {name: info.shape for name, info in infos.items()} for n, infos in self.tensors.items()}
        self.plan: BakePlan = plan_bake(shapes, adapters)

    def write(self, output: Path, *, name: str, source: Mapping[str, Any], overwrite: bool) -> ExportReport:
        # The products are small and many, and the other core is busy writing: threads inside BLAS doubled
        # the processor time of a bake and made it slower.
        with threadpool_limits(1), published(output, overwrite=overwrite) as folder:
            components = {c: self._component(folder, c) for c in COMPONENTS}
            for file, data in pipeline_files(self.checkpoint.tokenizer_dir, self.checkpoint.scheduler_config):
                (folder / file).parent.mkdir(exist_ok=True)
                self._bytes(folder, file, data)
            self._manifest(folder, name, source, components)
        size = sum(facts["size"] for facts in self.files.values())
        return ExportReport(output, size, self.plan.reports)

    def _component(self, folder: Path, component: str) -> dict[str, Any]:
        network = CONTRACTS[component].network
        (folder / component).mkdir()
        graph, infos = self.graphs[component], self.tensors[network]
        types = {n: stored_dtype(infos[n], self.storage) for n in weight_names(graph)}
        header, placed = place((n, types[n], infos[n].shape) for n in types)
        path = f"{component}/weights.safetensors"
        if not self._copied_from_base(folder, component, types, header):
            size, sha256 = write_weights(
                folder / path,
                header,
                self._stream(component, list(placed), infos, types),
                [DTYPES[at.dtype] for at in placed.values()],
            )
            self.files[path] = {"size": size, "sha256": sha256}
        self._bytes(
            folder, f"{component}/model.onnx", bind(graph, placed).SerializeToString(deterministic=True)
        )
        self._bytes(folder, f"{component}/config.json", json_bytes(self.configs[network]))
        return {
            "architecture": architecture_digest(component, self.configs[network]),
            "opset": max(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")),
            "storage": {t: list(types.values()).count(t) for t in sorted(set(types.values()))},
            "parameters": sum(infos[n].size for n in types),
        }

    def _stream(
        self, component: str, names: list[str], infos: Mapping[str, TensorInfo], types: Mapping[str, str]
    ) -> Iterator[np.ndarray]:
        network = CONTRACTS[component].network
        total, done = sum(infos[n].nbytes for n in names), 0
        for name in names:
            tensor = self.checkpoint.read(network, name)
            if self.plan.is_touched(network, name):
                tensor = self.plan.bake(network, name, tensor)
            misfit = overflow(tensor, types[name])
            if misfit:
                raise CheckpointError(f"{component} tensor {name} {misfit}")
            yield tensor
            done += infos[name].nbytes
            self.progress(component, done, total)

    def _copied_from_base(
        self, folder: Path, component: str, types: Mapping[str, str], header: bytes
    ) -> bool:
        """Copy the weights of a component that no adapter touches, instead of streaming them."""
        network = CONTRACTS[component].network
        if self.base is None or component not in self.base.components:
            return False
        if any(self.plan.is_touched(network, n) for n in types):
            return False
        path = f"{component}/weights.safetensors"
        with (self.base.path / path).open("rb") as file:
            if file.read(len(header)) != header:  # written by another version, in another order
                return False
        shutil.copyfile(self.base.path / path, folder / path)
        self.files[path] = dict(self.base.manifest["files"][path])
        self.progress(component, 1, 1)
        return True

    def _manifest(
        self, folder: Path, name: str, source: Mapping[str, Any], components: Mapping[str, Any]
    ) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "kiln_version": __version__,
            "name": name,
            "family": self.checkpoint.family.name,
            "prediction_type": self.checkpoint.scheduler_config.get("prediction_type", "epsilon"),
            "storage": self.storage,
            "defaults": self.defaults,
            "source": dict(source),
            "adapters": [
                {
                    "name": report.path.stem,
                    "sha256": report.digest,
                    "unet_strength": report.unet_strength,
                    "text_encoder_strength": report.text_encoder_strength,
                }
                for report in self.plan.reports
            ],
            "components": dict(components),
            "files": dict(sorted(self.files.items())),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _bytes(self, folder: Path, name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
