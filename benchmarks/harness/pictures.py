"""Pictures of a run: PNG files in the results folder, named by their content."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import StorageError
from ..records.record import ImageFacts

FOLDER = "images"
_NAME_DIGITS = 16


def keep_images(directory: Path, pixels: Sequence[np.ndarray], seed: int) -> tuple[ImageFacts, ...]:
    """Write the batches of all prompts.

    Args:
        directory: the results folder.
        pixels: for each prompt uint8 ``(batch, h, w, 3)``, RGB.
        seed: of the first prompt's first image; prompt ``p``'s image ``i`` has ``seed + p + i``.

    Raises:
        StorageError: the disk refused.
    """
    return tuple(
        _keep(directory, image, prompt, seed + prompt + i)
        for prompt, batch in enumerate(pixels)
        for i, image in enumerate(batch)
    )


def _keep(directory: Path, image: np.ndarray, prompt: int, seed: int) -> ImageFacts:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FOLDER}/{digest[:_NAME_DIGITS]}.png"
    path = directory / file
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            os.replace(beside, path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    pixels = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    return ImageFacts(prompt, seed, file, digest, pixels)
