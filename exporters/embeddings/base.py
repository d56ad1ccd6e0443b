"""What an embedding is to the rest of the package: a request for one, and its token with its vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import AdapterError, UsageError

EXTENSIONS = (".safetensors", ".pt", ".bin", ".png")
TEXT, TEXT_2 = "text_encoder", "text_encoder_2"
# Width of the vectors of each family's text encoders.
FAMILIES: Mapping[tuple[tuple[str, int], ...], str] = {
    ((TEXT, 768),): "SD1",
    ((TEXT, 1024),): "SD2",
    ((TEXT, 768), (TEXT_2, 1280)): "SDXL",
    ((TEXT_2, 1280),): "SDXL's second text encoder",
}


@dataclass(frozen=True)
class EmbeddingRef:
    """A request for the embeddings of one file.

    ``token`` is what prompts call it, None what it calls itself.
    """

    path: Path
    token: str | None = None

    @classmethod
    def parse(cls, text: str) -> EmbeddingRef:
        """Read ``FILE`` or ``FILE:TOKEN``; a path that exists as typed is taken whole.

        Raises:
            UsageError: there is no such file.
        """
        head, colon, token = text.rpartition(":")
        if not colon or _is_file(text):
            head, token = text, ""
        if not _is_file(head):
            raise UsageError(f"no embedding file {head!r}; expected --embedding FILE or FILE:TOKEN")
        if colon and head != text and not token.strip():
            raise UsageError(f"{text!r} gives an empty token; expected FILE:TOKEN")
        return cls(Path(head), token or None)


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):  # too long, or a NUL byte
        return False


@dataclass(frozen=True)
class Embedding:
    """A token and its vectors: float32 ``(n, width)`` by text encoder, the same n for both of SDXL.

    ``origin`` is the file it is from and ``sha256`` the digest of that file.
    """

    token: str
    vectors: Mapping[str, np.ndarray]
    origin: str
    sha256: str

    @property
    def count(self) -> int:
        """Vectors, which is how many tokens of a prompt it takes."""
        return len(next(iter(self.vectors.values())))

    @property
    def family(self) -> str:
        """The family whose text encoders are as wide as the vectors, in words."""
        widths = tuple(sorted((network, vectors.shape[1]) for network, vectors in self.vectors.items()))
        listed = " and ".join(f"{width} wide" for _, width in widths)
        return FAMILIES.get(widths, f"no family that Kiln knows ({listed})")

    def error(self, text: str) -> AdapterError:
        """An error about this embedding, to be raised by the caller."""
        return AdapterError(f"{self.origin}: the embedding {self.token!r} {text}")
