"""Two checkpoints to a LoRA: their difference, factored layer by layer.

The idea and the names are those of kohya-ss/sd-scripts (``extract_lora_from_models.py``) and LyCORIS: the
difference of each weight, flattened to its rows, cut to its largest singular values; alpha equals the rank,
so the scale is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ...errors import AdapterError, CheckpointError, UsageError
from ..adapters.updates import matrix, trimmed
from ..checkpoints import Checkpoint, open_checkpoint
from ..merging.alike import check_alike
from ..planned_file import PRECISIONS, Planned, planned, recipe, write_tensors
from ..publish import check_free, published_file
from ..tensors import DTYPES
from .factors import Budget, Factored, factor
from .spelling import KOHYA
from .storing import lora_metadata, number, short_digest

Progress = Callable[[str, int, int], None]
"""Called with a network, tensors done, and its tensors in all."""


@dataclass(frozen=True)
class ExtractSpec:
    """What to extract, and where to.

    ``budget`` is for linear layers and convolutions of one pixel, ``conv_budget`` for the others; None
    leaves them out. ``differences`` also stores those of biases and norms, as they are. ``exact`` finds the
    best factors of large layers too, which takes minutes in place of seconds.
    """

    tuned: Path
    base: Path
    output: Path
    budget: Budget
    conv_budget: Budget | None = None
    precision: str = "fp16"
    differences: bool = False
    exact: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: expected {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class ExtractedModule:
    """One layer: its rank, the part of the difference's energy kept, and its length over that of the weight.

    ``energy`` is measured on the factors as they are stored. ``rank`` is 0 for a difference that is stored
    whole.
    """

    network: str
    module: str
    rank: int
    energy: float
    change: float


@dataclass(frozen=True)
class ExtractReport:
    """What was written. ``energy`` is the part kept of the difference of all tensors of UNet and text
    encoder.

    ``identical`` counts tensors that do not differ, ``left_out`` those that differ and are not in the file,
    by kind, and ``left_out_energy`` is their part of the whole. ``vae_differs`` is None where one has no VAE.
    """

    output: Path
    size_bytes: int
    modules: tuple[ExtractedModule, ...]
    energy: float
    identical: int
    left_out: dict[str, int]
    left_out_energy: float
    vae_differs: bool | None


class _Sums:
    """Squared norms of what was met, and what became of it."""

    def __init__(self) -> None:
        self.total = self.kept = self.left_out = 0.0
        self.identical = 0
        self.kinds: Counter[str] = Counter()

    def skip(self, kind: str, squared: float) -> None:
        self.kinds[kind] += 1
        self.left_out += squared
        self.total += squared

    def keep(self, squared: float, kept: float) -> None:
        self.kept += kept
        self.total += squared


def extract(spec: ExtractSpec, progress: Progress | None = None) -> ExtractReport:
    """Write the LoRA that leads from ``spec.base`` to ``spec.tuned``, in kohya's names.

    One tensor of each checkpoint is in memory at a time, and the factors made so far.

    Raises:
        CheckpointError: a checkpoint cannot be read, they are of different shapes, or hold NaN.
        AdapterError: nothing differs, or a factor does not fit into the precision.
        StorageError: the output exists, or the disk refused.
    """
    check_free(spec.output, overwrite=spec.overwrite)
    # Eigenvectors of a few hundred rows: threads of BLAS on a machine at work made it ten times slower.
    with ExitStack() as stack, threadpool_limits(1):
        tuned = stack.enter_context(open_checkpoint(spec.tuned))
        base = stack.enter_context(open_checkpoint(spec.base))
        check_alike(tuned, base)
        networks = [n for n in tuned.networks if n != "vae" and n in base.networks]
        tensors: dict[str, Planned] = {}
        modules: list[ExtractedModule] = []
        sums = _Sums()
        for network in networks:
            names = list(tuned.tensors(network))
            for done, name in enumerate(names, 1):
                modules.extend(_tensor(spec, tuned, base, network, name, tensors, sums))
                if progress:
                    progress(network, done, len(names))
        if not tensors:
            raise AdapterError(_nothing(spec, sums))
        metadata = _metadata(spec, tuned, modules)
        with published_file(spec.output, overwrite=spec.overwrite) as path:
            size = write_tensors(path, tensors, metadata)
        return ExtractReport(
            spec.output,
            size,
            tuple(modules),
            sums.kept / sums.total if sums.total else 1.0,
            sums.identical,
            dict(sums.kinds),
            sums.left_out / sums.total if sums.total else 0.0,
            _vae_differs(tuned, base),
        )


def difference(one: np.ndarray, two: np.ndarray, what: str) -> np.ndarray:
    """``one - two`` in float32; a CheckpointError when it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # checked by value
        change = one.astype(np.float32) - two.astype(np.float32)
    if not np.isfinite(change).all():
        raise CheckpointError(f"{what} differs by NaN or infinity; one of the checkpoints is damaged")
    return change


def _tensor(
    spec: ExtractSpec,
    tuned: Checkpoint,
    base: Checkpoint,
    network: str,
    name: str,
    tensors: dict[str, Planned],
    sums: _Sums,
) -> Iterator[ExtractedModule]:
    """Extract one tensor into ``tensors``."""
    weight = base.read(network, name)
    change = difference(tuned.read(network, name), weight, f"{network} {name!r}")
    squared = float(np.vdot(change.astype(np.float64), change.astype(np.float64)))
    if squared == 0:
        sums.identical += 1
        return
    path, _, parameter = name.rpartition(".")
    stem = KOHYA.stem(network, path)
    size = np.sqrt(
        squared / max(float(np.vdot(weight.astype(np.float64), weight.astype(np.float64))), 1e-300)
    )
    kind, budget = _kind(name, change.shape, spec)
    if change.ndim == 1 and spec.differences:
        parameter = _DIFFERENCES["norm" in path, parameter]
        tensors[f"{stem}.{parameter}"] = planned(change, "F32")
        sums.keep(squared, squared)
        yield ExtractedModule(network, path, 0, 1.0, float(size))
    elif budget is None or parameter != "weight":
        sums.skip(kind, squared)
    else:
        made = factor(matrix(change), budget, exact=spec.exact)
        kept = _store(stem, made, change, PRECISIONS[spec.precision], tensors)
        sums.keep(squared, kept)
        yield ExtractedModule(network, path, made.rank, kept / squared, float(size))


_DIFFERENCES = {
    (True, "weight"): "w_norm",
    (True, "bias"): "b_norm",
    (False, "weight"): "diff",
    (False, "bias"): "diff_b",
}


def _kind(name: str, shape: tuple[int, ...], spec: ExtractSpec) -> tuple[str, Budget | None]:
    """What a tensor is, for the report, and how much of it to keep."""
    if len(shape) == 1:
        return ("norms" if "norm" in name else "biases"), None
    if "embeddings." in name:
        return "embeddings", None  # kohya's LoRA has no place for them; textual inversion does
    if len(trimmed(shape)) == 2:
        return "linear layers", spec.budget
    return "convolutions", spec.conv_budget


def _store(stem: str, made: Factored, change: np.ndarray, dtype: str, tensors: dict[str, Planned]) -> float:
    """Plan the tensors of a module. Returns the energy that they keep as they are stored."""
    kernel = change.shape[2:]
    down = made.down.reshape(made.rank, *change.shape[1:])
    up = made.up.reshape(len(made.up), made.rank, *(1,) * len(kernel))
    tensors[f"{stem}.lora_down.weight"] = planned(down, dtype)
    tensors[f"{stem}.lora_up.weight"] = planned(up, dtype)
    tensors[f"{stem}.alpha"] = number(float(made.rank))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused when it is written
        stored = [value.astype(DTYPES[dtype]).astype(np.float32) for value in (made.up, made.down)]
        rest = matrix(change) - stored[0] @ stored[1]
        lost = float(np.vdot(rest.astype(np.float64), rest.astype(np.float64)))
    return made.total - lost


def _nothing(spec: ExtractSpec, sums: _Sums) -> str:
    if not sums.kinds:
        return (
            f"{spec.tuned} and {spec.base} have the same UNet and text encoder; there is nothing to extract"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in sums.kinds.items())
    return (
        f"{spec.tuned} and {spec.base} differ only in {kinds}; --conv-rank takes convolutions, --differences "
        "biases and norms"
    )


def _vae_differs(tuned: Checkpoint, base: Checkpoint) -> bool | None:
    """Whether the VAEs differ, which no LoRA holds."""
    if "vae" not in tuned.networks or "vae" not in base.networks:
        return None
    names = tuned.tensors("vae")
    if names.keys() != base.tensors("vae").keys():
        return True
    return any(
        not np.array_equal(
            tuned.read("vae", name).astype(np.float32), base.read("vae", name).astype(np.float32)
        )
        for name in names
    )


def _metadata(spec: ExtractSpec, tuned: Checkpoint, modules: list[ExtractedModule]) -> dict[str, str]:
    ranks = Counter(module.rank for module in modules if module.rank)
    common = str(ranks.most_common(1)[0][0]) if ranks else "0"
    dynamic = {} if len(ranks) < 2 else {"ss_network_args": recipe("args", ranks=sorted(ranks))}
    budget = {k: v for k, v in vars(spec.budget).items() if v is not None}
    conv = {k: v for k, v in vars(spec.conv_budget).items() if v is not None} if spec.conv_budget else None
    done = recipe("lora extract", tuned=spec.tuned.name, base=spec.base.name, budget=budget, conv_budget=conv)
    return lora_metadata(
        tuned.family.name,
        spec.output.stem,
        ss_network_dim=common,
        ss_network_alpha=common,
        ss_sd_model_name=spec.base.name,
        kiln_recipe=done,
        **_hash(spec.base),
        **dynamic,
    )


def _hash(base: Path) -> dict[str, str]:
    """The start of the base's SHA-256, where it is one file, by which model sites find it."""
    return {"kiln_base_hash": short_digest(base)} if base.is_file() else {}
