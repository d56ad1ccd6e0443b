"""Several checkpoints to one, in the layout of the first: a single file stays one, a folder gives a folder.

Streamed: one tensor of each is in memory. What belongs to no network (a schedule, an index of positions) is
the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import CheckpointError, UsageError
from ..checkpoints import Checkpoint, open_checkpoint
from ..planned_file import PRECISIONS, Planned, recipe, write_tensors
from ..publish import check_free, published, published_file
from ..resolve import locate_model
from ..weights import stored_dtype
from .alike import check_alike
from .folder import ORIGIN, write_folder
from .sums import METHODS, Method

Progress = Callable[[str, int, int], None]
"""Called with a network, tensors of it made, and its tensors in all."""

_HASHES = ("modelspec.hash_sha256", "modelspec.thumbnail", "sd_merge_models")


@dataclass(frozen=True)
class CheckpointMerge:
    """What to merge and where to; ``models`` are A and B, and C for ``add-difference``."""

    models: tuple[str, ...]
    output: Path
    method: Method
    precision: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"precision {self.precision!r}: expected auto, {', '.join(PRECISIONS)}")
        expected = METHODS[self.method.name]
        if len(self.models) != expected:
            names = " and ".join(("A", "B", "C")[:expected])
            raise UsageError(f"{self.method.name} takes {names}; {len(self.models)} checkpoints were given")


@dataclass(frozen=True)
class CheckpointMergeReport:
    """What was written: tensors merged by network, and tensors copied from A with the reason."""

    output: Path
    layout: str
    size_bytes: int
    merged: Mapping[str, int]
    copied: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)


def merge_checkpoints(spec: CheckpointMerge, progress: Progress | None = None) -> CheckpointMergeReport:
    """Write the merge.

    Raises:
        UsageError: there is no such model, or the name of the output is not one for its layout.
        CheckpointError: a checkpoint cannot be read, they differ in structure, or a value is not finite or
        does
            not fit into the precision.
        StorageError: the output exists, or the disk refused.
    """
    paths = [locate_model(model) for model in spec.models]
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        first = opened[0]
        single = first.layout in ("ldm", "pickle")
        _check_output(spec, first, single)
        for other in opened[1:]:
            check_alike(first, other)
            _check_prediction(first, other)
        plan = _Plan(spec, opened, progress)
        size = _write_file(spec, plan) if single else _write_folder(spec, plan)
        layout = "single file" if single else "folder"
        return CheckpointMergeReport(spec.output, layout, size, plan.merged, plan.copied, plan.dropped)


def _check_output(spec: CheckpointMerge, first: Checkpoint, single: bool) -> None:
    named = spec.output.suffix == ".safetensors"
    if single and not named:
        raise UsageError(
            f"{spec.output}: {first.path.name} is a single file, so the merge is one; expected -o "
            f"NAME.safetensors"
        )
    if not single and named:
        raise UsageError(
            f"{spec.output}: {first.path.name} is a folder, so the merge is one; expected -o FOLDER, or a "
            f"single "
            "file as the first checkpoint"
        )
    if single:
        check_free(spec.output, overwrite=spec.overwrite)
    if first.uses_ema:
        raise CheckpointError(
            f"{first.path}: holds the EMA copy of its UNet alone; merge a file with the UNet itself"
        )


def _check_prediction(first: Checkpoint, other: Checkpoint) -> None:
    one, two = (c.scheduler_config.get("prediction_type", "epsilon") for c in (first, other))
    if one != two:
        raise CheckpointError(
            f"{first.path} predicts {one}, {other.path} predicts {two}; a merge of both would draw noise"
        )


class _Plan:
    """Every tensor of the networks by diffusers name, made when it is asked for."""

    def __init__(self, spec: CheckpointMerge, opened: list[Checkpoint], progress: Progress | None) -> None:
        self.spec, self.opened, self.first = spec, opened, opened[0]
        self.progress = progress or (lambda network, done, total: None)
        self.merged: dict[str, int] = {}
        self.copied: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._done: dict[str, int] = {}

    def network(self, network: str) -> dict[str, Planned]:
        """The tensors of a network, in diffusers' names and shapes."""
        infos = self.first.tensors(network)
        types = {name: stored_dtype(info, self.spec.precision) for name, info in infos.items()}
        lacking = [other for other in self.opened[1:] if network not in other.networks]
        if lacking:
            why = f"{network}: {', '.join(other.path.name for other in lacking)} has none"
            self.copied[why] = len(infos)
            return {n: Planned(types[n], i.shape, self._copy(network, n)) for n, i in infos.items()}
        alphas = self.spec.method.alphas(network, list(infos))
        self.merged[network] = len(infos)
        return {n: Planned(types[n], i.shape, self._merge(network, n, alphas[n])) for n, i in infos.items()}

    def _copy(self, network: str, name: str) -> Callable[[], np.ndarray]:
        return lambda: self._count(network, self.first.read(network, name))

    def _merge(self, network: str, name: str, alpha: float) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            values = [checkpoint.read(network, name) for checkpoint in self.opened]
            return self._count(network, self.spec.method.merge(alpha, f"{network} {name}", *values))

        return make

    def _count(self, network: str, value: np.ndarray) -> np.ndarray:
        self._done[network] = self._done.get(network, 0) + 1
        self.progress(network, self._done[network], len(self.first.tensors(network)))
        return value


def _write_file(spec: CheckpointMerge, plan: _Plan) -> int:
    """A single file with the names and shapes that A has."""
    first, tensors = plan.first, dict[str, Planned]()
    source = next(iter(first.parts["unet"].entries.values())).source
    for network in first.networks:
        made = plan.network(network)
        for name, entry in first.parts[network].entries.items():
            one = made[name]
            tensors[entry.stored] = Planned(one.dtype, source.infos[entry.stored].shape, one.make)
    ema = [name for name in first.ignored if name.startswith("model_ema.")]
    if ema:
        plan.dropped["EMA copy, which would be A's alone"] = len(ema)
    rest = [name for name in first.ignored if not name.startswith("model_ema.")]
    if rest:
        plan.copied["of no network"] = len(rest)
    for name in rest:
        info = source.infos[name]
        tensors[name] = Planned(info.dtype, info.shape, _reader(source.read, name))
    metadata = {k: v for k, v in source.metadata.items() if k not in _HASHES} | _metadata(spec, first)
    with published_file(spec.output, overwrite=spec.overwrite) as path:
        return write_tensors(path, tensors, metadata, error=CheckpointError)


def _reader(read: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    return lambda: read(name)


def _write_folder(spec: CheckpointMerge, plan: _Plan) -> int:
    with published(
        spec.output, overwrite=spec.overwrite, marker=ORIGIN, kind="folder that Kiln wrote"
    ) as folder:
        networks = {network: plan.network(network) for network in plan.first.networks}
        return write_folder(folder, plan.first, networks, _metadata(spec, plan.first))


def _metadata(spec: CheckpointMerge, first: Checkpoint) -> dict[str, str]:
    """Where the merge is from: names of files, never folders."""
    names = [Path(model).name for model in spec.models]
    blocks = spec.method.blocks
    done = recipe(
        "merge",
        models=names,
        method=spec.method.name,
        alpha=spec.method.alpha,
        block_weights=dict(blocks.blocks) if blocks else None,
        base_alpha=blocks.base if blocks else None,
    )
    predicts = str(first.scheduler_config.get("prediction_type", "epsilon"))
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": spec.output.stem,
        "modelspec.prediction_type": "v" if predicts.startswith("v") else predicts,
        "modelspec.merged_from": ", ".join(Path(name).stem for name in names),
        "kiln_recipe": done,
    }
