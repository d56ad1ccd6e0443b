"""Embeddings in pictures of stable-diffusion-webui: in a text of the PNG file, or in the colours beside it.

The format is that of AUTOMATIC1111/stable-diffusion-webui, ``image_embedding.py`` and ``load_from_file`` of
``textual_inversion.py`` in ``modules/textual_inversion``. What is stored is JSON in which a tensor is
``{"TORCHTENSOR": lists of numbers}``:

* as the text ``sd-ti-embedding``, in base64;
* for sites that strip texts, deflated by zlib into two blocks of colours, each parted from the picture
  between them by a column of black: the lower half of each byte is the lower half of a colour of the left
  block, the upper half that of the right one. Both are XORed with one sequence of a linear congruential
  generator. The upper halves of the colours are a pattern to look at.

numpy and Pillow only; nothing is unpickled.
"""

from __future__ import annotations

import base64
import json
import math
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import AdapterError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_KEY = "sd-ti-embedding"
MAX_PIXELS = 1 << 24  # 16 vectors of SD1 beside a picture of 512 x 512 make 0.4 million
MAX_JSON = 16 << 20  # bytes; 1000 vectors of SD1 as decimal numbers
_MULTIPLIER, _INCREMENT = 1664525, 1013904223  # of the generator, modulo 2^32, from the state 0
_HALF = 0x0F


def stored_in(path: Path) -> object | None:
    """What a PNG file stores: mappings, lists and numbers, its tensors float32; None for any other picture.

    Raises:
        AdapterError: it is no PNG file, is damaged or too large, or what it stores cannot be read.
    """
    text, colours = _read(path)
    if text is not None:
        try:
            raw = base64.b64decode("".join(text.split()), validate=True)
        except ValueError as cause:
            raise AdapterError(f"{path}: its text {TEXT_KEY!r} is not base64: {cause}") from cause
        return _parsed(raw, f"{path}: its text {TEXT_KEY!r}")
    assert colours is not None
    deflated = _bytes_beside(colours)
    return None if deflated is None else _parsed(_inflated(deflated, path), f"{path}: its pixels")


def name_in(stored: object) -> str | None:
    """The name that a picture gives to its embedding."""
    name = stored.get("name") if isinstance(stored, Mapping) else None
    return name if isinstance(name, str) else None


def is_picture(path: Path) -> bool:
    """Whether a file begins as PNG files do."""
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def has_text(path: Path) -> bool:
    """Whether a PNG file has the text before its pixels, where it is written; pixels are not looked at.

    Raises:
        AdapterError: it cannot be read.
    """
    return _read(path, only_text=True)[0] is not None


def _read(path: Path, *, only_text: bool = False) -> tuple[str | None, np.ndarray | None]:
    """The text of a picture, else its colours ``(height, width, 3)`` uint8."""
    from PIL import Image, PngImagePlugin

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG",))
        with image:
            text = image.info.get(TEXT_KEY)
            if text is not None or only_text:
                return text, None
            if math.prod(image.size) > MAX_PIXELS:
                raise AdapterError(
                    f"{path}: has {image.width} x {image.height} pixels and no text {TEXT_KEY!r} before "
                    f"them; expected an embedding in at most {MAX_PIXELS} pixels"
                )
            image.load()
            assert isinstance(image, PngImagePlugin.PngImageFile)
            text = image.text.get(TEXT_KEY)  # it may follow the pixels
            return text, None if text is not None else np.asarray(image.convert("RGB"))
    except (AdapterError, MemoryError):
        raise
    except Exception as cause:  # Pillow raises whatever its readers meet in a damaged file
        said = (str(cause).splitlines() or [type(cause).__name__])[0][:160]
        raise AdapterError(f"{path}: cannot be read as a picture: {said}") from cause


def _bytes_beside(colours: np.ndarray) -> bytes | None:
    """The bytes in the two blocks at the sides of a picture; None where there are no two such blocks."""
    lit = colours.min(2) > 0
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if not len(rows):
        return None
    halves = colours[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & _HALF
    black = np.flatnonzero(halves.max((0, 2)) == 0)
    if len(black) < 2:
        return None
    lower, upper = halves[:, : black[0]], halves[:, black[-1] + 1 :]
    if lower.shape != upper.shape or lower.size < 2:
        return None
    found = (lower | upper << 4).ravel()
    # A picture with black columns of its own has bytes there too; one in 500 begins like zlib's.
    first = found[:2] ^ _sequence(2)
    if first[0] & _HALF != 8 or (int(first[0]) << 8 | int(first[1])) % 31:
        return None
    return (found ^ _sequence(found.size)).tobytes()


def _sequence(count: int) -> np.ndarray:
    """The first bytes that data are XORed with: the lower half of a state modulo 255, in both halves.

    One half at a time in the original, whose blocks begin with the same states.
    """
    states, factor, step = np.array([_INCREMENT], np.uint32), _MULTIPLIER, _INCREMENT
    while len(states) < count:  # the second half is that many steps behind the first
        states = np.concatenate([states, states * np.uint32(factor) + np.uint32(step)])
        step = (step * factor + step) % 2**32
        factor = factor * factor % 2**32
    halves = (states[:count] % 255 & _HALF).astype(np.uint8)
    return halves | halves << 4


def _inflated(data: bytes, path: Path) -> bytes:
    """zlib's stream at the start of ``data``; the rest fills the last columns."""
    inflating = zlib.decompressobj()
    try:
        raw = inflating.decompress(data, MAX_JSON + 1)
    except zlib.error as cause:
        raise AdapterError(f"{path}: the embedding in its pixels is damaged: {cause}") from cause
    if len(raw) <= MAX_JSON and not inflating.eof:
        raise AdapterError(
            f"{path}: the embedding in its pixels ends too early; take the picture as it was saved"
        )
    return raw


def _parsed(raw: bytes, where: str) -> object:
    if len(raw) > MAX_JSON:
        raise AdapterError(f"{where} holds more than {MAX_JSON >> 20} MiB of JSON; expected an embedding")
    try:
        loaded: object = json.loads(raw, object_hook=_tensor)
    except (ValueError, RecursionError) as cause:
        raise AdapterError(f"{where} holds no JSON of an embedding: {str(cause)[:100]}") from cause
    if loaded is None:
        raise AdapterError(f"{where} holds null; expected an embedding")
    return loaded


def _tensor(value: dict[str, Any]) -> object:
    if "TORCHTENSOR" not in value:
        return value
    array = np.asarray(value["TORCHTENSOR"])
    if array.dtype.kind not in "fiu":
        raise ValueError("a TORCHTENSOR is not made of numbers")
    with np.errstate(over="ignore"):  # checked by value
        return array.astype(np.float32)
