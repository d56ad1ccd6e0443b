"""Which family an adapter was trained for, from the names and shapes of its tensors.

Metadata is never believed: merges copy it. The width that tells the families apart is that of the text
states, which ``attn2.to_k`` reads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import AdapterError
from ..families import FAMILIES
from .keys import TEXT, TEXT_2, UNET, ModuleIndex, network_of
from .open import Adapter, AdapterModule

_CONTEXTS = {family.cross_attention_dim: family.name for family in FAMILIES.values()}
_TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}

# Keys that only another kind of file has. The first that matches any key names it.
_FOREIGN: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a FLUX LoRA", re.compile(r"(^|[._])(single_transformer_blocks|double_blocks|single_blocks)[._]")),
    ("a Stable Diffusion 3 LoRA", re.compile(r"(^|[._])joint_blocks[._]|attn[._]add_q_proj")),
    (
        "a LoRA of a diffusion transformer (FLUX, Stable Diffusion 3 or another)",
        re.compile(
            r"^(transformer\.|lora_transformer_|lora_te3_|(base_model\.model\.)?transformer_blocks\.)|t5xxl"
        ),
    ),
    ("a Stable Cascade LoRA", re.compile(r"^lora_prior_(unet|te)_")),
    ("a ControlNet-LLLite", re.compile(r"^lllite_unet_")),
    ("a Control-LoRA", re.compile(r"^lora_controlnet$")),
    (
        "a ControlNet",
        re.compile(r"^(control_model|controlnet_)|controlnet_cond_embedding|^input_hint_block\."),
    ),
    ("an IP-Adapter", re.compile(r"to_[kv]_ip[._]|^ip_adapter\.|^image_proj\.")),
    ("an AnimateDiff motion module", re.compile(r"motion_modules[._]|temporal_transformer")),
    (
        "a textual inversion embedding",
        re.compile(r"^(emb_params|emp_params(_out)?|clip_[lg](_out)?|string_to_param\b.*)$"),
    ),
)
_CHECKPOINT = re.compile(
    r"^(model\.diffusion_model|cond_stage_model|first_stage_model|conditioner)\.|^(unet\.)?conv_in\."
)


@dataclass(frozen=True)
class FamilyGuess:
    """A family's name, or None when the tensors do not say, and the observation behind it."""

    family: str | None
    reason: str

    @property
    def title(self) -> str:
        """The family as messages write it."""
        return FAMILIES[self.family].title if self.family in FAMILIES else "of an unknown family"


def foreign_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """What a file is when it is no adapter of Stable Diffusion, with the key that shows it; else None."""
    keys = list(keys)
    for kind, pattern in _FOREIGN:
        key = next((key for key in keys if pattern.search(key)), None)
        if key is not None:
            return kind, key
    return None


def refuse_foreign(adapter: Adapter, target: str) -> None:
    """Raise an AdapterError when the file is of another kind; ``target`` says what it was meant for."""
    foreign = foreign_kind(adapter.source.infos)
    if foreign is not None:
        kind, key = foreign
        raise AdapterError(f"{adapter.path}: is {kind} (it has {key[:120]!r}); {target}")
    if not any(module.format for module in adapter.modules):
        key = next(iter(adapter.source.infos))
        if all(_is_token(key, info.shape) for key, info in adapter.source.infos.items()):
            what = f"is a textual inversion embedding (its first token is {key[:120]!r})"
            raise AdapterError(f"{adapter.path}: {what}; {target}")
        what = (
            "is a checkpoint, not an adapter"
            if any(map(_CHECKPOINT.match, adapter.source.infos))
            else ("is no adapter that Kiln knows")
        )
        raise AdapterError(f"{adapter.path}: {what} (its first tensor is {key[:120]!r}); {target}")


def _is_token(key: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the embedding of one token under its name, as cloneofsimo and diffusers store it."""
    return "." not in key and len(shape) in (1, 2) and shape[-1] in _TEXT_WIDTHS


def guess_family(adapter: Adapter) -> FamilyGuess:
    """The family of an adapter of Stable Diffusion.

    Looked at in turn: a second text encoder, the width ``attn2.to_k`` reads, the width of the text encoder.
    """
    networks = {network_of(module.stem) for module in adapter.modules}
    if TEXT_2 in networks:
        return FamilyGuess("sdxl", "it changes a second text encoder")
    context = _common(_input_width(adapter, m) for m in adapter.modules if _reads_text(m.stem))
    if context is None and any(module.dialect == "cloneofsimo" for module in adapter.modules):
        widths = {_input_width(adapter, m) for m in adapter.modules if network_of(m.stem) == UNET}
        context = next((width for width in (768, 1024, 2048) if width in widths), None)
    if context is not None:
        return FamilyGuess(_CONTEXTS.get(context), f"its attn2.to_k reads {context} features")
    width = _common(
        _input_width(adapter, m)
        for m in adapter.modules
        if network_of(m.stem) == TEXT and not m.stem.endswith("fc2")
    )
    if UNET not in networks and width is not None:
        return FamilyGuess(_TEXT_WIDTHS.get(width), f"its text encoder is {width} wide")
    return FamilyGuess(None, "no module of it reads the text states")


def check_family(adapter: Adapter, guess: FamilyGuess, index: ModuleIndex) -> None:
    """Refuse an adapter of another family than the target's, where both are told by their tensors.

    Raises:
        AdapterError: naming both families and the observation.
    """
    own = target_family(index)
    if own is None or guess.family is None or guess.family == own:
        return
    if own == "sdxl" and guess.family == "sd1" and "text encoder" in guess.reason:
        return  # the first text encoder of SDXL is that of SD1
    raise AdapterError(
        f"{adapter.path}: is an adapter for {guess.title} ({guess.reason}); this model is "
        f"{FAMILIES[own].title}, use an adapter trained for it"
    )


def target_family(index: ModuleIndex) -> str | None:
    """The family of the target's UNet by its text states; None for a width that no published family has."""
    context = next(
        (
            shape[-1]
            for (n, name), shape in index.shapes.items()
            if n == UNET and name.endswith("attn2.to_k.weight")
        ),
        0,
    )
    return _CONTEXTS.get(context)


def describe_target(index: ModuleIndex) -> str:
    """The target, for the end of an error message."""
    family = target_family(index)
    return (
        f"this model is {FAMILIES[family].title}"
        if family
        else "this model is of Stable Diffusion's architecture"
    )


def _reads_text(stem: str) -> bool:
    return re.search(r"attn2[._](processor[._])?to_[kv]$", stem) is not None


def _input_width(adapter: Adapter, module: AdapterModule) -> int | None:
    """Input features of a module, where one of its factors shows them."""
    shapes: Mapping[str, tuple[int, ...]] = {
        p: adapter.source.infos[key].shape for p, key in module.keys.items()
    }
    if len(shapes.get("down", ())) >= 2:
        return shapes["down"][1]
    if len(shapes.get("hada_w1_b", ())) == 2:
        return shapes["hada_w1_b"][1]
    if len(shapes.get("diff", ())) >= 2:
        return shapes["diff"][1]
    if len(shapes.get("hada_t2", ())) == 4 and len(shapes.get("hada_w2_b", ())) == 2:
        return shapes["hada_w2_b"][1]
    first = shapes.get("lokr_w1") or shapes.get("lokr_w1_b") or ()
    second = shapes.get("lokr_w2") or shapes.get("lokr_w2_b") or ()
    return first[1] * second[1] if len(first) >= 2 and len(second) >= 2 else None


def _common(widths: Iterable[int | None]) -> int | None:
    counted = Counter(width for width in widths if width is not None).most_common(1)
    return counted[0][0] if counted else None
