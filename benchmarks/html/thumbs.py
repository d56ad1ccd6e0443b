"""Pictures for the page: WebP inside the document, as large as fits, and maps of differences."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

AMPLIFY = 16  # a difference of 16 levels and more is the brightest colour
BUDGET_BYTES = 7_500_000  # of all pictures as they stand in the page; the page is to stay below 10 MB
# The longest side and WebP's quality, tried in this order until all pictures fit.
LEVELS = ((512, 82), (448, 80), (384, 78), (320, 76), (256, 74), (192, 72), (128, 70), (96, 64), (64, 58))
_LOSSLESS_SIDE = 128  # small pictures cost little, and losses show when they are enlarged
_MOST_PIXELS = 4096 * 4096
_KEPT = 12  # decoded pictures, so that a reference is not decoded for each of its pairs
_HOPEFUL = 1.25
_MOST_BYTES = 128_000_000
# From no difference to the greatest; every channel rises or stays, so it reads without colour too.
_RAMP = ((0, 0, 0), (66, 16, 92), (150, 38, 100), (214, 78, 62), (250, 158, 52), (255, 255, 214))


@dataclass(frozen=True)
class Picture:
    """A file of the results folder and the digest that the record gives of it."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Pair:
    """Two pictures whose difference is wanted."""

    made: Picture
    wanted: Picture


@dataclass(frozen=True)
class Thumb:
    """A picture as a ``data:`` address, with its original ``width`` and ``height``; or why it is missing."""

    uri: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""
    largest: int = 0
    mean: float = 0.0


Album = Mapping[Picture | Pair, Thumb]


def make_album(
    folder: Path, wanted: Iterable[Picture | Pair], *, budget: int = BUDGET_BYTES
) -> tuple[Album, int]:
    """Encode all pictures with the largest side at which they fit, and say that side.

    Args:
        folder: the results folder.
        wanted: pictures and pairs, each once or more.
        budget: bytes that the addresses may take together; the smallest side is taken even if they take more.
    """
    every = list(dict.fromkeys(wanted))
    read = lru_cache(_KEPT)(partial(read_picture, folder))
    levels = list(LEVELS)
    while True:
        side, quality = levels.pop(0)
        album: dict[Picture | Pair, Thumb] = {}
        used = 0
        for item in every:
            album[item] = _encode_item(read, item, side, quality)
            used += len(album[item].uri)
            if used > budget and levels:
                break
        else:
            return album, side
        # At this rate all would take so much; sides that are far from enough are not tried.
        fits = side * math.sqrt(budget * len(album) / (used * len(every)))
        while len(levels) > 1 and levels[0][0] > _HOPEFUL * fits:
            levels.pop(0)


def read_picture(folder: Path, picture: Picture) -> np.ndarray:
    """The pixels, uint8 ``(h, w, 3)``.

    Raises:
        ValueError: the file is missing, outside of the folder, not the recorded one, or no PNG.
    """
    path = (folder / picture.file).resolve()
    if Path(picture.file).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise ValueError("its file lies outside of the results folder")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("its file is too large")
        data = path.read_bytes()
    except OSError:
        raise ValueError("its file is missing") from None
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise ValueError("its file is not the one that was recorded")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError("it has too many pixels")
                return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("its file is no readable PNG") from None


def difference(made: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, int, float]:
    """The map, uint8 ``(h, w, 3)``, the largest difference and the mean, in 8-bit levels.

    Per pixel the largest difference of the three channels, times ``AMPLIFY``, cut off at 255.

    Raises:
        ValueError: the sizes differ.
    """
    if made.shape != wanted.shape:
        raise ValueError("the sizes differ")
    levels = np.abs(made.astype(np.int16) - wanted.astype(np.int16))
    worst = levels.max(axis=2)
    return _colours()[np.minimum(worst * AMPLIFY, 255)], int(worst.max()), float(levels.mean())


def _encode_item(
    read: Callable[[Picture], np.ndarray], item: Picture | Pair, side: int, quality: int
) -> Thumb:
    try:
        if isinstance(item, Picture):
            pixels, largest, mean = read(item), 0, 0.0
        else:
            pixels, largest, mean = difference(read(item.made), read(item.wanted))
    except ValueError as error:
        return Thumb(missing=str(error))
    height, width = pixels.shape[:2]
    return Thumb(_encode(pixels, side, quality), width, height, largest=largest, mean=mean)


def _encode(pixels: np.ndarray, side: int, quality: int) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE and side > _LOSSLESS_SIDE:
        image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _colours() -> np.ndarray:
    """The ramp at 256 places, uint8 ``(256, 3)``."""
    places = np.linspace(0, 255, len(_RAMP))
    ramp = np.asarray(_RAMP, np.float64)
    channels = [np.interp(np.arange(256), places, ramp[:, c]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)
