"""Strengths for each block of the networks: an adapter may act on one half of a UNet and leave the other.

The lists, their order and the presets are those of hako-mikan/sd-webui-lora-block-weight (``lbw=``), the
block names those of LDM's UNet: INnn is ``input_blocks.nn``, M00 is ``middle_block``, OUTnn is
``output_blocks.nn``; BASE is every text encoder. What lies in no block (time embedding, last layers) keeps
the full strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdapterError, UsageError
from ..ldm_names import unet_ldm_names


def _numbered(kind: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number:02d}" for number in numbers)


BASE, MIDDLE = "BASE", "M00"
BLOCKS = (BASE, *_numbered("IN", *range(12)), MIDDLE, *_numbered("OUT", *range(12)))
# How long a list may be, and which blocks it names; those that it does not name get 0.
LISTS: Mapping[int, tuple[str, ...]] = {
    12: (BASE, *_numbered("IN", 4, 5, 7, 8), MIDDLE, *_numbered("OUT", *range(6))),  # a LoRA of SDXL
    17: (BASE, *_numbered("IN", 1, 2, 4, 5, 7, 8), MIDDLE, *_numbered("OUT", *range(3, 12))),  # of SD1, SD2
    20: (BASE, *_numbered("IN", *range(9)), MIDDLE, *_numbered("OUT", *range(9))),  # all blocks of SDXL
    26: BLOCKS,  # all blocks of SD1 and SD2
}
PRESETS: Mapping[str, str] = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": ",".join(["0.5"] * 17),
}
_LENGTHS = ", ".join(map(str, LISTS))
_PRESET_FILE_LIMIT = 1_000_000
_RANDOM = re.compile(r"[RU]|X([+-][\d.]+)?")
_LDM_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.|(middle_block)\.")


@dataclass(frozen=True)
class BlockStrengths:
    """A factor for each block of ``BLOCKS``, with which the adapter's strength is multiplied.

    ``typed`` is the preset or the list as it was given; ``listed`` are the blocks that it names.
    """

    typed: str
    factors: tuple[float, ...]
    listed: tuple[str, ...] = BLOCKS

    @classmethod
    def parse(cls, text: str, presets: Mapping[str, str] = PRESETS) -> BlockStrengths:
        """Read the name of a preset, or 12, 17, 20 or 26 numbers with commas between them.

        Raises:
            UsageError: an unknown preset, a list of another length, or a value that is no finite number.
        """
        typed = text.strip()
        values = [value.strip() for value in presets.get(typed, typed).split(",")]
        if len(values) == 1:
            raise UsageError(
                f"no preset {typed[:80]!r} of block strengths; expected {', '.join(presets)}, "
                f"or {_LENGTHS} numbers with commas between them"
            )
        if len(values) not in LISTS:
            of = f" in the preset {typed!r}" if typed in presets else ""
            raise UsageError(
                f"{len(values)} block strengths{of}; expected 12 (LoRA of SDXL), 17 (LoRA of SD1 or SD2), "
                "20 (all blocks of SDXL) or 26 (all blocks)"
            )
        listed = LISTS[len(values)]
        named = dict(zip(listed, (_number(value, typed) for value in values), strict=True))
        return cls(typed, tuple(named.get(block, 0.0) for block in BLOCKS), listed)

    def factor(self, block: str | None) -> float:
        """The factor of a block; 1 outside all blocks."""
        return 1.0 if block is None else self.factors[BLOCKS.index(block)]

    def by_name(self) -> dict[str, float]:
        """All factors by block."""
        return dict(zip(BLOCKS, self.factors, strict=True))


def _number(text: str, typed: str) -> float:
    if _RANDOM.fullmatch(text):
        raise UsageError(
            f"block strength {text!r}: random and inherited values would not be the same twice; give a number"
        )
    return finite_number(text, "block strength", typed)


def finite_number(text: str, what: str, typed: str) -> float:
    """One number of a list; ``what`` it is and the list as ``typed`` are for the message.

    Raises:
        UsageError: it is none, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{what} {text[:40]!r} of {typed[:80]!r} is not a finite number")
    return value


def read_presets(path: Path) -> dict[str, str]:
    """The built-in presets and those of a file, which go first.

    The file is the extension's ``lbwpresets.txt``: a line ``NAME:numbers`` each; empty lines and those that
    begin with ``#`` are left out.

    Raises:
        UsageError: the file cannot be read, or a line is of another form.
    """
    try:
        if path.stat().st_size > _PRESET_FILE_LIMIT:
            raise UsageError(
                f"{path}: is larger than {_PRESET_FILE_LIMIT} bytes; expected lines NAME:1,0,..."
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as cause:
        why = getattr(cause, "strerror", None) or cause
        raise UsageError(f"{path}: cannot be read as a file of presets: {why}") from cause
    presets = dict(PRESETS)
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, values = (part.strip() for part in line.partition(":"))
        if not (name and colon and values) or "," in name:
            raise UsageError(f"{path}: line {number} is {line[:60]!r}; expected NAME:1,0,0,...")
        presets[name] = values
    return presets


def unet_blocks(names: Iterable[str]) -> dict[str, str]:
    """The block of each tensor of a UNet, in diffusers' names; those outside all blocks are left out.

    Raises:
        AdapterError: the UNet has more blocks than ``BLOCKS`` names.
    """
    found = {}
    for name, ldm in unet_ldm_names(names).items():
        match = _LDM_BLOCK.match(ldm)
        if match is None:
            continue
        kind = {"input_blocks": "IN", "output_blocks": "OUT"}.get(match[1] or "")
        block = f"{kind}{int(match[2]):02d}" if kind else MIDDLE
        if block not in BLOCKS:
            raise AdapterError(
                f"the UNet has the block {block} ({name}); block strengths go up to {BLOCKS[-1]}"
            )
        found[name] = block
    return found
