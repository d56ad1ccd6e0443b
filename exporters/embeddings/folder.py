"""A folder of embeddings, of which a prompt takes those that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import KilnError, UsageError
from ..file_kinds import is_pickle
from .base import EXTENSIONS, EmbeddingRef
from .reading import MAX_BYTES, read_embeddings

_BRACKETED = re.compile(r"<[^<>\s]+>")
_MOST_FILES = 100_000


def embeddings_named(folder: Path, prompts: str, matches: Callable[[str], bool]) -> tuple[EmbeddingRef, ...]:
    """The embeddings of a folder that prompts ask for.

    A file is asked for by its stem, as in stable-diffusion-webui, or by the ``<token>`` that it stores. Files
    that nobody asks for may be of any kind, or broken.

    Args:
        folder: with files in it or in folders below it.
        prompts: positive and negative prompts, joined; for the search of tokens in brackets.
        matches: whether a name stands in one of them.

    Raises:
        UsageError: no such folder, or two files of one name.
    """
    if not folder.is_dir():
        raise UsageError(f"--embedding-dir {folder} is not a folder")
    found: dict[str, Path] = {}
    bracketed = [token for token in dict.fromkeys(_BRACKETED.findall(prompts)) if ":" not in token]
    for path in _files(folder):
        tokens = [path.stem] if matches(path.stem) else []
        if not tokens and bracketed:
            tokens = [token for token in _stored(path, bracketed) if matches(token)]
        for token in tokens:
            if token in found:
                raise UsageError(
                    f"{token!r} could be {found[token]} or {path}; say which with --embedding FILE:TOKEN"
                )
            found[token] = path
    return tuple(EmbeddingRef(path, token) for token, path in found.items())


def _files(folder: Path) -> Iterator[Path]:
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    for count, path in enumerate(sorted(paths)):
        if count == _MOST_FILES:
            raise UsageError(f"{folder} has more than {_MOST_FILES} files; name a folder of embeddings")
        yield path


def _stored(path: Path, tokens: list[str]) -> list[str]:
    """Those of the tokens that are the key of a tensor in a file, whose bytes are searched first."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return []
        data = path.read_bytes()
        if not any(token.encode() in data for token in tokens):
            return []
        if is_pickle(data[:64]) or path.suffix.lower() == ".safetensors":
            return [e.token for e in read_embeddings(EmbeddingRef(path)) if e.token in tokens]
    except (OSError, KilnError):  # not asked for by name, so not a file that has to be right
        return []
    return []
