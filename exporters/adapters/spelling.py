"""How people write an adapter down: ``FILE:0.8:lbw=INS`` as an option, ``<lora:name:0.8>`` in a prompt.

The order of bare numbers differs, as it does in the field: the command line says UNet, then text encoder;
a tag of stable-diffusion-webui says text encoder, UNet, rank. Named fields say themselves what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import UsageError
from .block_strengths import PRESETS, BlockStrengths

EXTENSIONS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
EXPECTED = (
    "expected FILE, FILE:STRENGTH or FILE:UNET_STRENGTH:TEXT_ENCODER_STRENGTH, such as "
    "style.safetensors:0.8, and after it any of :te=, :unet=, :dyn=RANK and :lbw=BLOCKS"
)
TAG = "<lora:NAME:TEXT_ENCODER:UNET:RANK>, where te=, unet=, dyn= and lbw= may name what a field is"
# What the web UI's extension varies from step to step; the weights of a bundle are the same in all of them.
_PER_STEP = frozenset({"start", "stop", "step"})
_NAMED = frozenset({"te", "unet", "dyn", "lbw", "lbwe", "x"}) | _PER_STEP


@dataclass(frozen=True)
class Fields:
    """What was said of an adapter besides its name; None where nothing was."""

    unet: float | None = None
    text_encoder: float | None = None
    rank: int | None = None
    blocks: BlockStrengths | None = None


def split_file(text: str, presets: Mapping[str, str] = PRESETS) -> tuple[str, Fields]:
    """Read ``FILE``, ``FILE:0.8`` or ``FILE:0.8:0.5`` (UNet, then text encoder), then named fields.

    Fields are taken from the right, so a path may hold colons; a path that exists as typed is taken whole.

    Raises:
        UsageError: no path, a strength that is no number, a field twice, or too many.
    """
    head, taken = text, list[str]()
    while ":" in head and not _exists(head):
        rest, _, field = head.rpartition(":")
        if not (_is_named(field) or (_is_number(field) and sum(map(_is_number, taken)) < 2)):
            break
        taken.insert(0, field)
        head = rest
    left_over = any(f"{extension}:" in head.lower() for extension in EXTENSIONS) and not _exists(head)
    if not head.strip() or left_over:
        raise UsageError(f"cannot read the adapter {text!r}: {EXPECTED}")
    bare = [field for field in taken if not _is_named(field)]
    fields = _named([field for field in taken if _is_named(field)], presets, text)
    if (fields.unet is not None and bare) or (fields.text_encoder is not None and bare[1:]):
        raise UsageError(f"{text!r} gives one strength twice; {EXPECTED}")
    if bare:
        fields = replace(fields, unet=float(bare[0]))
    if bare[1:]:
        fields = replace(fields, text_encoder=float(bare[1]))
    return head, fields


def read_tag(fields: Sequence[str], tag: str, presets: Mapping[str, str] = PRESETS) -> Fields:
    """Read what follows the name in a tag, as stable-diffusion-webui does.

    The text encoder's strength is 1 unless given, the UNet's that of the text encoder. A bare list of block
    strengths, or the bare name of a preset, is taken for ``lbw=``, as its extension does.

    Args:
        fields: what stood between colons.
        tag: the whole tag, for messages.
        presets: names of lists of block strengths.

    Raises:
        UsageError: a field that is neither a number nor known by its name.
    """
    named = [field for field in fields if "=" in field]
    bare = [field.strip() for field in fields if "=" not in field]
    blocks = [field for field in bare if "," in field or field in presets]
    found = _named([*named, *(f"lbw={field}" for field in blocks)], presets, tag)
    numbers = [field for field in bare if field not in blocks]
    for field in numbers:
        if not _is_number(field):
            raise UsageError(f"{tag} has {field!r}, which is no number; expected <lora:name:0.8>, or {TAG}")
    if len(numbers) > 3:
        raise UsageError(f"{tag} has {len(numbers)} numbers; expected {TAG}")
    text_encoder = found.text_encoder
    if text_encoder is None:
        text_encoder = float(numbers[0]) if numbers else 1.0
    unet = found.unet
    if unet is None:
        unet = float(numbers[1]) if len(numbers) > 1 else text_encoder
    rank = found.rank
    if rank is None and len(numbers) > 2:
        rank = _rank(numbers[2], tag)
    return Fields(unet, text_encoder, rank, found.blocks)


def _named(fields: Sequence[str], presets: Mapping[str, str], text: str) -> Fields:
    values: dict[str, str] = {}
    for field in fields:
        name, _, value = (part.strip() for part in field.partition("="))
        if name in values:
            raise UsageError(f"{text!r} gives {name} twice")
        if name in _PER_STEP:
            raise UsageError(
                f"{text!r} has {name}=, which changes the adapter from step to step; Kiln bakes it into the "
                "weights, which are the same in all steps: leave it out"
            )
        if name not in ("te", "unet", "dyn", "lbw"):
            raise UsageError(
                f"{text!r} has {name[:40]}=, which Kiln does not know; expected te, unet, dyn or lbw"
            )
        values[name] = value
    return Fields(
        _strength(values["unet"], text) if "unet" in values else None,
        _strength(values["te"], text) if "te" in values else None,
        _rank(values["dyn"], text) if "dyn" in values else None,
        BlockStrengths.parse(values["lbw"], presets) if "lbw" in values else None,
    )


def _strength(value: str, text: str) -> float:
    if not _is_number(value):
        raise UsageError(f"{text!r} has the strength {value[:40]!r}, which is no number")
    return float(value)


def _rank(value: str, text: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"{text!r} has the rank {value[:40]!r}; expected a whole number of 1 or more")
    return int(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_named(field: str) -> bool:
    return field.partition("=")[0].strip() in _NAMED and "=" in field


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long, or a NUL byte
        return False
