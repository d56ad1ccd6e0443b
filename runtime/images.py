"""From the VAE's output to a PNG on the disk: pixels, a check that there is a picture, and the metadata."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import InvalidOutputError, StorageError, UsageError

PARAMETERS_KEY = "parameters"
_USER_COMMENT = 0x9286  # EXIF tag where A1111 keeps the parameters of JPEG and WebP
_EXIF_IFD = 0x8769
FLAT_RANGE = 1  # 8-bit levels; an image that varies by no more than this in every channel is flat


def to_uint8(sample: np.ndarray) -> np.ndarray:
    """Pixels of a VAE's output, rounded as diffusers' VaeImageProcessor does.

    Args:
        sample: float ``(n, 3, h, w)``; -1 is black, 1 is white, values outside are cut.

    Returns:
        uint8 ``(n, h, w, 3)``.
    """
    unit = np.clip(sample.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return (unit.transpose(0, 2, 3, 1) * np.float32(255)).round().astype(np.uint8)


def check_finite(values: np.ndarray, component: str) -> None:
    """Refuse NaN and infinity in what a component gave.

    Args:
        values: float array of any shape.
        component: named in the message.

    Raises:
        InvalidOutputError: with the number of bad values.
    """
    finite = np.isfinite(values)
    if not finite.all():
        bad = values.size - int(finite.sum())
        raise InvalidOutputError(
            f"{component} gave {bad} values of {values.size} that are NaN or infinite: "
            "its weights are damaged, or do not fit the precision (try --precision fp32)"
        )


def check_images(images: np.ndarray, component: str = "vae_decoder") -> None:
    """Refuse images that show nothing.

    Args:
        images: uint8 ``(n, h, w, 3)``.
        component: named in the message.

    Raises:
        InvalidOutputError: an image in one flat colour.
    """
    for i, image in enumerate(images):
        spread = np.ptp(image, axis=(0, 1))
        if (spread <= FLAT_RANGE).all():
            colour = tuple(int(level) for level in image[0, 0])
            raise InvalidOutputError(
                f"{component} gave image {i + 1} of {len(images)} in one flat colour {colour}: the weights "
                "do not belong together, or do not fit the precision (try --precision fp32)"
            )


def save_png(image: np.ndarray, path: Path, parameters: str | None = None) -> None:
    """Write a PNG whole or not at all: into a new file beside ``path``, which then takes its name.

    Args:
        image: uint8 ``(h, w, 3)``.
        path: replaced if it exists; its folder must exist.
        parameters: A1111's infotext, stored as tEXt, or iTXt where it is not Latin-1.

    Raises:
        StorageError: the disk is full, read-only, or the folder is not there.
    """
    info = PngImagePlugin.PngInfo()
    if parameters:
        info.add_text(PARAMETERS_KEY, parameters)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}{_advice(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; free some space or choose another folder"
    if error.errno == errno.ENOENT:
        return "; create the folder first"
    return "; choose another folder or name"


def read_parameters(path: Path) -> str | None:
    """The infotext of an image: EXIF UserComment (JPEG, WebP), else the PNG text ``parameters``.

    Args:
        path: an image of any kind Pillow opens.

    Returns:
        The text, or None where the image carries none.

    Raises:
        UsageError: no such file, or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
            text = image.info.get(PARAMETERS_KEY)
    except UnidentifiedImageError as error:
        raise UsageError(f"{path} is not an image Kiln can read") from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {reason}") from error
    if isinstance(comment, bytes) and comment:
        return _user_comment(comment)
    return str(text) if text else None


def _user_comment(comment: bytes) -> str:
    """EXIF text by its eight-byte prefix; A1111 writes UTF-16 big-endian whatever the file's byte order."""
    prefix, body = comment[:8], comment[8:]
    if prefix == b"UNICODE\0":
        # Latin letters have a zero high byte: more zeros at odd places means little-endian.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    if prefix in (b"ASCII\0\0\0", bytes(8)):
        return body.decode("utf-8", "replace")
    return comment.decode("utf-8", "replace")
