"""Modules of CLIP's text encoder in a target that has OpenCLIP's names, as single files of SD2 and SDXL do.

OpenCLIP (mlfoundations/open_clip) stores query, key and value of an attention as one matrix,
``attn.in_proj_weight`` (3 W, W), rows in this order. Adapters name the three apart and may change only some
of them, so each is a part of the matrix here. (stable-diffusion-webui skips the attention unless all of them
are there.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(?:.*\.)?resblocks\.(\d+)\.(.+)")
_PARTS = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
    "ln_1.weight": "layer_norm1",
    "ln_2.weight": "layer_norm2",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
Place = tuple[str, tuple[int, int] | None]
"""The target's module, and which of its rows are meant; None for all of them."""


def openclip_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """transformers' module path -> where it is, for the modules of a target that has OpenCLIP's names."""
    found: dict[str, Place] = {}
    for name, shape in shapes.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            if name.endswith("ln_final.weight"):
                found["text_model.final_layer_norm"] = (name.removesuffix(".weight"), None)
            continue
        layer = f"text_model.encoder.layers.{match[1]}"
        if match[2] in _PARTS:
            found[f"{layer}.{_PARTS[match[2]]}"] = (name.removesuffix(".weight"), None)
        elif match[2] == "attn.in_proj_weight" and len(shape) == 2 and shape[0] % 3 == 0:
            width = shape[0] // 3
            for index, projection in enumerate(_PROJECTIONS):
                rows = (index * width, (index + 1) * width)
                found[f"{layer}.self_attn.{projection}"] = (name.removesuffix("_weight"), rows)
    return found
