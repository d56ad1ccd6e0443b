"""Writes a diffusers folder: the networks with their configs, tokenizer, scheduler and index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...errors import CheckpointError
from ..checkpoints import Checkpoint
from ..folders import class_of
from ..parts import JSON_LIMIT
from ..pipeline_files import json_bytes
from ..planned_file import Planned, write_tensors

ORIGIN = "kiln-origin.json"
"""Says that Kiln wrote the folder, and of what; only such a folder is ever replaced."""
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_NONE = [None, None]


def write_folder(
    folder: Path,
    checkpoint: Checkpoint,
    networks: Mapping[str, Mapping[str, Planned]],
    metadata: Mapping[str, str],
) -> int:
    """Write the networks into an empty folder, and from ``checkpoint`` everything else. Returns bytes of
    weights.

    Raises:
        CheckpointError: a value is not finite or does not fit into its type, or a tokenizer's file is too
        large.
    """
    size = 0
    for network, tensors in networks.items():
        (folder / network).mkdir()
        config = {k: v for k, v in checkpoint.config(network).items() if k != "_name_or_path"}
        (folder / network / "config.json").write_bytes(json_bytes(config))
        path = folder / network / f"{_STEMS[network]}.safetensors"
        size += write_tensors(path, tensors, metadata, error=CheckpointError)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_bytes(json_bytes(checkpoint.scheduler_config))
    _copy_tokenizer(checkpoint.tokenizer_dir, folder / "tokenizer")
    (folder / "model_index.json").write_bytes(json_bytes(_index(checkpoint)))
    (folder / ORIGIN).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return size


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix not in (".json", ".txt") or not path.is_file():
            continue
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(
                f"{path}: is larger than {JSON_LIMIT} bytes; expected a part of a tokenizer"
            )
        (target / path.name).write_bytes(path.read_bytes())


def _index(checkpoint: Checkpoint) -> dict[str, object]:
    classes = {network: class_of(checkpoint.config(network)) for network in checkpoint.networks}
    libraries = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": _NONE,
        "image_encoder": _NONE,
        "requires_safety_checker": False,
        "safety_checker": _NONE,
        "scheduler": ["diffusers", checkpoint.scheduler_config.get("_class_name", "PNDMScheduler")],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{
            network: [libraries[network], classes[network]] if network in classes else _NONE
            for network in libraries
        },
    }
