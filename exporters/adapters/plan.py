"""Plans which tensors of a model the adapters change, and computes the changed tensors one at a time.

All arithmetic is in float32: the base weight, plus every update in the order in which the adapters were
given. An update sees the running weight, so formats that depend on it compose in the same order.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import AdapterError
from .base import AdapterRef, ModuleTensors, WeightUpdate
from .families import FamilyGuess, check_family, describe_target, guess_family, refuse_foreign
from .formats import format_of
from .keys import Location, ModuleIndex
from .open import Adapter, AdapterModule, open_adapter
from .widen import widen

Target = tuple[str, str]
"""Network and tensor name."""


@dataclass(frozen=True)
class AdapterReport:
    """What was done with one adapter file.

    ``matched_modules`` counts modules by network, with strength 0 too. ``unmatched_keys`` had no place in
    the model and were not applied. ``path`` is as given, ``digest`` the SHA-256 of the weights file.
    """

    path: Path
    digest: str
    format: str
    unet_strength: float
    text_encoder_strength: float
    matched_modules: Mapping[str, int]
    unmatched_keys: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Step:
    """One update of one tensor at its strength, and what to call it when it fails."""

    update: WeightUpdate
    strength: float
    label: str


@dataclass(frozen=True)
class BakePlan:
    """Everything needed to bake: the updates of each tensor, and a report on each adapter.

    The adapter files stay open until ``close``, or until the plan is no longer used.
    """

    reports: tuple[AdapterReport, ...]
    _steps: Mapping[Target, tuple[_Step, ...]]
    _close: Callable[[], None] = field(repr=False)

    def is_touched(self, network: str, name: str) -> bool:
        """Whether ``bake`` changes this tensor."""
        return (network, name) in self._steps

    def bake(self, network: str, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor with all adapters added.

        Args:
            network: ``unet`` or ``text_encoder``.
            name: the tensor's name in diffusers' (transformers') names.
            tensor: its base value in the type it is stored in.

        Returns:
            A new float32 array of the same shape; the very same object when no adapter touches it.

        Raises:
            AdapterError: an update overflows float32, or its tensors hold NaN or infinity.
        """
        steps = self._steps.get((network, name))
        if not steps:
            return tensor
        weight = widen(tensor)
        for step in steps:
            with np.errstate(over="ignore", invalid="ignore"):  # checked by value below
                delta = step.update.delta(weight, step.strength)
            # The extremes are NaN or infinite if one value is, and need no array of their own.
            if delta.size and not np.isfinite([delta.max(), delta.min()]).all():
                raise AdapterError(
                    f"{step.label}: its change at strength {step.strength:g} overflows float32"
                )
            weight += delta
        return weight

    def close(self) -> None:
        """Close the adapter files; closing twice is allowed."""
        self._close()

    def __enter__(self) -> BakePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Matched:
    """One adapter file laid over the model: its updates by tensor, and what is left over."""

    adapter: Adapter
    digest: str
    format: str
    updates: tuple[tuple[Target, WeightUpdate, str], ...]
    modules: Mapping[str, int]
    unmatched: tuple[str, ...]


def plan_bake(
    targets: Mapping[str, Mapping[str, tuple[int, ...]]],
    refs: Sequence[AdapterRef],
) -> BakePlan:
    """Match adapters to a model and check that they can be baked, before anything is written.

    Args:
        targets: for each network its tensors' names and shapes, in diffusers' names.
        refs: the adapters in the order in which they act; a file that occurs twice acts twice.

    Raises:
        AdapterError: a file is unreadable, is of another family or format, does not fit in shape, holds NaN
            or infinity, or matches nothing at all.
    """
    index = ModuleIndex(targets)
    steps: dict[Target, list[_Step]] = {}
    reports = []
    with ExitStack() as stack:
        opened: dict[Path, _Matched] = {}
        for ref in refs:
            key = ref.path.resolve()
            if key not in opened:
                adapter = open_adapter(ref.path)
                stack.callback(adapter.source.close)
                opened[key] = _match(adapter, index)
            matched = opened[key]
            for target, update, label in matched.updates:
                strength = ref.strength(target[0])
                if strength != 0:
                    steps.setdefault(target, []).append(_Step(update, strength, label))
            reports.append(_report(ref, matched))
        closing = stack.pop_all()
    plan = BakePlan(tuple(reports), {target: tuple(row) for target, row in steps.items()}, closing.close)
    weakref.finalize(plan, closing.close)  # for callers that let the plan go without closing it
    return plan


def _match(adapter: Adapter, index: ModuleIndex) -> _Matched:
    """Lay one adapter over the model; everything that can be wrong with it is found here."""
    refuse_foreign(adapter, describe_target(index))
    guess = guess_family(adapter)
    check_family(adapter, guess, index)
    places = index.place(module.stem for module in adapter.modules if module.format)
    updates: list[tuple[Target, WeightUpdate, str]] = []
    unmatched = list(adapter.loose_keys)
    modules: Counter[str] = Counter()
    taken: dict[Location, str] = {}
    for module in adapter.modules:
        location = places.get(module.stem)
        if location is None:
            unmatched.extend(module.keys.values())
            continue
        if location in taken:
            both = f"{taken[location]!r} and {module.stem!r}"
            raise AdapterError(f"{adapter.path}: {both} are the same module ({location.module})")
        taken[location] = module.stem
        modules[location.network] += 1
        for update in _updates(adapter, module, location):
            target = (location.network, f"{location.module}.{update.parameter}")
            if target not in index.shapes and update.parameter == "bias":
                unmatched.append(module.keys["up_bias"])  # the layer has no bias to add to
                continue
            _check_shape(adapter, update, target, index, guess)
            updates.append((target, update, f"{adapter.path}: module {module.stem!r}"))
    if not modules:
        raise _nothing_matched(adapter, guess, index)
    _check_values(adapter, taken.values())
    form = " and ".join(name for name, _ in adapter.formats.most_common())
    return _Matched(adapter, _sha256(adapter.path), form, tuple(updates), dict(modules), tuple(unmatched))


def _updates(adapter: Adapter, module: AdapterModule, location: Location) -> tuple[WeightUpdate, ...]:
    form = format_of(module.keys)
    if form is None:
        return ()
    scaling = adapter.scaling(location.network)
    alpha = scaling.alpha_of(location.module)
    return form.updates(
        ModuleTensors(module.stem, module.keys, adapter.source, alpha, scaling.rank_stabilized)
    )


def _check_shape(
    adapter: Adapter, update: WeightUpdate, target: Target, index: ModuleIndex, guess: FamilyGuess
) -> None:
    shape = index.shapes[target]
    misfit = update.misfit(shape)
    if misfit is not None:
        likely = (
            f"it is probably for {guess.title} ({guess.reason})"
            if guess.family
            else "it is for another model"
        )
        raise AdapterError(
            f"{adapter.path}: does not fit: its change of {target[1]} ({target[0]}) has the shape {misfit}, "
            f"the model's is {list(shape)}; {likely}, {describe_target(index)}"
        )


def _check_values(adapter: Adapter, stems: Iterable[str]) -> None:
    """Read every tensor that will be used once, so that NaN is found before anything is written."""
    used = set(stems)
    for module in adapter.modules:
        if module.stem in used:
            tensors = ModuleTensors(module.stem, module.keys, adapter.source)
            for parameter in module.keys:
                if parameter in ("alpha", "scale"):
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


def _report(ref: AdapterRef, matched: _Matched) -> AdapterReport:
    return AdapterReport(
        ref.path,
        matched.digest,
        matched.format,
        ref.strength("unet"),
        ref.strength("text_encoder"),
        matched.modules,
        matched.unmatched,
        matched.adapter.metadata,
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
