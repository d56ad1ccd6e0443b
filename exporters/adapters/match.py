"""Lays one adapter file over a model: which tensor each module changes, and why the rest is not applied.

Everything that can be wrong with an adapter is found here, before anything is written.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdapterError
from .base import ModuleTensors, WeightUpdate
from .families import FamilyGuess, check_family, describe_target, guess_family, refuse_foreign
from .formats import unused, updates_of
from .keys import Location, ModuleIndex
from .lora import LORA
from .open import Adapter, AdapterModule
from .updates import PartUpdate

Target = tuple[str, str]
"""Network and tensor name."""

_EMBEDDING = re.compile(r"^bundle_emb\.|^<.+>$")
_SCALARS = frozenset({"alpha", "scale", "on_input"})
_READ_BY_FORMATS = frozenset({"bias_indices", "bias_size", "scaled"})  # whole numbers and flags
_BIASES = {"bias": ("up_bias", "diff_b", "b_norm")}


@dataclass(frozen=True)
class Matched:
    """One adapter file laid over the model: its updates by tensor, and what is left over.

    ``modules`` counts by network, ``keys`` counts tensors; ``reasons`` says of every other key why it is not
    applied.
    """

    adapter: Adapter
    digest: str
    format: str
    updates: tuple[tuple[Target, WeightUpdate, str], ...]
    modules: Mapping[str, int]
    keys: int
    reasons: Mapping[str, str]


def match_adapter(adapter: Adapter, index: ModuleIndex, keep_rank: int | None = None) -> Matched:
    """Lay one adapter over the model.

    Raises:
        AdapterError: it is of another family or format, does not fit in shape, holds NaN or infinity, names
            one module twice, cannot be cut to ``keep_rank``, or matches nothing at all.
    """
    refuse_foreign(adapter, describe_target(index))
    guess = guess_family(adapter)
    check_family(adapter, guess, index)
    places = index.place(module.stem for module in adapter.modules if module.format)
    reasons = {key: _loose(key) for key in adapter.loose_keys}
    updates: list[tuple[Target, WeightUpdate, str]] = []
    modules: Counter[str] = Counter()
    taken: dict[Location, str] = {}
    for module in adapter.modules:
        location = places.get(module.stem)
        if location is None:
            reasons.update(dict.fromkeys(module.keys.values(), _unplaced(module)))
            continue
        if location in taken:
            both = f"{taken[location]!r} and {module.stem!r}"
            raise AdapterError(f"{adapter.path}: {both} are the same module ({location.module})")
        taken[location] = module.stem
        modules[location.network] += 1
        tensors = module_tensors(adapter, module, location, keep_rank)
        reasons.update({module.keys[name]: f"not read by {module.format}" for name in unused(module.keys)})
        for update in updates_of(tensors):
            target = location.tensor(update.parameter)
            if target not in index.shapes and update.parameter == "bias":
                keys = [module.keys[name] for name in _BIASES["bias"] if name in module.keys]
                reasons.update(dict.fromkeys(keys, "the layer has no bias to add to"))
                continue
            placed = PartUpdate(update, *location.rows) if location.rows else update
            _check_shape(adapter, placed, target, index, guess)
            updates.append((target, placed, f"{adapter.path}: module {module.stem!r}"))
    if not modules:
        raise _nothing_matched(adapter, guess, index)
    _check_values(adapter, taken.values(), reasons)
    form = " and ".join(name for name, _ in adapter.formats.most_common())
    used = len(adapter.source.infos) - len(reasons)
    return Matched(adapter, _sha256(adapter.path), form, tuple(updates), dict(modules), used, reasons)


def _loose(key: str) -> str:
    if _EMBEDDING.search(key):
        return "a token's embedding, which comes with the adapter where it acts"
    return "no parameter that Kiln knows"


def _unplaced(module: AdapterModule) -> str:
    if _EMBEDDING.search(module.stem):
        return "a token's embedding, which comes with the adapter where it acts"
    return "the model has no such layer" if module.format else "its module has no tensor that changes a layer"


def module_tensors(
    adapter: Adapter, module: AdapterModule, location: Location, keep_rank: int | None
) -> ModuleTensors:
    """The module with what the configuration says about it, and what the request does."""
    if keep_rank is not None and not LORA.owns(frozenset(module.keys)):
        raise AdapterError(
            f"{adapter.path}: module {module.stem!r} is {module.format}; "
            f"only a LoRA can be cut to the rank {keep_rank}"
        )
    scaling = adapter.scaling(location.network)
    return ModuleTensors(
        module.stem,
        module.keys,
        adapter.source,
        alpha=scaling.alpha_of(location.module),
        rank_stabilized=scaling.rank_stabilized,
        config_rank=scaling.rank_of(location.module),
        keep_rank=keep_rank,
        peft_terms=scaling.terms if module.dialect == "peft" else None,
    )


def _check_shape(
    adapter: Adapter, update: WeightUpdate, target: Target, index: ModuleIndex, guess: FamilyGuess
) -> None:
    shape = index.shapes.get(target)
    misfit = "of a tensor that the layer lacks" if shape is None else update.misfit(shape)
    if misfit is not None:
        likely = (
            f"it is probably for {guess.title} ({guess.reason})"
            if guess.family
            else "it is for another model"
        )
        raise AdapterError(
            f"{adapter.path}: does not fit: its change of {target[1]} ({target[0]}) has the shape {misfit}, "
            f"the model's is {list(shape or ())}; {likely}, {describe_target(index)}"
        )


def _check_values(adapter: Adapter, stems: Iterable[str], skipped: Mapping[str, str]) -> None:
    """Read every tensor that will be used once, so that NaN is found before anything is written."""
    used = set(stems)
    for module in adapter.modules:
        if module.stem not in used:
            continue
        tensors = ModuleTensors(module.stem, module.keys, adapter.source)
        for parameter, key in module.keys.items():
            if key in skipped or parameter in _READ_BY_FORMATS:
                continue
            if parameter in _SCALARS:
                tensors.scalar(parameter)
            else:
                tensors.read(parameter)


def _nothing_matched(adapter: Adapter, guess: FamilyGuess, index: ModuleIndex) -> AdapterError:
    keys = ", ".join(repr(key[:80]) for key in list(adapter.source.infos)[:3])
    family = f"; by its tensors it is for {guess.title} ({guess.reason})" if guess.family else ""
    return AdapterError(
        f"{adapter.path}: none of its {len(adapter.source.infos)} tensors matches a layer of the model "
        f"(they begin {keys}){family}; {describe_target(index)}"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
