"""What was done with one adapter file, as data: what was applied, what was not and why, how large it was."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .block_strengths import BlockStrengths

EXPLOSION = 2.0
"""Length of a change over that of its weight from which on hardly anything of the weight is left."""
NOTHING = 1e-7
"""And below which it is lost in the rounding of fp32, let alone of fp16."""


@dataclass(frozen=True)
class AdapterReport:
    """What was done with one adapter file.

    ``matched_modules`` counts modules by network, with strength 0 too; ``matched_keys`` is the number of
    tensors that they have. ``unmatched_keys`` were not applied, and ``reasons`` says of each why. ``path`` is
    as given, ``digest`` the SHA-256 of the weights file. ``changes`` has the length of each change over that
    of its weight, by ``network.tensor``, for the tensors that have been baked; ``rank`` is that to which the
    adapter was cut. ``blocks`` are its block strengths, ``unlisted_blocks`` counts the changes left out
    because they lie in a block that the list does not name.
    """

    path: Path
    digest: str
    format: str
    unet_strength: float
    text_encoder_strength: float
    matched_modules: Mapping[str, int]
    unmatched_keys: tuple[str, ...]
    metadata: Mapping[str, str]
    matched_keys: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    blocks: BlockStrengths | None = None
    unlisted_blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before looking at the pictures; few before anything is baked."""
        return (*self._left_out(), *self._sizes())

    def _left_out(self) -> tuple[str, ...]:
        """Blocks that a short list of block strengths does not name, which it thereby switches off."""
        if self.blocks is None or not self.unlisted_blocks:
            return ()
        names, count = ", ".join(self.unlisted_blocks), sum(self.unlisted_blocks.values())
        return (
            f"the {len(self.blocks.listed)} block strengths say nothing of {names}, so {count} changes there "
            "are left out; a list of 26 numbers names every block",
        )

    def _sizes(self) -> tuple[str, ...]:
        if not self.changes:
            return ()
        if max(self.changes.values()) <= NOTHING:
            return ("changes nothing: all of its changes are zero or lost in rounding",)
        # Biases and norms may be near zero in the base, so their ratio says nothing.
        exploded = {
            name: size
            for name, size in self.changes.items()
            if size > EXPLOSION and name.endswith("weight") and "norm" not in name and math.isfinite(size)
        }
        if not exploded:
            return ()
        worst = max(exploded, key=lambda name: exploded[name])
        return (
            f"changes {len(exploded)} of {len(self.changes)} weights by more than "
            f"{EXPLOSION:g} times their own length, {worst} by {exploded[worst]:.3g} times; "
            "lower its strength, or take the base that it was trained on",
        )


def without(report: AdapterReport, keys: Collection[str]) -> AdapterReport:
    """The report with keys counted as applied that another part of Kiln took."""
    taken = [key for key in report.unmatched_keys if key in keys]
    return replace(
        report,
        unmatched_keys=tuple(key for key in report.unmatched_keys if key not in keys),
        reasons={key: reason for key, reason in report.reasons.items() if key not in keys},
        matched_keys=report.matched_keys + len(taken),
    )
