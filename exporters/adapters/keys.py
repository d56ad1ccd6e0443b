"""From the stem of an adapter key to a module of the target: which network, and which of its layers.

Underscored names cannot be taken apart without knowing the layers, so they are never parsed: every name a
real module can have (diffusers or LDM, dotted or underscored) stands in one table, built from the target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..ldm_names import ldm_unet_module_map

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"

# Component prefixes and the networks they can mean; all that match are tried, in this order.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("base_model.model.unet.", (UNET,)),
    ("base_model.model.text_encoder.", (TEXT,)),
    ("base_model.model.", (UNET, TEXT)),
    ("unet.base_model.model.", (UNET,)),
    ("text_encoder.base_model.model.", (TEXT,)),
    ("text_encoder_2.base_model.model.", (TEXT_2,)),
    ("model.diffusion_model.", (UNET,)),
    ("diffusion_model.", (UNET,)),
    ("diffusion_model_", (UNET,)),  # written by the "NTC" slider trainer
    ("lora_unet_unet_", (UNET,)),  # a doubled prefix, seen in the wild
    ("lora_unet_", (UNET,)),
    ("oft_unet_", (UNET,)),
    ("lycoris_", (UNET,)),
    ("lora_te1_", (TEXT,)),
    ("lora_te2_", (TEXT_2,)),
    ("lora_te_", (TEXT,)),
    ("unet.", (UNET,)),
    ("text_encoder_2.", (TEXT_2,)),
    ("text_encoder.", (TEXT,)),
    ("text_encoders.clip_l.transformer.", (TEXT,)),
    ("text_encoders.clip_g.transformer.", (TEXT_2,)),
    ("", (UNET, TEXT)),
)
_POSITIONAL = re.compile(r"(unet|text_encoder):(\d+)")
_LDM = re.compile(r"(^|[._])(input_blocks|middle_block|output_blocks|time_embed|label_emb)[._]")


@dataclass(frozen=True)
class Location:
    """A module of the target: its network and its path in diffusers' (or transformers') names."""

    network: str
    module: str


class ModuleIndex:
    """The target's modules, found by any name a trainer may have given them."""

    def __init__(self, targets: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        """Index the tensors of each network: ``{network: {tensor name: shape}}``."""
        self.shapes = {
            (network, name): tuple(shape)
            for network, tensors in targets.items()
            if network in (UNET, TEXT, TEXT_2)
            for name, shape in tensors.items()
        }
        self._names = {
            network: _names(network, self.modules(network)) for network in {n for n, _ in self.shapes}
        }

    def modules(self, network: str) -> list[str]:
        """Paths of the modules that hold a weight, in the order of the target's tensors."""
        return [
            name[: -len(".weight")] for n, name in self.shapes if n == network and name.endswith(".weight")
        ]

    def locate(self, stem: str) -> Location | None:
        """The module that a dotted or underscored stem means, or None when the target has none such."""
        for prefix, networks in _PREFIXES:
            if not stem.startswith(prefix):
                continue
            for network in networks:
                names = self._names.get(network, {})
                for spelling in _spellings(stem[len(prefix) :], network):
                    if spelling in names:
                        return Location(network, names[spelling])
        return None

    def place(self, stems: Iterable[str]) -> dict[str, Location]:
        """Locate all stems of one file; those of the target's modules that are found, by stem.

        Positional stems (``unet:7``) can only be told together: their number says which layers were trained.
        """
        stems = list(stems)
        found = {stem: location for stem in stems if (location := self.locate(stem)) is not None}
        for network in (UNET, TEXT):
            numbered = {
                stem: int(m[2]) for stem in stems if (m := _POSITIONAL.fullmatch(stem)) and m[1] == network
            }
            order = positional_order(network, self.modules(network), len(numbered))
            found |= {stem: Location(network, order[i]) for stem, i in numbered.items() if i < len(order)}
        return found


def _names(network: str, modules: list[str]) -> dict[str, str]:
    """Every accepted name -> module path; a name that two modules share is left out rather than guessed."""
    dotted = {path: path for path in modules}
    if network == UNET:
        ldm = ldm_unet_module_map(f"{path}.weight" for path in modules)
        dotted |= {name: path for name, path in ldm.items() if name not in dotted}
    names, shared = dict(dotted), set()
    for name, path in dotted.items():
        flat = name.replace(".", "_")
        if names.setdefault(flat, path) != path:
            shared.add(flat)
    return {name: path for name, path in names.items() if name not in shared}


def _spellings(name: str, network: str) -> Iterator[str]:
    """The name itself, then the ways in which older writers differ from the module's real name."""
    name = name.replace(".processor.", ".").replace("_processor_", "_")
    dot = "." if "." in name else "_"
    yield name
    if name.endswith("to_out"):
        yield f"{name}{dot}0"
    if network != UNET:
        yield f"text_model{dot}{name}"
        # diffusers 0.17-0.20 named the projections of CLIP as those of the UNet.
        yield re.sub(r"to_(q|k|v|out)$", r"\1_proj", name)


def positional_order(network: str, modules: Iterable[str], count: int) -> list[str]:
    """Modules in the order in which cloneofsimo/lora numbers them; empty when ``count`` fits no such file.

    The UNet of that time registered its middle block last. Each transformer block gives its attentions, with
    the GEGLU projection between them when that was trained too; each CLIP layer gives k, v, q, out.
    """
    end = ".attn1.to_q" if network == UNET else ".self_attn.q_proj"
    blocks = sorted((path[: -len(end)] for path in modules if path.endswith(end)), key=_registration)
    first, second = ([f"attn{n}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] for n in (1, 2))
    clip = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
    layouts = ([*first, *second], [*first, "ff.net.0.proj", *second]) if network == UNET else (clip,)
    for layout in layouts:
        if count and count == len(blocks) * len(layout):
            return [f"{block}.{name}" for block in blocks for name in layout]
    return []


def _registration(path: str) -> tuple[int, tuple[int, ...]]:
    group = {"down": 0, "up": 1, "mid": 2}.get(path.split("_", 1)[0], 3)
    return group, tuple(int(number) for number in re.findall(r"\d+", path))


def network_of(stem: str) -> str:
    """The network a stem names, judged by its words alone (for a file without its base model)."""
    if re.match(r"(lora_te2_|text_encoder_2|text_encoders\.clip_g)", stem):
        return TEXT_2
    return TEXT if re.match(r"(lora_te|text_encoder)", stem) or "text_model" in stem else UNET


def dialect_of(stem: str, suffix: str) -> str:
    """Who writes keys like this one: ``kohya``, ``diffusers``, ``peft``, ... with the UNet names it uses."""
    if _POSITIONAL.fullmatch(stem):
        return "cloneofsimo"
    names = ", LDM names" if _LDM.search(stem) else ""
    if re.match(r"(lora_|lycoris_|oft_|diffusion_model_)", stem):
        return f"kohya{names}"
    if "base_model.model." in stem:
        return "peft"
    if re.match(r"(model\.)?diffusion_model\.|text_encoders\.", stem):
        return f"comfyui{names}"
    if ".processor." in stem:
        return "diffusers attention processors"
    return "diffusers, peft suffixes" if "lora_A" in suffix or "lora_B" in suffix else f"diffusers{names}"
