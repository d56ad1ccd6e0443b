"""What was done with one adapter file, as data: what was applied, what was not and why, how large it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
    adapter was cut.
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

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before looking at the pictures; none before anything is baked."""
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
