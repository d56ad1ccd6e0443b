"""The layers of the published families, so that an adapter's names can be read without its base model.

Underscored names cannot be taken apart without a list of the real layers. Architectures are those of
runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and stable-diffusion-xl-base-1.0, in the
names of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..adapters.keys import TEXT, TEXT_2, UNET, ModuleIndex

_ATTENTION = ("attn1", "attn2")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_CLIP = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


@dataclass(frozen=True)
class Topology:
    """How many layers a family has.

    ``depths`` are the transformer layers of each level on the way down, ``middle`` those of the middle block,
    ``clip_layers`` the layers of each text encoder, ``layers`` the residual ones of a level on the way down.
    ``added`` is SDXL's second embedding.
    """

    depths: tuple[int, ...]
    middle: int
    clip_layers: Mapping[str, int]
    added: bool = False
    layers: int = 2


TOPOLOGIES: Mapping[str, Topology] = {
    "sd1": Topology((1, 1, 1, 0), 1, {TEXT: 12}),
    "sd2": Topology((1, 1, 1, 0), 1, {TEXT: 23}),
    "sdxl": Topology((0, 2, 10), 10, {TEXT: 12, TEXT_2: 32}, added=True),
}


# More layers than any model has, for home-trained ones of another number of levels.
_ANY = Topology((10, 10, 10, 10), 10, {TEXT: 32, TEXT_2: 32}, added=True, layers=3)


def any_index() -> ModuleIndex:
    """Every layer that a UNet or a CLIP may have, by diffusers' names; LDM's depend on its levels."""
    return _index(_ANY)


def family_index(family: str) -> ModuleIndex:
    """Every layer of a published family, without shapes."""
    return _index(TOPOLOGIES[family])


def _index(topology: Topology) -> ModuleIndex:
    targets = {UNET: list(_unet(topology))}
    targets |= {network: list(_clip(layers)) for network, layers in topology.clip_layers.items()}
    return ModuleIndex({n: {f"{path}.weight": () for path in paths} for n, paths in targets.items()})


def layer_shape(network: str, path: str, shape: tuple[int, ...], linear: bool) -> tuple[int, ...]:
    """The shape of a layer's weight, from that of a change whose kernel may be flattened or left out.

    ``linear`` UNets (SD2, SDXL) project into their attentions by matrices, SD1 by convolutions of one pixel.
    """
    last = path.rsplit(".", 1)[-1]
    if network != UNET or len(shape) != 2:
        return shape
    if last in ("conv_in", "conv_out", "conv1", "conv2", "conv") and shape[1] % 9 == 0:
        return (shape[0], shape[1] // 9, 3, 3)
    if last == "conv_shortcut" or (path.endswith((".proj_in", ".proj_out")) and not linear):
        return (*shape, 1, 1)
    return shape


def _unet(topology: Topology) -> Iterator[str]:
    yield from ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    if topology.added:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    last = len(topology.depths) - 1
    for level, depth in enumerate(topology.depths):
        yield from _level(f"down_blocks.{level}", topology.layers, depth)
        yield from _level(f"up_blocks.{last - level}", topology.layers + 1, depth)
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv"
            yield f"up_blocks.{level}.upsamplers.0.conv"
    yield from _level("mid_block", 1, topology.middle)
    yield from (f"mid_block.resnets.1.{part}" for part in _RESNET)


def _level(block: str, layers: int, depth: int) -> Iterator[str]:
    for layer in range(layers):
        yield from (f"{block}.resnets.{layer}.{part}" for part in _RESNET)
        if not depth:
            continue
        attention = f"{block}.attentions.{layer}"
        yield from (f"{attention}.{part}" for part in ("norm", "proj_in", "proj_out"))
        for number in range(depth):
            inner = f"{attention}.transformer_blocks.{number}"
            yield from (f"{inner}.norm{norm}" for norm in (1, 2, 3))
            yield from (f"{inner}.{attn}.{part}" for attn in _ATTENTION for part in _PROJECTIONS)
            yield from (f"{inner}.ff.net.0.proj", f"{inner}.ff.net.2")


def _clip(layers: int) -> Iterator[str]:
    yield "text_model.embeddings.token_embedding"
    yield "text_model.embeddings.position_embedding"
    for number in range(layers):
        layer = f"text_model.encoder.layers.{number}"
        yield from (f"{layer}.{part}" for part in (*_CLIP, "layer_norm1", "layer_norm2"))
    yield "text_model.final_layer_norm"
    yield "text_projection"
