"""Pictures of a record: bytes, pixels, sizes, seeds, and how near they are to the reference's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...metrics import psnr_db, ssim
from .record import ImageFacts, Record

# PSNR and SSIM in float64 on another machine; they are means over all pixels.
_CLOSE = 1e-6


def image_findings(record: Record, folder: Path) -> Iterator[str]:
    """Everything about pictures that is not as the record says, in words."""
    pixels: dict[str, np.ndarray] = {}
    for what, images in (("image", record.images), ("reference image", record.parity.reference_images)):
        yield from _count_findings(record, what, images)
        for index, image in enumerate(images):
            text, array = _look(image, folder, (record.workload.height, record.workload.width))
            if text:
                yield f"{what} {index + 1}, {image.file}: {text}"
            if array is not None:
                pixels[image.file] = array
    yield from _metric_findings(record, pixels)
    yield from _gate_findings(record)


def read_pixels(path: Path) -> np.ndarray:
    """The RGB bytes of a picture, uint8 ``(h, w, 3)``.

    Raises:
        OSError: it cannot be read, or is no picture.
    """
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _count_findings(record: Record, what: str, images: Sequence[ImageFacts]) -> Iterator[str]:
    load = record.workload
    if not images:
        return  # none were drawn; whether that is right is the verdict's business
    wanted = [(p, load.seed + p + i) for p in range(len(load.prompts)) for i in range(load.batch)]
    found = [(image.prompt, image.seed) for image in images]
    if found != wanted:
        yield f"{what}s: prompts and seeds are {_shown(found)}, expected {_shown(wanted)}"


def _look(image: ImageFacts, folder: Path, size: tuple[int, int]) -> tuple[str | None, np.ndarray | None]:
    path = folder / image.file
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror or error}", None
    digest = hashlib.sha256(data).hexdigest()
    if digest != image.sha256:
        return f"the file's SHA-256 is {digest[:16]}…, the record says {image.sha256[:16]}…", None
    if path.stem != digest[: len(path.stem)]:
        return f"the file's SHA-256 begins with {digest[:16]}, and it is not named so", None
    try:
        array = read_pixels(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        return f"is no picture: {error}", None
    if array.shape[:2] != size:
        return f"is {array.shape[1]}x{array.shape[0]}, the workload says {size[1]}x{size[0]}", None
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if digest != image.pixels:
        return f"the pixels' SHA-256 is {digest[:16]}…, the record says {image.pixels[:16]}…", array
    return None, array


def _metric_findings(record: Record, pixels: Mapping[str, np.ndarray]) -> Iterator[str]:
    wanted = record.parity.reference_images
    if len(wanted) != len(record.images):
        told = [name for image in record.images for name in image.metrics]
        if told:
            yield f"images have {sorted(set(told))}, and {len(wanted)} reference images to compare with"
        return
    for index, (image, reference) in enumerate(zip(record.images, wanted, strict=True)):
        made, expected = pixels.get(image.file), pixels.get(reference.file)
        if made is None or expected is None or not image.metrics:
            continue
        computed = {"psnr_db": psnr_db(made, expected), "ssim": ssim(made, expected)}
        for name, value in computed.items():
            said = image.metrics.get(name)
            if said is None or not _same(said, value):
                yield f"image {index + 1}: {name} is {said}, of the two pictures it is {value:.6g}"


def _gate_findings(record: Record) -> Iterator[str]:
    """A gate of the pictures shows the worst of their metrics."""
    for gate in record.parity.gates:
        values = [image.metrics[gate.metric] for image in record.images if gate.metric in image.metrics]
        if gate.level != "image" or gate.metric not in ("psnr_db", "ssim") or gate.value is None:
            continue
        if not values:
            yield f"the gate {gate.metric} of {gate.where} is {gate.value:.6g}, and no image has that metric"
        elif not _same(gate.value, min(values)):
            yield f"the gate {gate.metric} is {gate.value:.6g}, the worst of the images is {min(values):.6g}"


def _same(said: float, value: float) -> bool:
    if math.isinf(value):
        # Equal pictures: the harness writes 150 dB, which no two that differ can have.
        from ..fidelity.distance import SAME_DB

        return said >= SAME_DB
    return math.isclose(said, value, rel_tol=_CLOSE)


def _shown(rows: Sequence[tuple[int, int]]) -> str:
    return f"{list(rows[:4])}{' and more' if len(rows) > 4 else ''}"
