"""Reads one network of a diffusers folder: picks the weights, follows shard indexes, checks the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any

from ..errors import CheckpointError
from .key_maps import KEY_MAPS
from .parts import Entry, Part, make_entries, open_weights, read_json
from .structure import check_config
from .tensors import TensorSource

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
# Extension -> stem per network; transformers and diffusers disagree.
_STEMS = {
    "safetensors": {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    },
    "bin": {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "pytorch_model",
    },
}
# Fields that give the UNet another input when set; the graphs have no place for it.
_EXTRA_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


def class_of(config: Mapping[str, Any]) -> str:
    """Name of the class that a config is for, as diffusers or transformers write it."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    if config.get("model_type") == "clip_text_model":
        return "CLIPTextModel"
    return str(config.get("_class_name", "an unnamed class"))


def component_config(folder: Path, network: str) -> dict[str, Any]:
    """Config of one component folder, after checking that Kiln knows its class.

    Raises:
        CheckpointError: the config is missing, or of another class.
    """
    config = read_json(folder / "config.json")
    found = class_of(config)
    if found not in CLASSES[network]:
        raise CheckpointError(
            f"{folder}: is a {found}; Kiln reads {' or '.join(CLASSES[network])} as {network}"
        )
    if network == "unet":
        for field in _EXTRA_INPUTS:
            if config.get(field) is not None:
                raise CheckpointError(
                    f"{folder}: has {field} {config[field]!r}, an input that SD1 does not have"
                )
    return config


def open_component(folder: Path, network: str, variant: str | None, stack: ExitStack) -> Part:
    """Open one component folder of a diffusers pipeline.

    Args:
        folder: holds ``config.json`` and the weights.
        network: ``unet``, ``vae`` or ``text_encoder``.
        variant: the ``fp16`` of ``model.fp16.safetensors``; None takes the file without variant, or the
            only variant there is.
        stack: takes over closing the files.

    Raises:
        CheckpointError: config or weights are missing, contradict each other, or are of an unknown class.
    """
    config = component_config(folder, network)
    weights = choose_weights(folder, network, variant)
    if ".index." in weights.name:
        stored = _open_shards(weights, stack)
    else:
        source = open_weights(weights, stack)
        stored = dict.fromkeys(source.infos, source)
    renamed = KEY_MAPS["sd1"].names[network](stored)
    entries: dict[str, Entry] = {}
    for source in dict.fromkeys(stored.values()):
        here = {name: new for name, new in renamed.items() if stored[name] is source}
        for name, entry in make_entries(network, source, here).items():
            if name in entries:
                raise CheckpointError(
                    f"{source.path}: {entry.stored!r} and {entries[name].stored!r} are both {name}"
                )
            entries[name] = entry
    part = Part(network, entries, config, folder)
    try:
        check_config(network, part.shapes, config)
    except CheckpointError as cause:
        raise CheckpointError(f"{folder}: {cause}") from cause
    return part


def choose_weights(folder: Path, network: str, variant: str | None) -> Path:
    """The weights file, or the index of a sharded one, that a component folder offers.

    Safetensors go before pickles, the plain name before a variant, one file before shards.

    Raises:
        CheckpointError: there are none, not the variant asked for, or only several variants to choose from.
    """
    names = sorted(path.name for path in folder.iterdir())
    for extension, stems in _STEMS.items():
        found = _weights_by_variant(names, stems[network], extension)
        if variant is not None:
            found = {variant: found[variant]} if variant in found else {}
        if "" in found:
            return folder / found[""]
        if len(found) == 1:
            return folder / next(iter(found.values()))
        if found:
            raise CheckpointError(
                f"{folder}: several variants of the weights: {', '.join(found)}; choose one of them"
            )
    stem = _STEMS["safetensors"][network]
    what = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    if any(re.search(r"-\d+-of-\d+\.", name) for name in names):
        raise CheckpointError(
            f"{folder}: has parts of sharded weights but no index ({stem}.safetensors.index.json)"
        )
    raise CheckpointError(
        f"{folder}: has no weights; expected {what}, found {', '.join(names)[:200] or 'nothing'}"
    )


def _weights_by_variant(names: list[str], stem: str, extension: str) -> dict[str, str]:
    """File name by variant; the empty variant is the plain file."""
    found: dict[str, str] = {}
    index = re.compile(rf"{re.escape(stem)}\.{extension}\.index(?:\.([\w-]+))?\.json")
    whole = re.compile(rf"{re.escape(stem)}(?:\.([\w-]+))?\.{extension}")
    for pattern in (index, whole):  # a whole file replaces the index of the same variant
        for name in names:
            match = pattern.fullmatch(name)
            if match and not re.search(r"-\d+-of-\d+$", match[1] or ""):
                found[match[1] or ""] = name
    return found


def _open_shards(index: Path, stack: ExitStack) -> dict[str, TensorSource]:
    """Tensor name -> the open shard that holds it, as the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; expected the index of sharded weights")
    shards: dict[str, TensorSource] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        # Only names of files beside the index: the index may come from anybody.
        if PurePath(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the shard {file!r}, which is not a file beside it")
        path = index.parent / file
        if not path.exists():
            raise CheckpointError(f"{path}: this shard is missing; {index.name} lists it. Download it again")
        shards[file] = open_weights(path, stack)
    stored: dict[str, TensorSource] = {}
    for name, file in weight_map.items():
        source = shards[str(file)]
        if name not in source.infos:
            raise CheckpointError(f"{source.path}: lacks the tensor {name!r} that {index.name} places in it")
        stored[name] = source
    return stored
