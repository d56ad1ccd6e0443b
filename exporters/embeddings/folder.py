"""A folder of embeddings, of which a prompt takes those that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from ...errors import AdapterError, KilnError, UsageError
from ..file_kinds import is_pickle
from .base import EXTENSIONS, EmbeddingRef
from .pictures import has_text, name_in, stored_in
from .reading import MAX_BYTES, read_embeddings

_BRACKETED = re.compile(r"<[^<>\s]+>")
_MOST_FILES = 100_000
_PICTURE = ".png"
_PREVIEW = ".preview"  # as stable-diffusion-webui ends the stem of pictures that it never reads


def embeddings_named(folder: Path, prompts: str, matches: Callable[[str], bool]) -> tuple[EmbeddingRef, ...]:
    """The embeddings of a folder that prompts ask for.

    A file is asked for by its stem, as in stable-diffusion-webui, or by the ``<token>`` that it stores; a
    picture also by the name in its text. Files that nobody asks for may be of any kind, or broken, and a
    picture without an embedding is the preview of another file.

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
        if path.suffix.lower() == _PICTURE:
            tokens = _of_picture(path, matches, found)
        else:
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
    """Files by name, pictures last."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    for count, path in enumerate(sorted(paths, key=lambda path: (path.suffix.lower() == _PICTURE, path))):
        if count == _MOST_FILES:
            raise UsageError(f"{folder} has more than {_MOST_FILES} files; name a folder of embeddings")
        yield path


def _of_picture(path: Path, matches: Callable[[str], bool], others: Container[str]) -> list[str]:
    """The name by which a picture is asked for: its own, else its file's; none without an embedding.

    Pixels are decoded only where the file's name is asked for.
    """
    if path.stem.lower().endswith(_PREVIEW) or path.stat().st_size > MAX_BYTES:
        return []
    by_file = matches(path.stem)
    try:
        if not (by_file or has_text(path)):
            return []
        stored = stored_in(path)
    except AdapterError:  # refused when it is opened, unless it can be the preview of what is asked for
        return [path.stem] if by_file and path.stem not in others else []
    name = name_in(stored)
    if name and matches(name):
        return [name]
    return [path.stem] if by_file and stored is not None else []


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
