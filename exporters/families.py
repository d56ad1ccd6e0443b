"""Tells which family a UNet belongs to, from tensor names and shapes and never from a file's name.

The discriminants are the widths that the architectures do not share (cross-attention, first convolution,
added embedding); they are the facts that ComfyUI's ``model_detection.py``, diffusers'
``single_file_utils.py`` and the published configs agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """An architecture of a whole pipeline.

    ``latent_scale`` is the factor between the autoencoder's latents and the UNet's; ``default_size`` is in
    pixels. ``data`` names the folder of shipped configs below ``exporters/data``; None means that the
    family is recognised but not read by this version.
    """

    name: str
    title: str
    cross_attention_dim: int
    text_encoders: tuple[str, ...]
    latent_scale: float
    default_size: int
    prediction_type: str = "epsilon"
    latent_channels: int = 4
    data: str | None = None

    @property
    def supported(self) -> bool:
        """Whether this version reads checkpoints of the family."""
        return self.data is not None


# To add a family: its configs under exporters/data/<name>, its entry in key_maps.KEY_MAPS, `data` here.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", "SD1", 768, ("text_encoder",), 0.18215, 512, data="sd1"),
        Family("sd2", "SD2", 1024, ("text_encoder",), 0.18215, 768, prediction_type="v_prediction"),
        Family("sdxl", "SDXL", 2048, ("text_encoder", "text_encoder_2"), 0.13025, 1024),
        Family("sdxl-refiner", "SDXL refiner", 1280, ("text_encoder_2",), 0.13025, 1024),
    )
}

_VARIANT_BY_CHANNELS = {4: "", 5: "depth", 7: "upscaler", 8: "instruct-pix2pix", 9: "inpainting"}


@dataclass(frozen=True)
class FamilyMatch:
    """What a UNet was recognised as; ``variant`` is empty for plain text-to-image."""

    family: Family
    variant: str
    naming: Literal["ldm", "diffusers"]
    in_channels: int
    cross_attention_dim: int

    @property
    def title(self) -> str:
        """Family and variant as a reader would say them."""
        return f"{self.family.title} {self.variant}".strip()


# Names (without the prefix of a merged file) that only the named architecture has.
_FOREIGN_NAMES = {
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "single_stream_modulation.lin.weight": "FLUX.2",
    "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "single_transformer_blocks.0.attn.to_q.weight": "FLUX",
    "joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "transformer_blocks.0.attn.add_q_proj.weight": "Stable Diffusion 3 or another transformer model",
    "x_embedder.proj.weight": "Stable Diffusion 3 or another transformer model",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "mlp_t5.0.weight": "HunyuanDiT",
    "t_block.1.weight": "PixArt",
    "adaln_single.emb.timestep_embedder.linear_1.bias": "PixArt or LTX",
    "cap_embedder.1.weight": "Lumina 2",
    "head.modulation": "Wan",
    "txt_norm.weight": "Qwen-Image",
    "caption_projection.0.linear.weight": "HiDream",
    "clf.1.weight": "Stable Cascade",
    "clip_txt_mapper.weight": "Stable Cascade",
    "cc_projection.weight": "Zero123",
}
_FOREIGN_PATTERNS = (
    (re.compile(r"\.time_stack\.|\.time_mixer\.|temporal_transformer_blocks"), "Stable Video Diffusion"),
    (re.compile(r"(^|\.)motion_modules\."), "an AnimateDiff motion module"),
    (
        re.compile(r"^control_model\.|controlnet_cond_embedding|^input_hint_block\.|^controlnet_"),
        "a ControlNet",
    ),
    (re.compile(r"^cond_stage_model\.roberta\."), "AltDiffusion"),
    (
        re.compile(
            r"^lora_(unet|te\d?|prior)_|[._]lora\.(up|down)\.|\.lora_(A|B|up|down)\.|\.hada_w1|\.lokr_w|:\d+:(up|down)$"
        ),
        "an adapter (LoRA)",
    ),
    (re.compile(r"(^|\.)encoder_hid_proj\.|^unet\.encoder_proj\."), "Kandinsky, Kolors or DeepFloyd IF"),
    (re.compile(r"^string_to_param\.|^emb_params$"), "a textual inversion embedding"),
)
_FOREIGN_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "unet.")


def foreign_family(names: Iterable[str]) -> str | None:
    """The readable name of another architecture that these tensor names belong to, or None."""
    names = list(names)
    bare = set(names)
    for prefix in _FOREIGN_PREFIXES:
        bare.update(name[len(prefix) :] for name in names if name.startswith(prefix))
    for marker, title in _FOREIGN_NAMES.items():
        if marker in bare:
            return title
    for pattern, title in _FOREIGN_PATTERNS:
        if any(pattern.search(name) for name in names):
            return title
    return None


def identify_unet(shapes: Shapes) -> FamilyMatch:
    """Recognise a UNet.

    Args:
        shapes: all tensors of the UNet without a prefix, in LDM (``input_blocks.``) or diffusers
            (``down_blocks.``) names.

    Raises:
        CheckpointError: the tensors are those of another architecture (named), or of no UNet Kiln knows.
    """
    foreign = foreign_family(shapes)
    if foreign:
        raise CheckpointError(f"recognised as {foreign}; this version reads {readable_families()}")
    naming, channels, in_channels = _first_convolution(shapes)
    context = next(
        (shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape), 0
    )
    if not context:
        raise CheckpointError("its UNet has no cross-attention to a text, so it is not a text-to-image model")
    family = _family_of(shapes, channels, context)
    variant = _VARIANT_BY_CHANNELS.get(in_channels, f"with {in_channels} input channels")
    if "time_embedding.cond_proj.weight" in shapes or "time_embed.cond_proj.weight" in shapes:
        variant = f"LCM {variant}".strip()
    elif family.name == "sd2" and _added_embedding(shapes):
        variant = f"unCLIP {variant}".strip()
    return FamilyMatch(family, variant, naming, in_channels, context)


def _first_convolution(shapes: Shapes) -> tuple[Literal["ldm", "diffusers"], int, int]:
    """Naming, first width and input channels."""
    for naming, name in (("ldm", "input_blocks.0.0.weight"), ("diffusers", "conv_in.weight")):
        shape = shapes.get(name)
        if shape is not None and len(shape) == 4:
            return ("ldm" if naming == "ldm" else "diffusers"), shape[0], shape[1]
    raise CheckpointError(
        "holds no UNet of Stable Diffusion: neither input_blocks.0.0.weight nor conv_in.weight is in it"
    )


def _added_embedding(shapes: Shapes) -> str | None:
    """Which embedding is added to that of the timestep, by the name of its first tensor."""
    markers = (
        "label_emb.0.0.weight",
        "label_emb.weight",
        "add_embedding.linear_1.weight",
        "class_embedding.linear_1.weight",
        "class_embedding.weight",
    )
    return next((name for name in markers if name in shapes), None)


def _family_of(shapes: Shapes, channels: int, context: int) -> Family:
    added = _added_embedding(shapes)
    if channels == 384 and context == 1280:
        return FAMILIES["sdxl-refiner"]
    if context == 2048:
        return FAMILIES["sdxl"]
    if context == 1024:
        return FAMILIES["sd2"]
    if added in ("label_emb.0.0.weight", "add_embedding.linear_1.weight"):
        return FAMILIES["sdxl"]  # an SDXL of unusual width: only that family adds size and pooled text
    if added:
        raise CheckpointError("its UNet is conditioned on a class label; Kiln reads text-to-image models")
    # 768 is SD1 itself. Any other width with this structure (distilled, tiny, home-trained) runs like SD1.
    return FAMILIES["sd1"]


def readable_families() -> str:
    """The names of the families this version reads, for messages."""
    return ", ".join(family.name for family in FAMILIES.values() if family.supported)


def require_readable(match: FamilyMatch) -> None:
    """Check that this version reads what was recognised.

    Raises:
        CheckpointError: the family or the variant is known but not read yet.
    """
    if not match.family.supported:
        raise CheckpointError(f"recognised as {match.title}; this version reads {readable_families()}")
    if match.variant.startswith("LCM"):
        raise CheckpointError(
            f"recognised as {match.title} (guidance is an input of the UNet: time_embedding.cond_proj); "
            f"this version reads plain {match.family.title}: take the base model and an LCM LoRA"
        )
    if match.variant:
        raise CheckpointError(
            f"recognised as {match.title} (its UNet takes {match.in_channels} channels); "
            f"this version reads plain {match.family.title} with {match.family.latent_channels}"
        )
