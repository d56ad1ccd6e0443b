"""From the stem of an adapter key to a module of the target: which network, and which of its layers.

Underscored names cannot be taken apart without knowing the layers, so they are never parsed: every name a
real module can have (diffusers or LDM, dotted or underscored) stands in one table, built from the target.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..ldm_names import ldm_unet_module_map
from .openclip import openclip_modules

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"

# Component prefixes and the networks they can mean; all that match are tried, in this order.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("base_model.model.unet.", (UNET,)),
    ("base_model.model.text_encoder_2.", (TEXT_2,)),
    ("base_model.model.text_encoder.", (TEXT,)),
    ("base_model.model.", (UNET, TEXT, TEXT_2)),
    ("unet.base_model.model.", (UNET,)),
    ("text_encoder.base_model.model.", (TEXT,)),
    ("text_encoder_2.base_model.model.", (TEXT_2,)),
    ("model.diffusion_model.", (UNET,)),
    ("diffusion_model.", (UNET,)),
    ("diffusion_model_", (UNET,)),  # written by the "NTC" slider trainer
    ("lora_unet_unet_", (UNET,)),  # a doubled prefix, seen in the wild
    ("lora_unet_", (UNET,)),
    ("lora_unet.", (UNET,)),  # OneTrainer's own names, which it also saves
    ("oft_unet_", (UNET,)),
    ("lycoris_unet_", (UNET,)),
    ("lycoris_te1_", (TEXT,)),
    ("lycoris_te2_", (TEXT_2,)),
    ("lycoris_te_", (TEXT,)),  # sd-mecha writes kohya's names with LyCORIS's prefix
    ("lycoris_", (UNET, TEXT, TEXT_2)),
    ("lora_te1_", (TEXT,)),
    ("lora_te1.", (TEXT,)),
    ("lora_te2_", (TEXT_2,)),
    ("lora_te2.", (TEXT_2,)),
    ("lora_te_", (TEXT,)),
    ("lora_te.", (TEXT,)),
    ("unet.", (UNET,)),
    ("text_encoder_2.", (TEXT_2,)),
    ("text_encoder.", (TEXT,)),
    ("text_encoders.clip_l.transformer.", (TEXT,)),
    ("text_encoders.clip_h.transformer.", (TEXT,)),
    ("text_encoders.clip_g.transformer.", (TEXT_2,)),
    ("text_encoders.clip_l.", (TEXT,)),
    ("text_encoders.clip_h.", (TEXT,)),
    ("text_encoders.clip_g.", (TEXT_2,)),
    ("clip_l.transformer.", (TEXT,)),
    ("clip_h.transformer.", (TEXT,)),
    ("clip_g.transformer.", (TEXT_2,)),
    ("clip_l.", (TEXT,)),
    ("clip_g.", (TEXT_2,)),
    ("", (UNET, TEXT, TEXT_2)),
)
# LDM's names of SDXL that no checkpoint of SD1 has.
_LDM_EXTRA = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_POSITIONAL = re.compile(r"(unet|text_encoder):(\d+)")
_LDM = re.compile(r"(^|[._])(input_blocks|middle_block|output_blocks|time_embed|label_emb)[._]")


@dataclass(frozen=True)
class Location:
    """A module of the target: its network and its path in diffusers' (or transformers') names.

    ``rows`` are those that are the module's own, where the target stores it as a part of another one.
    """

    network: str
    module: str
    rows: tuple[int, int] | None = None

    def tensor(self, parameter: str) -> tuple[str, str]:
        """Network and name of one tensor of the module."""
        return self.network, f"{self.module}{'.' if self.rows is None else '_'}{parameter}"


class ModuleIndex:
    """The target's modules, found by any name a trainer may have given them."""

    def __init__(self, targets: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        """Index the tensors of each network: ``{network: {tensor name: shape}}``.

        Names are diffusers' (transformers'); a text encoder may have OpenCLIP's, whose attention stores
        query, key and value as one matrix.
        """
        self.shapes = {
            (network, name): tuple(shape)
            for network, tensors in targets.items()
            if network in (UNET, TEXT, TEXT_2)
            for name, shape in tensors.items()
        }
        self._places = {
            network: self._places_of(network) for network in {network for network, _ in self.shapes}
        }

    def _places_of(self, network: str) -> dict[str, Location]:
        """Every accepted name of every module of a network."""
        found = {path: Location(network, path) for path in self.modules(network)}
        if network != UNET:
            shapes = {name: shape for (n, name), shape in self.shapes.items() if n == network}
            for name, (module, rows) in openclip_modules(shapes).items():
                found[name] = Location(network, module, rows)
        return {name: found[path] for name, path in _names(network, list(found)).items()}

    def modules(self, network: str) -> list[str]:
        """Paths of the modules that hold a weight, in the order of the target's tensors."""
        return [
            name[: -len(".weight")] for n, name in self.shapes if n == network and name.endswith(".weight")
        ]

    def locate(self, stem: str) -> Location | None:
        """The module that a dotted or underscored stem means, or None when the target has none such."""
        return next(self._candidates(stem), None)

    def _candidates(self, stem: str) -> Iterator[Location]:
        """Every module that the stem could mean, the likeliest first; one for each network."""
        seen = set()
        for prefix, networks in _PREFIXES:
            if not stem.startswith(prefix):
                continue
            for network in self._present(networks):
                for spelling in _spellings(stem[len(prefix) :], network):
                    place = self._places[network].get(spelling)
                    if place is not None and network not in seen:
                        seen.add(network)
                        yield place

    def _present(self, networks: tuple[str, ...]) -> list[str]:
        """Those networks that the target has; the refiner's only text encoder answers for the first."""
        if TEXT in networks and TEXT not in self._places and TEXT_2 in self._places:
            networks = tuple(dict.fromkeys(TEXT_2 if network == TEXT else network for network in networks))
        return [network for network in networks if network in self._places]

    def place(self, stems: Iterable[str]) -> dict[str, Location]:
        """Locate all stems of one file; those of the target's modules that are found, by stem.

        Some stems can only be told together: the number of positional ones (``unet:7``) says which layers
        were trained, and names without a network are of the text encoder that has the most of them.
        """
        stems = list(stems)
        choices = {stem: {place.network: place for place in self._candidates(stem)} for stem in stems}
        votes = Counter(network for places in choices.values() for network in places if len(places) > 1)
        votes.update(network for places in choices.values() for network in places if len(places) == 1)
        found = {
            stem: max(places.values(), key=lambda place: votes[place.network])
            for stem, places in choices.items()
            if places
        }
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
        ldm |= {name: path for name, path in _LDM_EXTRA.items() if path in dotted}
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
    the GEGLU projection between them when that was trained too; each CLIP layer gives k, v, q, out. The
    extended lists of the UNet go on, in each block, with its residual layers.
    """
    modules = list(modules)
    end = ".attn1.to_q" if network == UNET else ".self_attn.q_proj"
    blocks = sorted((path[: -len(end)] for path in modules if path.endswith(end)), key=_registration)
    first, second = ([f"attn{n}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] for n in (1, 2))
    clip = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
    layouts = ([*first, *second], [*first, "ff.net.0.proj", *second]) if network == UNET else (clip,)
    orders = [[f"{block}.{name}" for block in blocks for name in layout] for layout in layouts]
    if network == UNET:
        residual = [path for path in modules if _RESIDUAL.search(path)]
        orders += [sorted([*order, *residual], key=_extended) for order in orders]
    return next((order for order in orders if count and len(order) == count), [])


_RESIDUAL = re.compile(r"\.resnets\.\d+\.(conv1|time_emb_proj|conv2|conv_shortcut)$")
_RESIDUAL_LAYERS = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")


def _extended(path: str) -> tuple[object, ...]:
    """Of a block its attentions, which are in order already, then its residual layers."""
    group, numbers = _registration(path)
    block = (group, numbers[:1] if group < 2 else ())
    if not (found := _RESIDUAL.search(path)):
        return (*block, 0)
    return (*block, 1, numbers[len(block[1])], _RESIDUAL_LAYERS.index(found[1]))


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
