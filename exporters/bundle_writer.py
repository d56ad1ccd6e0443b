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
from ..bundle import FORMAT_VERSION, MANIFEST, Bundle, open_bundle
from ..components import COMPONENTS, CONTRACTS
from ..errors import CheckpointError
from .adapters.base import AdapterRef
from .adapters.plan import AdapterReport, BakePlan, plan_bake
from .adapters.report import without
from .ahead import in_order
from .binding import bind, check_tensors, weight_names
from .buffers import Buffers
from .checkpoints import Checkpoint
from .embeddings.base import Embedding
from .embeddings.bundles import facts, from_tokenizer, kept
from .embeddings.insert import insert_tokens
from .embeddings.plan import plan_tokens, tables_of
from .embeddings.reading import bundled_embeddings, own_keys
from .embeddings.tokenizers import known_tokens, ordinary_tokens
from .graphs import architecture_digest, find_graph
from .pipeline_files import json_bytes, pipeline_files
from .publish import published
from .quantization.plan import Int8Plan
from .quantization.store import BUNDLE_FILE
from .tensors import DTYPES, TensorInfo
from .weights import largest_if_narrowed, overflow, place, stored_dtype, write_weights

# With one plain LoRA two cores are busy baking and writing; threads that share its baking made it slower.
_FEW_CHANGES = 2

Progress = Callable[[str, int, int], None]
"""Called with a component, bytes of it written, and its bytes in all."""

Judge = Callable[[Path], Mapping[str, Any]]
"""Looks at a bundle that is written but not yet published, and gives facts for its manifest, or raises."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, what of each adapter was applied, and for int8 how near it is to fp32.

    ``embeddings`` are the tokens that were added, with the number of vectors of each.
    """

    output: Path
    size_bytes: int
    adapters: tuple[AdapterReport, ...]
    int8: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)


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
        embeddings: tuple[Embedding, ...] = (),
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
        bundled = [e for adapter, digest in self.plan.acting for e in bundled_embeddings(adapter, digest)]
        self.tokens = plan_tokens(
            (*embeddings, *bundled), tables_of(shapes), known_tokens(checkpoint.tokenizer_dir)
        )

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
            insert_tokens(folder, components, self.files, self.tokens)
            if self.int8 is not None and self.int8.calibration is not None:
                self._bytes(folder, BUNDLE_FILE, self.int8.calibration.to_json())
            self._manifest(folder, name, source, components)
            judged = judge(folder) if judge else {}
            if judged:
                self._manifest(folder, name, source, components, judged)
        size = sum(file["size"] for file in self.files.values())
        added = {token.embedding.token: len(token.ids) for token in self.tokens.tokens}
        return ExportReport(output, size, self.reports, judged, added)

    @property
    def reports(self) -> tuple[AdapterReport, ...]:
        """One for each adapter, in which the embeddings that came with it count as applied."""
        brought = {digest: set(own_keys(adapter)) for adapter, digest in self.plan.acting}
        return tuple(without(report, brought.get(report.digest, set())) for report in self.plan.reports)

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
        own: dict[str, Any] = {"int8": self.int8.facts(component)} if self.int8 is not None else {}
        return {
            "architecture": architecture_digest(component, self.configs[network]),
            "opset": max(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")),
            "storage": {t: list(types.values()).count(t) for t in sorted(set(types.values()))},
            "parameters": parameters,
        } | own

    def _stream(
        self, component: str, names: list[str], infos: Mapping[str, TensorInfo], types: Mapping[str, str]
    ) -> Iterator[np.ndarray]:
        stored = [name for name in names if name in infos]
        total, done = sum(infos[n].nbytes for n in stored), 0
        jobs = ((infos[n].nbytes, self._job(component, n, types[n])) for n in stored)
        many = self.plan.most_changes(CONTRACTS[component].network) > _FEW_CHANGES
        baked = in_order(jobs, together=many)
        for name in names:
            if name not in infos and self.int8 is not None:
                yield self.int8.take_scale(name)
                continue
            tensor = next(baked)
            if types[name] == "I8" and self.int8 is not None:
                weight, tensor = tensor, self.int8.quantized(component, name, tensor)
                self.buffers.give_back(weight)
            yield tensor
            done += infos[name].nbytes
            self.progress(component, done, total)

    def _job(self, component: str, name: str, stored: str) -> Callable[[], np.ndarray]:
        """Read a tensor now; what is returned adds the adapters, on any thread."""
        network = CONTRACTS[component].network
        tensor = self.checkpoint.read(network, name, self.buffers)

        def bake() -> np.ndarray:
            out = tensor
            if self.plan.is_touched(network, name):
                quantized = stored == "I8" and self.int8 is not None
                out = self._target(tensor, DTYPES["F32" if quantized else stored])
                largest = self.plan.bake_into(network, name, tensor, out)
                if out is not tensor:
                    self.buffers.give_back(tensor)
            else:
                largest = largest_if_narrowed(tensor, stored)
            misfit = overflow(largest, stored)
            if misfit:
                raise CheckpointError(f"{component} tensor {name} {misfit}")
            return out

        return bake

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
        embeddings = [*self._own_tokens(), *map(facts, self.tokens.tokens)]
        manifest = {
            "format_version": FORMAT_VERSION,
            "kiln_version": __version__,
            "name": name,
            "family": self.checkpoint.family.name,
            "prediction_type": self.checkpoint.scheduler_config.get("prediction_type", "epsilon"),
            "storage": self.storage,
            "defaults": self.defaults,
            "source": dict(source),
            "adapters": [_baked(report) for report in self.reports],
            **({"embeddings": embeddings} if embeddings else {}),
            "applied": [_applied(report) for report in self.reports],
            **judged,
            "components": dict(components),
            "files": dict(sorted(self.files.items())),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _own_tokens(self) -> list[dict[str, Any]]:
        """The embeddings that the checkpoint brings: of a bundle, or of a tokenizer that learnt tokens."""
        if self.checkpoint.layout == "bundle":
            return kept(open_bundle(self.checkpoint.path).embeddings)
        return from_tokenizer(ordinary_tokens(self.checkpoint.tokenizer_dir), self.tokens.start)

    def _bytes(self, folder: Path, name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _baked(report: AdapterReport) -> dict[str, Any]:
    """What of an adapter stands in the list of adapters: what it takes to ask for it again."""
    row: dict[str, Any] = {
        "name": report.path.stem,
        "sha256": report.digest,
        "unet_strength": report.unet_strength,
        "text_encoder_strength": report.text_encoder_strength,
    }
    if report.rank is not None:
        row["rank"] = report.rank
    if report.blocks is not None:
        row |= {"blocks": report.blocks.by_name(), "lbw": report.blocks.typed}
    return row


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
