"""Splits a single file into its networks: LDM or diffusers names, with prefixes or bare, EMA or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..components import NETWORKS
from ..errors import CheckpointError
from .families import FamilyMatch, foreign_family, identify_unet, readable_families, require_readable
from .key_maps import KEY_MAPS
from .ldm_names import ema_name, sd1_ldm_unet_modules
from .parts import Part, make_entries, open_weights, shapes_of, shipped_config
from .structure import derive_config, is_tiny_autoencoder
from .tensors import TensorSource

EMA_PREFIX = "model_ema."
# Tensors by which a file without prefixes is recognised as one bare network.
_BARE = {
    "unet": ("input_blocks.0.0.weight", "time_embedding.linear_1.weight"),
    "vae": ("decoder.conv_in.weight", "encoder.conv_in.weight", "decoder.layers.0.weight"),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
}


@dataclass(frozen=True)
class SingleFile:
    """What one file holds: the networks, the UNet's family where there is one, and what was left aside."""

    parts: Mapping[str, Part]
    match: FamilyMatch | None
    source: TensorSource
    has_ema: bool
    uses_ema: bool
    ignored: tuple[str, ...]


def read_single_file(path: Path, ema: bool, stack: ExitStack) -> SingleFile:
    """Open one weights file and find the networks in it.

    Args:
        path: a safetensors or torch file.
        ema: take the UNet's EMA copy; it is also taken when the file has no other.
        stack: takes over closing the file.

    Raises:
        CheckpointError: the file is unreadable, of another architecture (named), or holds no network.
    """
    source = open_weights(path, stack)
    try:
        return _split(source, ema)
    except CheckpointError as cause:
        raise cause if str(cause).startswith(str(path)) else CheckpointError(f"{path}: {cause}") from cause


def _split(source: TensorSource, ema: bool) -> SingleFile:
    names = list(source.infos)
    foreign = foreign_family(names)
    if foreign:
        raise CheckpointError(f"recognised as {foreign}; this version reads {readable_families()}")
    groups = group_by_network(names)
    ema_starts = (f"{EMA_PREFIX}diffusion_model", f"{EMA_PREFIX}input_blocks")
    has_ema = any(name.startswith(ema_starts) for name in names)
    uses_ema = has_ema and (ema or not groups["unet"])
    if ema and not has_ema:
        raise CheckpointError("has no EMA weights (no model_ema.* tensors); open it without asking for them")
    if uses_ema:
        groups["unet"] = _ema_group(names, groups["unet"])
    match = None
    if groups["unet"]:
        match = identify_unet(shapes_of(source, groups["unet"]))
        require_readable(match)
    parts = {network: _part(network, source, group) for network, group in groups.items() if group}
    if not parts:
        raise CheckpointError(
            f"holds no network of a Stable Diffusion model (first tensors: {', '.join(names[:3])})"
        )
    used = {entry.stored for part in parts.values() for entry in part.entries.values()}
    ignored = tuple(name for name in names if name not in used)
    return SingleFile(parts, match, source, has_ema, uses_ema, ignored)


def group_by_network(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each network: stored name -> name without prefix. A file without prefixes is one network."""
    names = list(names)
    prefixes = KEY_MAPS["sd1"].prefixes
    table = [(prefix, network) for network, several in prefixes.items() for prefix in several]
    table.sort(key=lambda pair: -len(pair[0]))
    groups: dict[str, dict[str, str]] = {network: {} for network in NETWORKS}
    for name in names:
        for prefix, network in table:
            if name.startswith(prefix):
                groups[network][name] = name[len(prefix) :]
                break
    if not any(groups.values()):
        present = set(names)
        for network, markers in _BARE.items():
            if present.intersection(markers):
                groups[network] = {name: name for name in names}
                break
    return groups


def _ema_group(names: Iterable[str], unet: Mapping[str, str]) -> dict[str, str]:
    """Stored EMA name -> LDM name. EMA names lost their dots, so candidates give them back."""
    candidates = list(unet.values()) or [
        f"{m}.{leaf}" for m in sd1_ldm_unet_modules() for leaf in ("weight", "bias")
    ]
    dotless = {ema_name(name).removeprefix("diffusion_model"): name for name in candidates}
    group: dict[str, str] = {}
    for name in names:
        bare = name.removeprefix(EMA_PREFIX).removeprefix("diffusion_model")
        if name.startswith(EMA_PREFIX) and bare in dotless:
            group[name] = dotless[bare]
    missing = set(unet.values()) - set(group.values())
    if missing:
        raise CheckpointError(
            f"its EMA copy lacks {len(missing)} of {len(unet)} tensors, such as {sorted(missing)[0]}"
        )
    return group


def _part(network: str, source: TensorSource, group: Mapping[str, str]) -> Part:
    new_names = KEY_MAPS["sd1"].names[network](group.values())
    renamed = {stored: new_names[bare] for stored, bare in group.items() if bare in new_names}
    if not renamed:
        raise CheckpointError(
            f"its {network} tensors have names Kiln does not know, such as {next(iter(group))!r}"
        )
    entries = make_entries(network, source, renamed)
    shapes = {name: entry.info.shape for name, entry in entries.items()}
    if network == "vae" and is_tiny_autoencoder(shapes):
        config = shipped_config("vae_tiny")
        if shapes["decoder.layers.0.weight"] != (64, 4, 3, 3):
            raise CheckpointError(
                "its tiny autoencoder is not TAESD's; give a diffusers folder, whose config says more"
            )
        return Part(network, entries, config, source.path)
    return Part(network, entries, derive_config(network, shapes, shipped_config(network)), source.path)
