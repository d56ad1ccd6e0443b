"""Lays embeddings over a model: do they fit, and which rows of the table do they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import AdapterError
from .base import FAMILIES, TEXT, Embedding

TABLE = "text_model.embeddings.token_embedding.weight"
MOST_ROWS = 20_000  # the whole vocabulary of CLIP has 49,408


@dataclass(frozen=True)
class PlannedToken:
    """One embedding with the ids of its vectors, which are rows of the table."""

    embedding: Embedding
    ids: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each row, as diffusers gives them: the token, then ``token_1``, ``token_2``, ..."""
        token = self.embedding.token
        return (token, *(f"{token}_{number}" for number in range(1, len(self.ids))))


@dataclass(frozen=True)
class TokenPlan:
    """The rows to add after the ``start`` that the table has."""

    start: int
    tokens: tuple[PlannedToken, ...]

    @property
    def rows(self) -> int:
        """How many rows are added."""
        return sum(len(token.ids) for token in self.tokens)

    @property
    def added(self) -> dict[str, int]:
        """Names and ids of all rows."""
        return {
            name: number for token in self.tokens for name, number in zip(token.names, token.ids, strict=True)
        }

    def vectors(self, network: str) -> np.ndarray:
        """The rows of one text encoder, float32 ``(rows, width)``."""
        return np.concatenate([token.embedding.vectors[network] for token in self.tokens])


def plan_tokens(
    embeddings: Iterable[Embedding],
    tables: Mapping[str, Sequence[int]],
    taken: Mapping[str, int],
) -> TokenPlan:
    """Check embeddings against a model and give them ids, before anything is written.

    Args:
        embeddings: in order; one that occurs twice with the same vectors is taken once.
        tables: shape ``(rows, width)`` of the embedding table of each text encoder.
        taken: tokens that the tokenizer knows already, with their ids.

    Raises:
        AdapterError: an embedding is of another family, two have one name, or a name is taken.
    """
    if not tables:
        raise AdapterError("the model has no text encoder; embeddings are rows of its table")
    start = int(next(iter(tables.values()))[0])
    own = {network: int(width) for network, (_, width) in tables.items()}
    used = {name.casefold(): name for name in taken}
    planned: list[PlannedToken] = []
    end = start
    for embedding in embeddings:
        _check_family(embedding, own)
        if any(_same(embedding, other.embedding) for other in planned):
            continue
        token = PlannedToken(embedding, tuple(range(end, end + embedding.count)))
        for name in token.names:
            if name.casefold() in used:
                raise embedding.error(
                    f"cannot be added: {used[name.casefold()]!r} is a token already; give one of them "
                    "another name with --embedding FILE:TOKEN"
                )
        used |= {name.casefold(): name for name in token.names}
        planned.append(token)
        end += embedding.count
    if end - start > MOST_ROWS:
        raise AdapterError(f"the embeddings have {end - start} vectors; expected at most {MOST_ROWS}")
    _check_numbered(planned)
    return TokenPlan(start, tuple(planned))


def _same(one: Embedding, other: Embedding) -> bool:
    return (
        one.token == other.token
        and one.vectors.keys() == other.vectors.keys()
        and all(np.array_equal(one.vectors[network], other.vectors[network]) for network in one.vectors)
    )


def _check_family(embedding: Embedding, own: Mapping[str, int]) -> None:
    widths = {network: vectors.shape[1] for network, vectors in embedding.vectors.items()}
    if widths == dict(own):
        return
    family = FAMILIES.get(tuple(sorted(own.items())), "another family")
    listed = " and ".join(str(width) for _, width in sorted(widths.items()))
    wanted = " and ".join(str(width) for _, width in sorted(own.items()))
    raise embedding.error(
        f"is for {embedding.family}: its vectors are {listed} wide; this model is {family}, whose text "
        f"encoder reads {wanted}: use an embedding trained for it"
    )


def _check_numbered(planned: Sequence[PlannedToken]) -> None:
    """Refuse ``style`` with one vector beside ``style_1``: diffusers would take the second for its rest."""
    names = {token.embedding.token: token for token in planned}
    for token in planned:
        follower = names.get(f"{token.embedding.token}_{len(token.ids)}")
        if follower is not None:
            raise follower.embedding.error(
                f"would be taken for a further vector of {token.embedding.token!r}, by the naming of "
                "diffusers; give one of them another name with --embedding FILE:TOKEN"
            )


def tables_of(networks: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, tuple[int, int]]:
    """The shape of the embedding table of each text encoder, from the shapes of a model's tensors."""
    found = {}
    for network, shapes in networks.items():
        if network.startswith(TEXT) and TABLE in shapes:
            rows, width = shapes[TABLE]
            found[network] = (int(rows), int(width))
    return found
