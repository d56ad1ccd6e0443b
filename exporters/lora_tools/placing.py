"""Reads an adapter file as modules of a network: with the base model's layers, or those of its family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdapterError, UsageError
from ..adapters.base import ModuleTensors, WeightUpdate
from ..adapters.families import guess_family, refuse_foreign
from ..adapters.formats import updates_of
from ..adapters.keys import Location, ModuleIndex
from ..adapters.match import module_tensors
from ..adapters.open import Adapter, AdapterModule, open_adapter
from ..adapters.scaling import CONFIG_NAME
from ..adapters.updates import scale_of
from ..checkpoints import open_checkpoint
from ..resolve import locate_model
from .topology import TOPOLOGIES, any_index, family_index

PEFT_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_LDM_OR_NUMBER = re.compile(r"input_blocks|middle_block|output_blocks|:\d+$")
_TO = "expected an adapter of Stable Diffusion"


@dataclass(frozen=True)
class PlacedModule:
    """One module of an adapter, the layer that it changes, and its tensors with their scale."""

    adapter: Adapter
    module: AdapterModule
    location: Location
    tensors: ModuleTensors

    @property
    def where(self) -> tuple[str, str]:
        """Network and path of the layer, in diffusers' names."""
        return self.location.network, self.location.module

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{'.'.join(self.where)} ({self.module.format})"

    @property
    def alpha(self) -> float:
        """The alpha of a LoRA by which its factors are scaled, whatever says so: alpha / rank is the
        scale.
        """
        rank = self.tensors.shape("down")[0]
        if "scale" not in self.module.keys and not self.tensors.rank_stabilized:
            stored = self.tensors.scalar("alpha") if "alpha" in self.module.keys else self.tensors.alpha
            return float(rank) if stored is None else stored
        return scale_of(self.tensors, rank) * rank

    def updates(self) -> tuple[WeightUpdate, ...]:
        """What it changes; raises AdapterError where its tensors contradict each other."""
        return updates_of(self.tensors)


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter's modules by layer, and why the other tensors have no place.

    ``family`` is that of its tensors, None where they do not tell.
    """

    adapters: tuple[Adapter, ...]
    modules: Mapping[tuple[str, str], PlacedModule]
    reasons: Mapping[str, str]
    family: str | None

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all its files; the first that says something goes first."""
        merged: dict[str, str] = {}
        for adapter in self.adapters:
            merged = {**adapter.source.metadata, **merged}
        return merged


def model_index(model: str | Path) -> ModuleIndex:
    """The layers of a checkpoint or bundle.

    Raises:
        UsageError, CheckpointError: there is none, or it cannot be read.
    """
    with open_checkpoint(locate_model(str(model))) as checkpoint:
        return ModuleIndex(
            {
                network: {name: info.shape for name, info in checkpoint.tensors(network).items()}
                for network in checkpoint.networks
            }
        )


def open_files(path: Path, stack: ExitStack) -> tuple[Adapter, ...]:
    """The adapter of a file or folder, or those of a folder of PEFT folders, one for each network.

    Raises:
        AdapterError: it cannot be read.
        UsageError: there is nothing at ``path``.
    """
    if not path.exists():
        raise UsageError(f"no file or folder {path}; expected an adapter")
    folders = [path / n for n in PEFT_NETWORKS if path.is_dir() and (path / n / CONFIG_NAME).is_file()]
    adapters = []
    for one in folders or [path]:
        adapters.append(open_adapter(one))
        stack.callback(adapters[-1].source.close)
    return tuple(adapters)


def place_adapter(
    adapters: Sequence[Adapter],
    index: ModuleIndex | None = None,
    keep_rank: int | None = None,
) -> PlacedAdapter:
    """Find the layer of every module, in ``index`` or in the family that the tensors show.

    Raises:
        AdapterError: it is no adapter of Stable Diffusion, its family is not known, two modules are one
        layer,
            or no module has a place.
    """
    found: dict[tuple[str, str], PlacedModule] = {}
    reasons: dict[str, str] = {}
    for adapter in adapters:
        refuse_foreign(adapter, _TO)
    families = {guess_family(adapter).family for adapter in adapters} - {None}
    family = next(iter(families)) if len(families) == 1 else None
    if "sdxl" in families:
        family = "sdxl"  # its first text encoder looks like that of SD1
    layers = index or _family_layers(adapters[0], family)
    for adapter in adapters:
        places = _places(adapter, layers, known=index is not None)
        reasons |= dict.fromkeys(adapter.loose_keys, "no parameter that Kiln knows")
        for module in adapter.modules:
            location = places.get(module.stem)
            if location is None:
                reasons |= dict.fromkeys(module.keys.values(), "no layer has this name")
                continue
            where = (location.network, location.module)
            if where in found:
                both = f"{found[where].module.stem!r} and {module.stem!r}"
                raise AdapterError(f"{adapter.path}: {both} are the same module ({location.module})")
            tensors = module_tensors(adapter, module, location, keep_rank)
            found[where] = PlacedModule(adapter, module, location, tensors)
    if not found:
        first = next(iter(adapters[0].source.infos))
        raise AdapterError(
            f"{adapters[0].path}: none of its tensors names a layer that Kiln knows (the first is "
            f"{first[:80]!r}); with --model MODEL names are looked up in the model itself"
        )
    return PlacedAdapter(tuple(adapters), found, reasons, family)


def _places(adapter: Adapter, layers: ModuleIndex, known: bool) -> dict[str, Location]:
    """The layers of a file's modules; where the model is not known, of any model in diffusers' names."""
    stems = [module.stem for module in adapter.modules if module.format]
    places = layers.place(stems)
    rest = [s for s in stems if s not in places and not _LDM_OR_NUMBER.search(s)]
    return places if known or not rest else any_index().place(rest) | places


def _family_layers(adapter: Adapter, family: str | None) -> ModuleIndex:
    # Small and home-trained models of SD1's structure have its layers, whatever their widths.
    name = family or "sd1"
    if name not in TOPOLOGIES:
        raise AdapterError(
            f"{adapter.path}: is for {name}, whose layers Kiln has no list of; expected an adapter for "
            f"{', '.join(TOPOLOGIES)}"
        )
    return family_index(name)
