"""Several adapters to one, whose effect is the sum of theirs at their strengths.

LoRAs are joined without loss: the sum of products ``u1 d1 + u2 d2`` is the product of the factors side by
side. What is no LoRA, or has to fit into a rank, goes through the difference itself and its largest singular
values, and the report says what that cost. A family that depends on the weight needs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from threadpoolctl import threadpool_limits

from ...errors import AdapterError, UsageError
from ..adapters.base import AdapterRef
from ..adapters.keys import TEXT_2, ModuleIndex
from ..checkpoints import Checkpoint, open_checkpoint
from ..planned_file import PRECISIONS, Planned, recipe, write_tensors
from ..publish import check_free, published_file
from ..resolve import locate_model
from .contributions import Layer, gather
from .factors import Budget
from .joining import Joined, join
from .placing import PlacedAdapter, open_files, place_adapter
from .spelling import KOHYA, Dialect, kohya_for
from .storing import lora_metadata


@dataclass(frozen=True)
class MergeSpec:
    """What to merge, and where to.

    ``rank`` limits every module; None keeps LoRAs as they are. ``model`` is the base, which families that
    depend on the weight need. ``precision`` is that of the factors; ``auto`` is the inputs' own where
    nothing is rounded, else fp32.
    """

    refs: tuple[AdapterRef, ...]
    output: Path
    rank: int | None = None
    model: str | None = None
    precision: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.refs:
            raise UsageError("no adapter to merge; expected FILE:STRENGTH, once or more")
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"precision {self.precision!r}: expected auto, {', '.join(PRECISIONS)}")
        if self.rank is not None:
            Budget(rank=self.rank)


@dataclass(frozen=True)
class MergeReport:
    """What was written. ``exact`` modules lost nothing but rounding, ``energies`` has the part kept of each
    other one.

    ``energy`` is the part kept over all modules; ``unmatched`` are tensors of the inputs that are not in the
    output, with the reason. ``ranks`` counts modules.
    """

    output: Path
    size_bytes: int
    exact: int
    energies: Mapping[str, float]
    energy: float
    ranks: Mapping[int, int]
    precision: str
    unmatched: Mapping[str, str] = field(default_factory=dict)


def merge(spec: MergeSpec) -> MergeReport:
    """Write one adapter in kohya's names that does what all of ``spec.refs`` do together, in their order.

    Raises:
        AdapterError: an adapter cannot be read or placed, they are of several families or shapes, a family
        needs
            the model or a rank that was not given, or a value does not fit into the precision.
        CheckpointError: the model cannot be read.
        StorageError: the output exists, or the disk refused.
    """
    check_free(spec.output, overwrite=spec.overwrite)
    with ExitStack() as stack, threadpool_limits(1):
        model, index = None, None
        if spec.model is not None:
            model = stack.enter_context(open_checkpoint(locate_model(spec.model)))
            index = _index(model)
        adapters = [place_adapter(open_files(ref.path, stack), index, ref.rank) for ref in spec.refs]
        family = model.family.name if model else _family(spec, adapters)
        layers = gather(list(zip(spec.refs, adapters, strict=True)), model, family in ("sd2", "sdxl"))
        _check_needs(spec, layers, model)
        dialect = _dialect(family, layers)
        tensors: dict[str, Planned] = {}
        joined: list[Joined] = []
        dtype = _dtype(spec, layers)
        for layer in layers:
            one = join(layer, dialect, dtype, spec.rank)
            tensors |= one.tensors
            joined.append(one)
        if not tensors:
            raise AdapterError("the adapters change nothing at these strengths; there is nothing to write")
        metadata = _metadata(spec, family, joined)
        with published_file(spec.output, overwrite=spec.overwrite) as path:
            size = write_tensors(path, tensors, metadata)
    return _report(spec, size, joined, adapters, dtype)


def _index(model: Checkpoint) -> ModuleIndex:
    return ModuleIndex(
        {
            network: {name: info.shape for name, info in model.tensors(network).items()}
            for network in model.networks
            if network != "vae"
        }
    )


def _family(spec: MergeSpec, adapters: Sequence[PlacedAdapter]) -> str | None:
    """The family of all; None where none tells."""
    said = {
        adapter.family: ref.path for ref, adapter in zip(spec.refs, adapters, strict=True) if adapter.family
    }
    if len(said) > 1:
        listed = ", ".join(f"{path} is for {family}" for family, path in said.items())
        raise AdapterError(f"cannot merge adapters of several families: {listed}")
    return next(iter(said), None)


def _check_needs(spec: MergeSpec, layers: Sequence[Layer], model: Checkpoint | None) -> None:
    """Refuse what cannot be merged as asked, before anything is computed."""
    for layer in layers:
        for one in layer.contributions:
            if one.depends_on_weight and model is None:
                raise AdapterError(
                    f"{one.path}: {one.label} depends on the weight that it changes, so it has no "
                    f"difference of its "
                    "own; give the base with --model MODEL"
                )
        if spec.rank is None and not layer.is_low_rank:
            one = next(c for c in layer.contributions if not c.is_low_rank)
            raise AdapterError(
                f"{one.path}: {one.label} is no product of two factors and can only be merged through its "
                "difference; say how much to keep with --rank N"
            )


def _dialect(family: str | None, layers: Sequence[Layer]) -> Dialect:
    unet = [f"{layer.module}.weight" for layer in layers if layer.network == "unet"]
    sdxl = family == "sdxl" or any(layer.network == TEXT_2 for layer in layers)
    return kohya_for(unet) if sdxl else KOHYA


def _dtype(spec: MergeSpec, layers: Sequence[Layer]) -> str:
    """The type of the factors: that asked for, else the inputs' own if they are only put side by side."""
    if spec.precision != "auto":
        return PRECISIONS[spec.precision]
    types = {dtype for layer in layers for one in layer.contributions for dtype in one.dtypes}
    untouched = spec.rank is None and all(layer.is_only_joined for layer in layers)
    return types.pop() if untouched and types in ({"F16"}, {"BF16"}) else "F32"


def _metadata(spec: MergeSpec, family: str | None, joined: Sequence[Joined]) -> dict[str, str]:
    ranks = Counter(one.rank for one in joined if one.rank)
    common = str(ranks.most_common(1)[0][0]) if ranks else "0"
    names = [
        {"file": ref.path.name, "unet": ref.strength("unet"), "text_encoder": ref.strength("text_encoder")}
        | ({"blocks": ref.blocks.typed} if ref.blocks else {})
        for ref in spec.refs
    ]
    return lora_metadata(
        family,
        spec.output.stem,
        ss_network_dim=common,
        ss_network_alpha=common,
        modelspec__merged_from=", ".join(ref.path.stem for ref in spec.refs),
        kiln_recipe=recipe("lora merge", adapters=names, rank=spec.rank),
    )


def _report(
    spec: MergeSpec, size: int, joined: Sequence[Joined], adapters: Sequence[PlacedAdapter], dtype: str
) -> MergeReport:
    total = sum(one.total for one in joined)
    names = {name: key for key, name in PRECISIONS.items()}
    return MergeReport(
        spec.output,
        size,
        sum(one.exact for one in joined),
        {one.label: one.kept / one.total if one.total else 1.0 for one in joined if not one.exact},
        sum(one.kept for one in joined) / total if total else 1.0,
        dict(Counter(one.rank for one in joined if one.rank)),
        names[dtype],
        {key: why for adapter in adapters for key, why in adapter.reasons.items()},
    )
