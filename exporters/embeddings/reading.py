"""Reads the embeddings of a file: safetensors, torch, or a picture of stable-diffusion-webui."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ...errors import AdapterError, UsageError
from ..adapters.open import Adapter
from ..file_kinds import is_pickle, open_regular
from ..pickles import load_object
from ..tensors import TensorFile
from .base import TEXT, TEXT_2, Embedding, EmbeddingRef
from .forms import Entry, Leaf, bundled_entry, bundled_keys, entries_of
from .pictures import SIGNATURE, TEXT_KEY, name_in, stored_in

MAX_BYTES = 64 << 20  # 16 vectors of SDXL have 0.1 MB
MAX_VECTORS = 1024
MAX_TOKEN = 100  # characters
_SECOND_WIDTH = 1280  # of OpenCLIP's bigG, the second text encoder of SDXL; no first one has it
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def read_embeddings(ref: EmbeddingRef) -> tuple[Embedding, ...]:
    """Every embedding of a file, its vectors in float32.

    The token is that of the request, else the one that the file stores (diffusers, cloneofsimo, pictures),
    else the file's stem, as in stable-diffusion-webui.

    Raises:
        AdapterError: the file is missing, damaged, no embedding, or holds NaN or what cannot be vectors.
        UsageError: a token for a file with several embeddings.
    """
    path = ref.path
    stream, size = open_regular(path, AdapterError)
    with stream:
        head = stream.read(64)
    if size > MAX_BYTES:
        raise AdapterError(
            f"{path}: has {size / 1e6:.0f} MB; an embedding has less than 1, is it a checkpoint?"
        )
    entries = _png(path) if head.startswith(SIGNATURE) else _file(path, head)
    if ref.token is not None and len(entries) > 1:
        tokens = ", ".join(str(entry.token) for entry in entries[:5])
        raise UsageError(
            f"{path} holds {len(entries)} embeddings ({tokens}); they cannot all be {ref.token!r}"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    found = [_embedding(entry, ref.token or entry.token or path.stem, str(path), sha256) for entry in entries]
    return tuple(found)


def bundled_embeddings(adapter: Adapter, sha256: str) -> tuple[Embedding, ...]:
    """The embeddings inside an open adapter, which belong to it and are used at full strength.

    Raises:
        AdapterError: one of them cannot be read, or cannot be rows of a table.
    """
    source, found = adapter.source, []
    for token, keys in bundled_keys(source.infos).items():
        for key in keys.values():
            if source.infos[key].size > MAX_VECTORS * 4096:
                raise AdapterError(
                    f"{adapter.path}: {key!r} has {source.infos[key].size} numbers; is no embedding"
                )
        tensors = {name: source.read(key) for name, key in keys.items()}
        entry = bundled_entry(token, tensors, str(adapter.path))
        found.append(_embedding(entry, token, str(adapter.path), sha256))
    return tuple(found)


def own_keys(adapter: Adapter) -> list[str]:
    """The keys of an adapter's file that are embeddings."""
    return [key for keys in bundled_keys(adapter.source.infos).values() for key in keys.values()]


def _file(path: Path, head: bytes) -> list[Entry]:
    if not is_pickle(head):
        file = TensorFile.open(path, error=AdapterError)
        try:
            tensors = {name: file.read(name) for name in file.infos}
        finally:
            file.close()
        return entries_of(tensors, str(path), lambda value: isinstance(value, np.ndarray))
    loaded = load_object(path, AdapterError, modules=True)
    import torch

    return entries_of(loaded, str(path), lambda value: isinstance(value, torch.Tensor))


def _png(path: Path) -> list[Entry]:
    """The embedding of a picture; its ``name`` is the token there, not the file's."""
    stored = stored_in(path)
    if stored is None:
        raise AdapterError(
            f"{path}: is a picture without an embedding, in its text {TEXT_KEY!r} or in its pixels; expected "
            "the file as it was saved, not resized and not a JPEG"
        )
    entries = entries_of(stored, str(path), lambda value: isinstance(value, np.ndarray))
    return [Entry(entry.token or name_in(stored), entry.tensors) for entry in entries]


def _embedding(entry: Entry, token: str, path: str, sha256: str) -> Embedding:
    check_token(token, path)
    vectors: dict[str, np.ndarray] = {}
    for network, tensor in entry.tensors.items():
        array = _vectors(tensor, token, path)
        vectors[network or (TEXT_2 if array.shape[1] == _SECOND_WIDTH else TEXT)] = array
    counts = {len(array) for array in vectors.values()}
    if len(counts) > 1:
        listed = " and ".join(f"{len(array)} for the {network}" for network, array in vectors.items())
        raise AdapterError(f"{path}: the embedding {token!r} has {listed} vectors; expected as many for each")
    return Embedding(token, vectors, path, sha256)


def check_token(token: str, path: str) -> None:
    """Refuse what cannot be a word of a prompt.

    Raises:
        AdapterError: it is empty, too long, has control characters, or is one of CLIP's own.
    """
    if not token.strip() or len(token) > MAX_TOKEN or not token.isprintable() or token in _SPECIAL:
        raise AdapterError(
            f"{path}: cannot be called {token[:60]!r} in a prompt; expected 1 to {MAX_TOKEN} printable "
            "characters: give it another name with --embedding FILE:TOKEN"
        )


def _vectors(tensor: Leaf, token: str, path: str) -> np.ndarray:
    """A tensor as float32 ``(n, width)``."""
    where = f"{path}: the embedding {token!r}"
    shape = tuple(int(n) for n in tensor.shape)
    rows = shape[0] if len(shape) == 2 else 1
    if len(shape) not in (1, 2) or 0 in shape or rows > MAX_VECTORS:
        also = "; three axes are the states of a whole prompt, not a token" if len(shape) == 3 else ""
        raise AdapterError(f"{where} has the shape {list(shape)}; expected [width] or [vectors, width]{also}")
    if isinstance(tensor, np.ndarray):
        floats = tensor.dtype.kind == "f" or tensor.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        with np.errstate(over="ignore"):  # checked by value
            array = tensor.astype(np.float32) if floats else None
    else:
        floats = tensor.is_floating_point() and not tensor.is_sparse
        array = tensor.detach().float().cpu().numpy() if floats else None
    if array is None:
        raise AdapterError(f"{where} is of type {tensor.dtype}; expected floating point")
    if not np.isfinite(array).all():
        raise AdapterError(f"{where} holds NaN or infinity; the file is damaged or its training diverged")
    return np.ascontiguousarray(array.reshape(rows, shape[-1]))
