"""One adapter file in another dialect, without loss: factors are copied as they are, the scale is carried
over.

kohya stores alpha beside the factors; diffusers (from 0.34 on) and PEFT keep it in a configuration, so a
converted file is right only for readers that look there. What a dialect has no words for is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import AdapterError, UsageError
from ..adapters.keys import TEXT_2, UNET, ModuleIndex
from ..adapters.lora import LORA
from ..adapters.open import Adapter
from ..planned_file import Planned, recipe, write_tensors
from ..publish import check_free, published, published_file
from ..tensors import TensorSource
from .configs import Settings, diffusers_metadata, peft_config
from .placing import PlacedAdapter, PlacedModule, model_index, open_files, place_adapter
from .spelling import DIFFUSERS, KOHYA, PEFT, Dialect, kohya_for, own_suffix
from .storing import carried, number
from .topology import layer_shape

TARGETS = ("kohya", "diffusers", "peft", "safetensors")
ORIGIN = "kiln-origin.json"
_SHOWN = 3


@dataclass(frozen=True)
class ConvertSpec:
    """``to`` is one of ``TARGETS``; ``safetensors`` keeps all names and changes the container alone."""

    path: Path
    output: Path
    to: str
    model: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UsageError(f"cannot convert to {self.to!r}: expected {', '.join(TARGETS)}")
        if self.to == "peft" and self.output.suffix in (".safetensors", ".pt", ".bin"):
            raise UsageError(
                f"{self.output}: PEFT's form is a folder; give its name without {self.output.suffix}"
            )
        if self.to != "peft" and self.output.suffix != ".safetensors":
            raise UsageError(f"{self.output}: expected a name that ends in .safetensors")


@dataclass(frozen=True)
class ConvertReport:
    """What was written: modules by network, and the files."""

    output: Path
    to: str
    modules: Mapping[str, int]
    tensors: int
    files: tuple[str, ...]


def convert(spec: ConvertSpec) -> ConvertReport:
    """Write the adapter in another dialect.

    Raises:
        AdapterError: it cannot be read, a module has no place, or the dialect cannot say what it is; the
        modules
            are named.
        CheckpointError: the model cannot be read.
        StorageError: the output exists, or the disk refused.
    """
    if spec.to != "peft":
        check_free(spec.output, overwrite=spec.overwrite)
    with ExitStack() as stack:
        adapters = open_files(spec.path, stack)
        if spec.to == "safetensors":
            return _container(spec, adapters)
        index: ModuleIndex | None = model_index(spec.model) if spec.model else None
        placed = place_adapter(adapters, index)
        _refuse_leftovers(placed)
        for one in placed.modules.values():
            one.updates()  # raises where its tensors contradict each other
        if spec.to == "kohya":
            return _to_kohya(spec, placed)
        return _to_peft(spec, placed, index)


def _refuse_leftovers(placed: PlacedAdapter) -> None:
    if placed.reasons:
        key, why = next(iter(placed.reasons.items()))
        raise AdapterError(
            f"{placed.adapters[0].path}: {len(placed.reasons)} of its tensors belong to no layer, such as "
            f"{key[:120]!r} ({why}); nothing is left out in silence. With --model MODEL names are looked "
            f"up in the model"
        )


def _container(spec: ConvertSpec, adapters: tuple[Adapter, ...]) -> ConvertReport:
    """The same names and values as a safetensors file."""
    if len(adapters) > 1 or adapters[0].scalings:
        raise AdapterError(
            f"{spec.path}: its scale lies in a configuration beside the tensors, which one safetensors "
            f"file with the "
            "same names would lose; convert it with --to kohya or --to diffusers"
        )
    source = adapters[0].source
    tensors = {name: _copied(source, name, info.shape) for name, info in source.infos.items()}
    metadata = carried(source.metadata)
    with published_file(spec.output, overwrite=spec.overwrite) as path:
        write_tensors(path, tensors, metadata | {"kiln_recipe": _recipe(spec)})
    counts = {"": len(adapters[0].modules)}
    return ConvertReport(spec.output, spec.to, counts, len(tensors), (spec.output.name,))


def _copied(source: TensorSource, key: str, shape: tuple[int, ...]) -> Planned:
    def make() -> np.ndarray:
        value = source.read(key)
        if value.dtype.kind not in "biu" and not np.isfinite(value.astype(np.float32)).all():
            raise AdapterError(f"{source.path}: tensor {key!r} holds NaN or infinity; the file is damaged")
        return value.reshape(shape)

    return Planned(source.infos[key].dtype, shape, make)


def _recipe(spec: ConvertSpec) -> str:
    return recipe("lora convert", source=spec.path.name, to=spec.to)


# --- kohya ---


def _to_kohya(spec: ConvertSpec, placed: PlacedAdapter) -> ConvertReport:
    dialect = _kohya_dialect(placed)
    tensors: dict[str, Planned] = {}
    refused = []
    for one in placed.modules.values():
        why = _unsaid_in_kohya(one)
        if why:
            refused.append(f"{one.label}: {why}")
        else:
            tensors |= _kohya_tensors(one, dialect)
    _refuse(spec, refused)
    metadata = carried(placed.metadata) | {"kiln_recipe": _recipe(spec)}
    metadata.setdefault("ss_network_module", "networks.lora" if _all_lora(placed) else "lycoris.kohya")
    with published_file(spec.output, overwrite=spec.overwrite) as path:
        write_tensors(path, tensors, metadata)
    return ConvertReport(spec.output, spec.to, _counts(placed), len(tensors), (spec.output.name,))


def _kohya_dialect(placed: PlacedAdapter) -> Dialect:
    if placed.family == "sdxl" or any(network == TEXT_2 for network, _ in placed.modules):
        return kohya_for(f"{path}.weight" for network, path in placed.modules if network == UNET)
    return KOHYA


def _all_lora(placed: PlacedAdapter) -> bool:
    return all(one.module.format == LORA.name for one in placed.modules.values())


def _unsaid_in_kohya(one: PlacedModule) -> str | None:
    parameters = set(one.module.keys)
    if "up_bias" in parameters:
        return "PEFT's bias of lora_B has no name in kohya's files"
    if not LORA.owns(frozenset(parameters)) and one.module.dialect == "peft":
        return "its scale lies in PEFT's configuration, where kohya's files do not look"
    return None


def _kohya_tensors(one: PlacedModule, dialect: Dialect) -> dict[str, Planned]:
    source, where = one.adapter.source, one.where
    low_rank = LORA.owns(frozenset(one.module.keys))
    # kohya's own OFT is told from that of LyCORIS by its prefix alone.
    oft = one.module.stem.startswith("oft_unet_")
    found = {}
    for parameter, stored in one.module.keys.items():
        if low_rank and parameter in ("alpha", "scale"):
            continue
        shape = source.infos[stored].shape
        if parameter == "magnitude":  # PEFT's lengths are those of the outputs
            dims = len(one.tensors.shape("up"))
            key, shape = dialect.key(*where, "dora_scale"), (source.infos[stored].size, *(1,) * (dims - 1))
        elif low_rank and parameter in dialect.suffixes:
            key = dialect.key(*where, parameter)
        else:
            key = f"{dialect.stem(*where)}{own_suffix(parameter)}"
        if oft:
            key = key.replace("lora_unet_", "oft_unet_", 1)
        found[key] = _copied(source, stored, shape)
    if low_rank and "down" in one.module.keys:
        found[dialect.key(*where, "alpha")] = number(one.alpha)
    return found


# --- diffusers and PEFT ---


def _to_peft(spec: ConvertSpec, placed: PlacedAdapter, index: ModuleIndex | None) -> ConvertReport:
    """One file for diffusers, or a folder for each network for PEFT."""
    linear = placed.family in ("sd2", "sdxl")
    dora = {bool({"dora_scale", "magnitude"} & set(one.module.keys)) for one in placed.modules.values()}
    refused = [f"{one.label}: {why}" for one in placed.modules.values() if (why := _unsaid_in_peft(one))]
    if not refused and len(dora) > 1:
        plain = next(one for one in placed.modules.values() if "dora_scale" not in one.module.keys)
        refused = [f"{plain.label}: is no DoRA while others are, and PEFT's use_dora is for all modules"]
    _refuse(spec, refused)
    networks = dict.fromkeys(network for network, _ in placed.modules)
    settings, tensors = {}, {}
    dialect = DIFFUSERS if spec.to == "diffusers" else PEFT
    for network in networks:
        modules = {path: one for (n, path), one in placed.modules.items() if n == network}
        settings[network] = Settings.of(
            {path: (one.tensors.shape("down")[0], one.alpha) for path, one in modules.items()},
            dora=dora == {True},
        )
        tensors[network] = {
            key: value
            for one in modules.values()
            for key, value in _peft_tensors(one, dialect, index, linear).items()
        }
    metadata = carried(placed.metadata) | {"kiln_recipe": _recipe(spec)}
    if spec.to == "diffusers":
        metadata |= diffusers_metadata(settings)
        with published_file(spec.output, overwrite=spec.overwrite) as path:
            write_tensors(path, {k: v for one in tensors.values() for k, v in one.items()}, metadata)
        files: tuple[str, ...] = (spec.output.name,)
    else:
        files = _write_folders(spec, settings, tensors, metadata)
    count = sum(map(len, tensors.values()))
    return ConvertReport(spec.output, spec.to, _counts(placed), count, files)


def _write_folders(
    spec: ConvertSpec,
    settings: Mapping[str, Settings],
    tensors: Mapping[str, Mapping[str, Planned]],
    metadata: Mapping[str, str],
) -> tuple[str, ...]:
    """A folder that PEFT opens: the output itself for one network, else one inside it for each."""
    files = []
    with published(
        spec.output, overwrite=spec.overwrite, marker=ORIGIN, kind="folder that Kiln wrote"
    ) as folder:
        for network, values in tensors.items():
            inside = folder if len(tensors) == 1 else folder / network
            inside.mkdir(exist_ok=True)
            write_tensors(inside / "adapter_model.safetensors", values, metadata)
            (inside / "adapter_config.json").write_text(peft_config(settings[network]), encoding="utf-8")
            files += [
                str((inside / name).relative_to(folder))
                for name in ("adapter_model.safetensors", "adapter_config.json")
            ]
        (folder / ORIGIN).write_text(metadata["kiln_recipe"] + "\n", encoding="utf-8")
    return tuple(files)


def _unsaid_in_peft(one: PlacedModule) -> str | None:
    """Why PEFT's LoRA cannot say what this module is, or None when it can."""
    parameters = set(one.module.keys)
    if not LORA.owns(frozenset(parameters)):
        return "only LoRA and its DoRA can be said"
    if "mid" in parameters:
        return "its CP form (lora_mid) cannot be said"
    if "up_bias" in parameters:
        return "its bias beside the factors cannot be said for a part of the modules"
    more = parameters - {"down", "up", "alpha", "scale", "dora_scale", "magnitude"}
    if more:
        return f"its {', '.join(sorted(more))} cannot be said"
    if "dora_scale" in parameters:
        lengths = one.adapter.source.infos[one.module.keys["dora_scale"]].shape
        outputs = one.tensors.shape("up")[0]
        if len(lengths) < 2 or lengths[0] != outputs:
            return "its dora_scale has a length for each input, PEFT's has one for each output"
    return None


def _peft_tensors(
    one: PlacedModule, dialect: Dialect, index: ModuleIndex | None, linear: bool
) -> dict[str, Planned]:
    source, (network, path), keys = one.adapter.source, one.where, one.module.keys
    down, up = one.tensors.shape("down"), one.tensors.shape("up")
    weight = (up[0], *down[1:]) if down[2:] not in ((), (1, 1)) else (up[0], down[1])
    if index is not None:
        weight = index.shapes[network, f"{path}.weight"]
    else:
        weight = layer_shape(network, path, weight, linear)
    kernel = weight[2:]
    ones = (1,) * len(kernel)
    found = {
        dialect.key(network, path, "down"): _copied(source, keys["down"], (down[0], down[1], *kernel)),
        dialect.key(network, path, "up"): _copied(source, keys["up"], (*up[:2], *ones)),
    }
    lengths = next((keys[name] for name in ("dora_scale", "magnitude") if name in keys), None)
    if lengths:
        shape = (1, up[0], *ones) if kernel else (up[0],)
        found[dialect.key(network, path, "magnitude")] = _copied(source, lengths, shape)
    return found


def _refuse(spec: ConvertSpec, refused: list[str]) -> None:
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise AdapterError(
            f"{spec.path}: cannot be said in the dialect of {spec.to}: {'; '.join(refused[:_SHOWN])}{more}"
        )


def _counts(placed: PlacedAdapter) -> dict[str, int]:
    networks = [network for network, _ in placed.modules]
    return {network: networks.count(network) for network in dict.fromkeys(networks)}
