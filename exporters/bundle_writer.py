"""Write one bundle: the networks of a checkpoint with adapters added, and their graphs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .. import __version__
from ..bundle import FORMAT_VERSION, MANIFEST, Bundle
from ..components import COMPONENTS, CONTRACTS
from ..errors import CheckpointError
from .adapters.base import AdapterRef
from .adapters.plan import AdapterReport, BakePlan, plan_bake
from .binding import bind, check_tensors, weight_names
from .buffers import Buffers
from .checkpoints import Checkpoint
from .graphs import architecture_digest, find_graph
from .pipeline_files import json_bytes, pipeline_files
from .publish import published
from .quantization.plan import Int8Plan
from .quantization.store import BUNDLE_FILE
from .tensors import DTYPES, TensorInfo
from .weights import largest_if_narrowed, overflow, place, stored_dtype, write_weights

Progress = Callable[[str, int, int], None]
"""Called with a component, bytes of it written, and its bytes in all."""

Judge = Callable[[Path], Mapping[str, Any]]
"""Looks at a bundle that is written but not yet published, and gives facts for its manifest, or raises."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, what of each adapter was applied, and for int8 how near it is to fp32."""

    output: Path
    size_bytes: int
    adapters: tuple[AdapterReport, ...]
    int8: Mapping[str, Any] = field(default_factory=dict)


class BundleWriter:
    """Writes one bundle: the networks of a checkpoint with adapters added, and their graphs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: tuple[AdapterRef, ...],
        storage: str,
        progress: Progress | None,
        defaults: Mapping[str, Any],
        base: Bundle | None = None,
        int8: Int8Plan | None = None,
    ) -> None:
        absent = {CONTRACTS[c].network for c in COMPONENTS} - set(checkpoint.networks)
        if absent:
            options = " and ".join(f"--{network.replace('_', '-')} FILE" for network in sorted(absent))
            raise CheckpointError(f"{checkpoint.path} has no {' and '.join(sorted(absent))}; give {options}")
        self.checkpoint, self.storage, self.base, self.int8 = checkpoint, storage, base, int8
        self.defaults = dict(defaults)
        self.progress = progress or (lambda component, done, total: None)
        self.files: dict[str, dict[str, Any]] = {}
        self.buffers = Buffers()
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

    def write(
        self,
        output: Path,
        *,
        name: str,
        source: Mapping[str, Any],
        overwrite: bool,
        judge: Judge | None = None,
    ) -> ExportReport:
        # The products are small and many, and the other core is busy writing: threads inside BLAS doubled
        # the processor time of a bake and made it slower.
        with threadpool_limits(1), published(output, overwrite=overwrite) as folder:
            components = {c: self._component(folder, c) for c in COMPONENTS}
            for file, data in pipeline_files(self.checkpoint.tokenizer_dir, self.checkpoint.scheduler_config):
                (folder / file).parent.mkdir(exist_ok=True)
                self._bytes(folder, file, data)
            if self.int8 is not None and self.int8.calibration is not None:
                self._bytes(folder, BUNDLE_FILE, self.int8.calibration.to_json())
            self._manifest(folder, name, source, components)
            judged = judge(folder) if judge else {}
            if judged:
                self._manifest(folder, name, source, components, judged)
        size = sum(facts["size"] for facts in self.files.values())
        return ExportReport(output, size, self.plan.reports, judged)

    def _component(self, folder: Path, component: str) -> dict[str, Any]:
        network = CONTRACTS[component].network
        (folder / component).mkdir()
        graph, infos = self.graphs[component], self.tensors[network]
        types = {n: stored_dtype(infos[n], self.storage) for n in weight_names(graph)}
        parameters, scales = sum(infos[n].size for n in types), {}
        if self.int8 is not None:
            types |= self.int8.types(component)
            scales = self.int8.shapes(component)
        header, placed = place((n, t, scales[n] if n in scales else infos[n].shape) for n, t in types.items())
        path = f"{component}/weights.safetensors"
        if not self._copied_from_base(folder, component, types, header):
            size, sha256 = write_weights(
                folder / path,
                header,
                self._stream(component, list(placed), infos, types),
                [DTYPES[at.dtype] for at in placed.values()],
                self.buffers,
            )
            self.files[path] = {"size": size, "sha256": sha256}
        bound = bind(graph, placed)
        if self.int8 is not None:
            self.int8.finish_graph(component, bound)
        self._bytes(folder, f"{component}/model.onnx", bound.SerializeToString(deterministic=True))
        self._bytes(folder, f"{component}/config.json", json_bytes(self.configs[network]))
        facts: dict[str, Any] = {"int8": self.int8.facts(component)} if self.int8 is not None else {}
        return {
            "architecture": architecture_digest(component, self.configs[network]),
            "opset": max(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")),
            "storage": {t: list(types.values()).count(t) for t in sorted(set(types.values()))},
            "parameters": parameters,
        } | facts

    def _stream(
        self, component: str, names: list[str], infos: Mapping[str, TensorInfo], types: Mapping[str, str]
    ) -> Iterator[np.ndarray]:
        network = CONTRACTS[component].network
        total, done = sum(infos[n].nbytes for n in names if n in infos), 0
        for name in names:
            if name not in infos and self.int8 is not None:
                yield self.int8.take_scale(name)
                continue
            tensor = self.checkpoint.read(network, name, self.buffers)
            quantized = types[name] == "I8" and self.int8 is not None
            if self.plan.is_touched(network, name):
                base, tensor = tensor, self._target(tensor, DTYPES["F32" if quantized else types[name]])
                largest = self.plan.bake_into(network, name, base, tensor)
                if tensor is not base:
                    self.buffers.give_back(base)
            else:
                largest = largest_if_narrowed(tensor, types[name])
            misfit = overflow(largest, types[name])
            if misfit:
                raise CheckpointError(f"{component} tensor {name} {misfit}")
            if quantized and self.int8 is not None:
                weight, tensor = tensor, self.int8.quantized(component, name, tensor)
                self.buffers.give_back(weight)
            yield tensor
            done += infos[name].nbytes
            self.progress(component, done, total)

    def _target(self, base: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Where a baked tensor goes: in place of the base where the type stays."""
        if base.dtype == dtype:
            return base
        return self.buffers.take(base.size * dtype.itemsize).view(dtype).reshape(base.shape)

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
        self,
        folder: Path,
        name: str,
        source: Mapping[str, Any],
        components: Mapping[str, Any],
        judged: Mapping[str, Any] = MappingProxyType({}),
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
            "applied": [_applied(report) for report in self.plan.reports],
            **judged,
            "components": dict(components),
            "files": dict(sorted(self.files.items())),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _bytes(self, folder: Path, name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _applied(report: AdapterReport) -> dict[str, Any]:
    """What was done with an adapter, for the manifest: sizes of changes with four digits."""
    return {
        "format": report.format,
        "matched_modules": dict(report.matched_modules),
        "matched_keys": report.matched_keys,
        "unmatched": {key: report.reasons.get(key, "") for key in report.unmatched_keys},
        "rank": report.rank,
        "changes": {name: float(f"{size:.4g}") for name, size in report.changes.items()},
        "warnings": list(report.warnings),
    }
