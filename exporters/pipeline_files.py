"""The files of a bundle that diffusers and Optimum read beside the networks: index, tokenizer, scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..components import COMPONENTS
from ..errors import CheckpointError

_TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def pipeline_files(tokenizer: Path, scheduler: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Names, with their folder, and contents; a bundle with them opens in ``ORTDiffusionPipeline``.

    Args:
        tokenizer: folder of a CLIP tokenizer.
        scheduler: diffusers' scheduler config.

    Raises:
        CheckpointError: the scheduler config does not say its class.
    """
    if not isinstance(scheduler.get("_class_name"), str):
        raise CheckpointError(
            "scheduler_config.json names no _class_name; expected a config saved by diffusers"
        )
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            yield f"tokenizer/{name}", (tokenizer / name).read_bytes()
    yield "scheduler/scheduler_config.json", json_bytes(scheduler)
    index = {
        "_class_name": "ORTStableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{component: ["optimum.onnxruntime.modeling_diffusion", "ORTModel"] for component in COMPONENTS},
    }
    yield "model_index.json", json_bytes(index)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as diffusers writes it."""
    return (json.dumps(value, indent=2) + "\n").encode()
