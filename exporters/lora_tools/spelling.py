"""How each dialect names a layer and the parameters of its module; the inverse of ``adapters.keys``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..adapters.formats import SUFFIXES
from ..adapters.keys import TEXT, TEXT_2, UNET
from ..ldm_names import unet_ldm_names
from .topology import family_index

# What each parameter of a LoRA is called; other families have one name everywhere.
_KOHYA_LORA = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "alpha": ".alpha",
    "scale": ".scale",
}
_PEFT_LORA = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_PREFIXES = {UNET: "lora_unet_", TEXT: "lora_te_", TEXT_2: "lora_te2_"}
_SDXL_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_SDXL_PREFIXES = {**_PREFIXES, TEXT: "lora_te1_"}


@dataclass(frozen=True)
class Dialect:
    """``stem`` gives the start of a module's keys, ``suffixes`` the ends that differ from the parameters'
    own names.
    """

    name: str
    stem: Callable[[str, str], str]
    suffixes: Mapping[str, str] = field(default_factory=dict)

    def key(self, network: str, path: str, parameter: str) -> str:
        """The key of one parameter."""
        return f"{self.stem(network, path)}{self.suffixes.get(parameter, f'.{parameter}')}"


def kohya(prefixes: Mapping[str, str] = _PREFIXES, names: Mapping[str, str] | None = None) -> Dialect:
    """kohya-ss/sd-scripts' names; ``names`` are those of layers of the UNet where they are not diffusers'."""

    def stem(network: str, path: str) -> str:
        own = (names or {}).get(path, path) if network == UNET else path
        return prefixes[network] + own.replace(".", "_")

    return Dialect("kohya", stem, _KOHYA_LORA)


def kohya_for(unet: Iterable[str]) -> Dialect:
    """kohya's names for SDXL: LDM's layers, and a prefix of its own for the first text encoder.

    ``unet`` are tensors of the UNet in diffusers' names. Which number an upsampler has in LDM's names
    depends on all levels, so those of the family are looked at too.
    """
    layers = [f"{path}.weight" for path in family_index("sdxl").modules(UNET)]
    names = unet_ldm_names([*layers, *unet])
    names |= {f"{path}.weight": f"{ldm}.weight" for path, ldm in _SDXL_ADDED.items()}
    return kohya(
        _SDXL_PREFIXES, {n.removesuffix(".weight"): ldm.removesuffix(".weight") for n, ldm in names.items()}
    )


KOHYA = kohya()
DIFFUSERS = Dialect("diffusers", lambda network, path: f"{network}.{path}", _PEFT_LORA)
PEFT = Dialect("peft", lambda network, path: f"base_model.model.{path}", _PEFT_LORA)


def own_suffix(parameter: str) -> str:
    """The suffix that a family's parameter has in kohya's and LyCORIS's files."""
    return (
        f".{parameter}"
        if f".{parameter}" in SUFFIXES
        else next(s for s, p in SUFFIXES.items() if p == parameter)
    )
