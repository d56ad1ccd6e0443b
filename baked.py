"""What the manifest of a bundle says of the adapters and embeddings inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BakedAdapter:
    """One adapter inside the weights.

    ``rank`` is that to which it was cut, None for all of it. ``blocks`` are its strengths by block (BASE,
    IN00, ...), each a factor of the two strengths, and ``lbw`` is what was typed for them; None where they
    are all 1.
    """

    name: str
    sha256: str
    unet_strength: float
    text_encoder_strength: float
    rank: int | None = None
    blocks: Mapping[str, float] | None = None
    lbw: str | None = None


@dataclass(frozen=True)
class BakedEmbedding:
    """One token with vectors of its own: the rows ``ids`` of the embedding table.

    ``sha256`` is the digest of the file it is from, empty for one that came with the checkpoint.
    """

    token: str
    sha256: str
    ids: tuple[int, ...]


ADAPTER_FACTS = tuple(field.name for field in dataclasses.fields(BakedAdapter))
# Written only where they say something, so that other bundles look as they always did.
_OPTIONAL = frozenset({"rank", "blocks", "lbw"})


def is_adapter(row: object) -> bool:
    """Whether a row of a manifest describes an adapter by the facts of ``BakedAdapter``."""
    facts = set(ADAPTER_FACTS)
    return isinstance(row, dict) and facts - _OPTIONAL <= row.keys() <= facts


def is_embedding(row: object) -> bool:
    """Whether a row of a manifest describes an embedding by the facts of ``BakedEmbedding``."""
    if not isinstance(row, dict) or row.keys() != {"token", "sha256", "ids"}:
        return False
    ids = row["ids"]
    numbers = isinstance(ids, list) and all(type(number) is int and number >= 0 for number in ids)
    return isinstance(row["token"], str) and isinstance(row["sha256"], str) and numbers and bool(ids)
