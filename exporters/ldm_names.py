"""Tensor names of the original LDM layout against diffusers' names: pure functions on names and shapes.

The layouts are those of CompVis/latent-diffusion (the single files found on model sites) and of
huggingface/diffusers. No tensor value changes; the only shape that changes is that of the autoencoder's
attention, a 1x1 convolution [C, C, 1, 1] there and a linear layer [C, C] here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {new: old for old, new in _RESNET.items()}
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_BACK = {new: old for old, new in _VAE_ATTENTION.items()}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)")


def _split(name: str) -> tuple[str, str]:
    """Module path and parameter name."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _resnet(rest: str, table: Mapping[str, str]) -> str | None:
    module, leaf = _split(rest)
    return f"{table[module]}.{leaf}" if module in table else None


def ldm_unet_layers(names: Iterable[str]) -> int:
    """Layers per block of an LDM UNet, from the index of its first downsampler (2 when there is none)."""
    found = (re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name) for name in names)
    return min((int(match[1]) - 1 for match in found if match), default=2)


def ldm_unet_name(name: str, layers: int = 2) -> str | None:
    """diffusers' name of one UNet tensor given in LDM's (both without prefix), None if LDM has no such."""
    module, leaf = _split(name)
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    side, index, slot, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        return _ldm_middle(index, f"{slot}.{rest}" if slot else rest)
    if slot is None or (side == "input_blocks" and index == 0):
        return None
    if side == "input_blocks":
        return _ldm_input(*divmod(index - 1, layers + 1), int(slot), rest)
    return _ldm_output(*divmod(index, layers + 1), int(slot), rest)


def _ldm_middle(index: int, rest: str) -> str | None:
    if index == 1:
        return f"mid_block.attentions.0.{rest}"
    inner = _resnet(rest, _RESNET)
    return f"mid_block.resnets.{index // 2}.{inner}" if inner and index in (0, 2) else None


def _ldm_input(block: int, layer: int, slot: int, rest: str) -> str | None:
    if slot == 0 and rest.startswith("op."):
        return f"down_blocks.{block}.downsamplers.0.conv.{rest[3:]}"
    if slot == 1:
        return f"down_blocks.{block}.attentions.{layer}.{rest}"
    inner = _resnet(rest, _RESNET)
    return f"down_blocks.{block}.resnets.{layer}.{inner}" if inner and slot == 0 else None


def _ldm_output(block: int, layer: int, slot: int, rest: str) -> str | None:
    # The upsampler comes after the attention, so its slot is 1 in a block without attention and 2 with.
    if slot in (1, 2) and rest.startswith("conv."):
        return f"up_blocks.{block}.upsamplers.0.conv.{rest[5:]}"
    if slot == 1:
        return f"up_blocks.{block}.attentions.{layer}.{rest}"
    inner = _resnet(rest, _RESNET)
    return f"up_blocks.{block}.resnets.{layer}.{inner}" if inner and slot == 0 else None


def unet_ldm_names(names: Iterable[str]) -> dict[str, str]:
    """The inverse of ``ldm_unet_name`` over a whole UNet.

    Args:
        names: diffusers names of tensors or of modules' parameters; unknown ones are left out.

    Returns:
        diffusers name -> LDM name.
    """
    names = list(names)
    layers = 1 + max(
        (int(m[1]) for n in names if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", n))), default=1
    )
    attending = {int(m[1]) for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    found = {name: _unet_ldm_name(name, layers, attending) for name in names}
    return {name: ldm for name, ldm in found.items() if ldm is not None}


def _unet_ldm_name(name: str, layers: int, attending: set[int]) -> str | None:
    module, leaf = _split(name)
    if module in _TOP_BACK:
        return f"{_TOP_BACK[module]}.{leaf}"
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    side, block, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind in ("downsamplers", "upsamplers"):
        place = f"input_blocks.{block * (layers + 1) + layers + 1}.0.op"
        if side == "up":
            place = f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attending else 1}.conv"
        return f"{place}.{rest.removeprefix('conv.')}"
    if side is None:
        place = f"middle_block.{1 if kind == 'attentions' else 2 * layer}"
    else:
        index = block * (layers + 1) + layer + (1 if side == "down" else 0)
        place = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{1 if kind == 'attentions' else 0}"
    inner = rest if kind == "attentions" else _resnet(rest, _RESNET_BACK)
    return f"{place}.{inner}" if inner else None


def ldm_unet_module_map(diffusers_names: Iterable[str] | None = None) -> dict[str, str]:
    """LDM module path -> diffusers module path, for adapters that name modules in LDM's way.

    Args:
        diffusers_names: tensor names of the UNet at hand; None takes those of SD1.
    """
    if diffusers_names is None:
        pairs = {module: ldm_unet_name(f"{module}.weight") for module in sd1_ldm_unet_modules()}
        return {ldm: _split(new)[0] for ldm, new in pairs.items() if new}
    return {_split(ldm)[0]: _split(new)[0] for new, ldm in unet_ldm_names(diffusers_names).items()}


def sd1_ldm_unet_modules() -> Iterator[str]:
    """LDM paths of every module with parameters in the UNet of SD1: four levels of two layers."""
    yield from _TOP
    for index in range(1, 12):
        if index % 3 == 0:
            yield f"input_blocks.{index}.0.op"
            continue
        yield from _ldm_resnet_modules(f"input_blocks.{index}.0", shortcut=index in (4, 7))
        if index < 9:
            yield from _ldm_attention_modules(f"input_blocks.{index}.1")
    yield from _ldm_resnet_modules("middle_block.0", shortcut=False)
    yield from _ldm_attention_modules("middle_block.1")
    yield from _ldm_resnet_modules("middle_block.2", shortcut=False)
    for index in range(12):
        yield from _ldm_resnet_modules(f"output_blocks.{index}.0", shortcut=True)
        if index >= 3:
            yield from _ldm_attention_modules(f"output_blocks.{index}.1")
        if index in (2, 5, 8):
            yield f"output_blocks.{index}.{1 if index == 2 else 2}.conv"


def _ldm_resnet_modules(place: str, shortcut: bool) -> Iterator[str]:
    yield from (f"{place}.{part}" for part in _RESNET if shortcut or part != "skip_connection")


def _ldm_attention_modules(place: str) -> Iterator[str]:
    yield from (f"{place}.{part}" for part in ("norm", "proj_in", "proj_out"))
    inner = [f"norm{index}" for index in (1, 2, 3)] + ["ff.net.0.proj", "ff.net.2"]
    inner += [f"attn{index}.{part}" for index in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    yield from (f"{place}.transformer_blocks.0.{part}" for part in inner)


def ema_name(ldm_name: str) -> str:
    """Name of the EMA copy of an LDM UNet tensor, both without ``model_ema.`` or ``model.``: no dots."""
    return "diffusion_model" + ldm_name.replace(".", "")


def ldm_vae_name(name: str, levels: int = 4) -> str | None:
    """diffusers' name of one autoencoder tensor in LDM's names (without prefix), None if LDM has no such."""
    if re.fullmatch(r"(quant_conv|post_quant_conv|(en|de)coder\.conv_(in|out))\.(weight|bias)", name):
        return name
    match = re.fullmatch(r"(encoder|decoder)\.(norm_out|mid|down|up)\.(.+)", name)
    if match is None:
        return None
    half, part, rest = match[1], match[2], match[3]
    if part == "norm_out":
        return f"{half}.conv_norm_out.{rest}"
    if part == "mid":
        return _ldm_vae_middle(half, rest)
    inner = re.fullmatch(r"(\d+)\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.conv\.(\w+))", rest)
    if inner is None or (part == "down") != (half == "encoder"):
        return None
    block = (
        int(inner[1]) if part == "down" else levels - 1 - int(inner[1])
    )  # the decoder counts from the outside
    if inner[2] is None:
        return f"{half}.{part}_blocks.{block}.{part}samplers.0.conv.{inner[4]}"
    return (
        f"{half}.{part}_blocks.{block}.resnets.{inner[2]}.{inner[3].replace('nin_shortcut', 'conv_shortcut')}"
    )


def _ldm_vae_middle(half: str, rest: str) -> str | None:
    resnet = re.fullmatch(r"block_([12])\.(.+)", rest)
    if resnet:
        return f"{half}.mid_block.resnets.{int(resnet[1]) - 1}.{resnet[2]}"
    attention = re.fullmatch(r"attn_1\.(norm|q|k|v|proj_out)\.(weight|bias)", rest)
    return (
        f"{half}.mid_block.attentions.0.{_VAE_ATTENTION[attention[1]]}.{attention[2]}" if attention else None
    )


def vae_ldm_name(name: str, levels: int = 4) -> str | None:
    """The inverse of ``ldm_vae_name``."""
    match = re.fullmatch(r"(encoder|decoder)\.(\w+?)(?:_blocks?\.(.+)|\.(weight|bias))", name)
    if match is None or match[2] in ("conv_in", "conv_out"):
        return name if ldm_vae_name(name, levels) == name else None
    half, part, rest = match[1], match[2], match[3]
    if part == "conv_norm_out":
        return f"{half}.norm_out.{match[4]}"
    if part == "mid":
        resnet = re.fullmatch(r"resnets\.(\d)\.(.+)", rest)
        if resnet:
            return f"{half}.mid.block_{int(resnet[1]) + 1}.{resnet[2]}"
        module, leaf = _split(rest.removeprefix("attentions.0."))
        return f"{half}.mid.attn_1.{_VAE_ATTENTION_BACK[module]}.{leaf}"
    block, kind, index, inner = rest.split(".", 3)
    level = int(block) if part == "down" else levels - 1 - int(block)
    if kind == "resnets":
        return f"{half}.{part}.{level}.block.{index}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{half}.{part}.{level}.{part}sample.{inner}"


def current_vae_name(name: str) -> str:
    """Today's diffusers name for an autoencoder tensor that may have an early diffusers name."""
    match = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}" if match else name


def vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that diffusers gives the autoencoder tensor ``name`` (its name): attention weights are 2-D."""
    attention = re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name)
    return shape[:2] if attention and len(shape) == 4 and shape[2:] == (1, 1) else shape


def clip_text_name(name: str) -> str | None:
    """The transformers name of one CLIP text tensor, always with ``text_model.``.

    Early files and transformers from 5.6 on leave ``text_model.`` out. None for what is not a weight of
    the encoder: ``position_ids``, the projection, ``logit_scale``, and the image half of a whole CLIP.
    """
    name = name.removeprefix("text_model.")
    if name.endswith("position_ids") or not name.startswith(
        ("embeddings.", "encoder.layers.", "final_layer_norm.")
    ):
        return None
    return f"text_model.{name}"
