"""A bundle's weights as a diffusers folder: what other projects read, adapters and all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, bundle_networks
from ...exporters.bundle_checkpoint import bundle_checkpoint
from ...exporters.checkpoints import Checkpoint
from ...exporters.publish import published
from ..random_models import WEIGHTS_FILE, write_file

_CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
}
_COPIED = ("scheduler", "tokenizer")


def write_folder(bundle: Bundle, out: Path) -> Path:
    """Write the folder that diffusers' ``StableDiffusionPipeline.from_pretrained`` opens.

    Tensors keep the values and, where a network has one type, the type that the bundle holds; a network of
    several types becomes float32, which holds them all.

    Args:
        bundle: any but int8.
        out: the folder to make; nothing is done when it holds this bundle's weights already.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the bundle's weights are int8.
        StorageError: the disk refused, or ``out`` holds something else.
    """
    marker = out / "made-of.json"
    made_of = {"content_digest": bundle.content_digest}
    if marker.is_file():
        if json.loads(marker.read_text()) == made_of:
            return out
        shutil.rmtree(out)  # this function made it
    with bundle_checkpoint(bundle.path) as checkpoint, published(out) as folder:
        for name in _COPIED:
            shutil.copytree(bundle.path / name, folder / name)
        for network in bundle_networks(bundle):
            _write_network(checkpoint, network, folder)
        index = _model_index(bundle, checkpoint)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / marker.name).write_text(json.dumps(made_of) + "\n")
    return out


def _write_network(checkpoint: Checkpoint, network: str, folder: Path) -> None:
    (folder / network).mkdir()
    config = json.dumps(checkpoint.config(network), indent=2)
    (folder / network / "config.json").write_text(config + "\n")
    infos = checkpoint.tensors(network)
    types = {info.dtype for info in infos.values()}
    shapes = {name: info.shape for name, info in sorted(infos.items())}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name in shapes:
            yield name, checkpoint.read(network, name)

    dtype = types.pop() if len(types) == 1 else "F32"
    write_file(folder / network / WEIGHTS_FILE[network], dtype, shapes, tensors())


def _model_index(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", bundle.scheduler_config.get("_class_name", "EulerDiscreteScheduler")],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{network: list(names) for network, names in _CLASSES.items()},
        "vae": ["diffusers", checkpoint.config("vae").get("_class_name", "AutoencoderKL")],
    }
