"""What each adapter of a merge does to each layer, in order, at its strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import AdapterError
from ..adapters.base import AdapterRef, WeightUpdate
from ..adapters.block_strengths import BASE, unet_blocks
from ..adapters.keys import UNET
from ..adapters.lora import LowRank
from ..adapters.updates import AddUpdate, SumUpdate, fits, trimmed
from ..checkpoints import Checkpoint
from .placing import PlacedAdapter, PlacedModule
from .topology import layer_shape


@dataclass(frozen=True)
class Contribution:
    """One update of one tensor of a layer, by one module of one adapter, at a strength."""

    module: PlacedModule
    update: WeightUpdate
    strength: float

    @property
    def path(self) -> str:
        """The adapter's file."""
        return str(self.module.adapter.path)

    @property
    def label(self) -> str:
        """The layer and the family, for messages."""
        return self.module.label

    @property
    def depends_on_weight(self) -> bool:
        """Whether the change cannot be had without the weight."""
        return not isinstance(self.update, (AddUpdate, SumUpdate))

    @property
    def low_rank(self) -> LowRank | None:
        """The product of two factors that the change is, or None."""
        change = self.update.change if isinstance(self.update, AddUpdate) else None
        if isinstance(change, LowRank) and "mid" not in self.module.module.keys:
            return change
        return None

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a product of two factors, or no matrix at all."""
        return self.low_rank is not None or (not self.depends_on_weight and len(self.shape) == 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change, kernels of one cut off."""
        if isinstance(self.update, AddUpdate):
            return trimmed(self.update.change.shape)
        assert isinstance(self.update, SumUpdate)
        return trimmed(max((change.shape for change in self.update.changes), key=len))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored types of its tensors, but for single numbers."""
        infos = self.module.adapter.source.infos
        return tuple(infos[key].dtype for key in self.module.module.keys.values() if infos[key].shape)

    @property
    def scale(self) -> float:
        """The factor of a product of two, strength and all."""
        assert self.low_rank is not None
        return self.low_rank.scale * self.strength

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """``up`` (O, r) and ``down`` (r, columns) as they are stored, float32."""
        low_rank = self.low_rank
        assert low_rank is not None
        up, down = self.module.tensors.read("up"), self.module.tensors.read("down")
        rank = low_rank.rank
        return up.reshape(up.shape[:2])[:, :rank], down.reshape(len(down), -1)[:rank]


@dataclass(frozen=True)
class Layer:
    """One tensor of a layer, with all that changes it; ``shape`` is that of the change, ``weight`` the
    base's value.
    """

    network: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    contributions: tuple[Contribution, ...]
    model: Checkpoint | None = None

    @property
    def label(self) -> str:
        """How reports call it."""
        return f"{self.network}.{self.module}.{self.parameter}"

    @property
    def is_low_rank(self) -> bool:
        """Whether the sum can be joined without loss."""
        return all(one.is_low_rank for one in self.contributions)

    @property
    def is_only_joined(self) -> bool:
        """Whether no factor has to be multiplied: all scales have one magnitude, which becomes alpha's."""
        scales = {abs(one.scale) for one in self.contributions if one.low_rank}
        return len(scales) <= 1 and all(one.low_rank for one in self.contributions)

    def change(self) -> np.ndarray:
        """The whole change, float32, of ``shape``; one update sees the weight with those before it in it."""
        shape, running = self.shape, np.zeros(self.shape, np.float32)
        base: np.ndarray = running
        if self.model is not None:
            base = self.model.read(self.network, f"{self.module}.{self.parameter}").astype(np.float32)
            shape, running = base.shape, base.copy()
        depends = any(one.depends_on_weight for one in self.contributions)
        total = np.zeros(shape, np.float32)
        for one in self.contributions:
            with np.errstate(over="ignore", invalid="ignore"):  # checked by value
                delta = one.update.delta(running if depends else total, one.strength)
                total += delta
                if depends:
                    running += delta
        if not np.isfinite(total).all():
            raise AdapterError(f"{self.label}: the change overflows float32 at these strengths")
        return total


def gather(
    adapters: Sequence[tuple[AdapterRef, PlacedAdapter]], model: Checkpoint | None, linear: bool = False
) -> tuple[Layer, ...]:
    """The layers that the adapters change, in the order in which they are met.

    Args:
        adapters: with their strengths; what has no effect at these is left out.
        model: the base, where it is at hand.
        linear: whether the UNet is one of those that ``topology.layer_shape`` calls so.

    Raises:
        AdapterError: two changes of one layer, or a change and the model, differ in shape.
    """
    found: dict[tuple[str, str, str], list[Contribution]] = {}
    blocks = _blocks(adapters)
    for ref, adapter in adapters:
        for (network, path), module in adapter.modules.items():
            block = blocks.get(path) if network == UNET else BASE
            strength = ref.strength_in(network, block)
            for update in module.updates():
                one = Contribution(module, update, strength)
                if strength and not (one.low_rank and one.scale == 0):
                    found.setdefault((network, path, update.parameter), []).append(one)
    return tuple(_layer(where, tuple(ones), model, linear) for where, ones in found.items())


def _blocks(adapters: Sequence[tuple[AdapterRef, PlacedAdapter]]) -> Mapping[str, str]:
    """The block of each layer of the UNet, where a strength asks for it."""
    if not any(ref.blocks for ref, _ in adapters):
        return {}
    paths = {path for _, adapter in adapters for network, path in adapter.modules if network == UNET}
    named = unet_blocks(f"{path}.weight" for path in paths)
    return {name.removesuffix(".weight"): block for name, block in named.items()}


def _layer(
    where: tuple[str, str, str], ones: tuple[Contribution, ...], model: Checkpoint | None, linear: bool
) -> Layer:
    network, path, parameter = where
    if model is not None:
        info = model.tensors(network).get(f"{path}.{parameter}")
        for one in ones:
            misfit = "none" if info is None else one.update.misfit(info.shape)
            if misfit is not None:
                raise AdapterError(
                    f"{one.path}: {one.label} does not fit the model: its {parameter} is "
                    f"{list(info.shape) if info else 'not there'}, the change is {misfit}"
                )
        assert info is not None
        return Layer(*where, info.shape, ones, model)
    known = [one for one in ones if not one.depends_on_weight]
    shape = max((one.shape for one in known), key=len, default=())
    for one in known:
        if not fits(one.shape, shape):
            raise AdapterError(
                f"{one.path}: {one.label} changes a {parameter} of {list(one.shape)}, another adapter one of "
                f"{list(shape)}; they are for different models"
            )
    return Layer(*where, layer_shape(network, path, shape, linear), ones)
