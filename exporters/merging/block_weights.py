"""Merge weights for each block of a UNet of SD1, as people of the field write them down ("MBW").

25 numbers are IN00 to IN11, M00, OUT00 to OUT11; 26 begin with that of the text encoder and the VAE (the
"base alpha"). The time embedding goes with IN00 and the last layers with OUT11, as in
bbc-mc/sdweb-merge-block-weighted-gui.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import UsageError
from ..adapters.block_strengths import BLOCKS, finite_number, unet_blocks

UNET_BLOCKS = BLOCKS[1:]
_FIRST, _LAST = UNET_BLOCKS[0], UNET_BLOCKS[-1]


@dataclass(frozen=True)
class BlockWeights:
    """A weight for each block of the UNet, and one for everything else; None takes the merge's own."""

    blocks: Mapping[str, float]
    base: float | None = None

    @classmethod
    def parse(cls, text: str) -> BlockWeights:
        """Read 25 or 26 numbers with commas between them.

        Raises:
            UsageError: another number of them, or one that is no finite number.
        """
        values = [finite_number(value, "block weight", text) for value in text.split(",")]
        if len(values) not in (len(UNET_BLOCKS), len(BLOCKS)):
            raise UsageError(
                f"{len(values)} block weights; expected {len(UNET_BLOCKS)} (IN00 to IN11, M00, OUT00 to "
                f"OUT11), or "
                f"{len(BLOCKS)} with that of the text encoder and the VAE before them"
            )
        base = values.pop(0) if len(values) == len(BLOCKS) else None
        return cls(dict(zip(UNET_BLOCKS, values, strict=True)), base)

    def by_tensor(self, names: Iterable[str]) -> dict[str, float]:
        """The weight of every tensor of a UNet, given in diffusers' names.

        Raises:
            AdapterError: the UNet has more blocks than there are weights.
        """
        names = list(names)
        found = unet_blocks(names)
        outside = {
            name: _FIRST if name.startswith(("time_embedding", "conv_in")) else _LAST for name in names
        }
        return {name: self.blocks[found.get(name, outside[name])] for name in names}
