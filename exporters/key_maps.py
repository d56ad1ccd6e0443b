"""How single files of each family name things: the registry of key maps, one entry per readable family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .ldm_names import clip_text_name, current_vae_name, ldm_unet_layers, ldm_unet_name, ldm_vae_name


@dataclass(frozen=True)
class KeyMap:
    """How one family's single files name things: prefixes per network, then a function per network.

    Each function maps the names of one network, without prefix, to diffusers' names; what it leaves out is
    not a weight of that network.
    """

    prefixes: Mapping[str, tuple[str, ...]]
    names: Mapping[str, Callable[[Iterable[str]], dict[str, str]]]


def _map_unet(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if "conv_in.weight" in names:  # diffusers' names, which some tools put below LDM's prefix
        return {name: name for name in names}
    layers = ldm_unet_layers(names)
    return {name: new for name in names if (new := ldm_unet_name(name, layers))}


def _map_vae(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if not any(name.startswith(("encoder.down.", "decoder.up.", "encoder.mid.")) for name in names):
        return {name: current_vae_name(name) for name in names if not name.startswith("loss.")}
    found = (re.match(r"(?:encoder\.down|decoder\.up)\.(\d+)\.", name) for name in names)
    levels = 1 + max((int(match[1]) for match in found if match), default=3)
    return {name: new for name in names if (new := ldm_vae_name(name, levels))}


def _map_text(names: Iterable[str]) -> dict[str, str]:
    return {name: new for name in names if (new := clip_text_name(name))}


# One entry per readable family; a longer prefix wins over a shorter one.
KEY_MAPS: dict[str, KeyMap] = {
    "sd1": KeyMap(
        prefixes={
            "unet": ("model.diffusion_model.", "unet."),
            "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("cond_stage_model.transformer.", "text_encoder.", "te."),
        },
        names={"unet": _map_unet, "vae": _map_vae, "text_encoder": _map_text},
    ),
}
