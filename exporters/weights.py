"""Write the weights of one component: a safetensors file, streamed, digested while it is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .buffers import Buffers
from .quantization.plan import INT8_PRECISIONS
from .tensors import DTYPES, TensorInfo

# The data of the first tensor begins at a multiple of this, so that engines can map it.
_ALIGNMENT = 64

_FLUSH_BYTES = 256 << 20
# Digested and written together: small enough to be still in the cache when it is written.
_PIECE = 1 << 20
# Tensors that may wait to be written: enough that large and small ones, touched and not, even out.
_WAITING_BYTES = 48 << 20

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the file being written."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def place(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Placed]]:
    """Lay out ``(name, dtype, shape)`` one behind the other; ``metadata`` goes into the header as it is.

    Returns:
        The file's header (length, JSON, padding) and the place of each tensor, by absolute offset.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, Placed] = {}
    end = 0
    # Wider types first: then every tensor is aligned to its own element size without holes. int8 comes before
    # them, in multiples of 8 bytes, because a weight is streamed once and its scales are known afterwards.
    for name, dtype, shape in sorted(tensors, key=lambda t: (t[1] != "I8", -DTYPES[t[1]].itemsize, t[0])):
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        relative[name] = Placed(dtype, shape, end, nbytes)
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    placed = {n: Placed(p.dtype, p.shape, start + p.offset, p.nbytes) for n, p in relative.items()}
    return len(text).to_bytes(8, "little") + text, placed


def write_weights(
    path: Path,
    header: bytes,
    tensors: Iterable[np.ndarray],
    dtypes: Iterable[np.dtype] | None = None,
    buffers: Buffers | None = None,
) -> tuple[int, str]:
    """Write header and tensors in the order of the header; some 48 MB of tensors wait in memory.

    Args:
        path: the file.
        header: what ``place`` gave.
        tensors: in the order of the header.
        dtypes: the type each is cast to while the next is made; None stores them as they are.
        buffers: get back every tensor that has been written.

    Returns:
        The file's size in bytes and its SHA-256.
    """
    digest = hashlib.sha256()
    size = 0

    def take(tensor: np.ndarray, dtype: np.dtype | None) -> None:
        nonlocal size
        stored = tensor if dtype is None else tensor.astype(dtype, copy=False)
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            digest.update(piece)
            while piece:  # an unbuffered write may take a part
                piece = piece[file.write(piece) :]
        size += len(data)
        if buffers is not None:
            buffers.give_back(tensor)

    # The cast, the digest and the disk work while the next tensors are read and baked; all of them let go
    # of the interpreter. One more thread begins to flush early, so that the last flush is short.
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(1) as flusher,
    ):
        waiting = deque([(0, writer.submit(take, np.frombuffer(header, np.uint8), None))])
        flushed, flushing = 0, None
        pairs = ((t, None) for t in tensors) if dtypes is None else zip(tensors, dtypes, strict=True)
        for tensor, dtype in pairs:
            waiting.append((tensor.nbytes, writer.submit(take, tensor, dtype)))
            while sum(nbytes for nbytes, _ in waiting) > _WAITING_BYTES:
                waiting.popleft()[1].result()
            if size - flushed > _FLUSH_BYTES and (flushing is None or flushing.done()):
                flushed, flushing = size, flusher.submit(os.fdatasync, file.fileno())
        for _, future in waiting:
            future.result()
        if flushing is not None:
            flushing.result()
    return size, digest.hexdigest()


def overflow(largest: float, dtype: str) -> str | None:
    """Why finite values up to ``largest`` would become infinite in a type, or None when they do not."""
    limit = float(np.finfo(DTYPES[dtype]).max) if dtype in ("F16", "F32") else math.inf
    if not limit < largest < math.inf:
        return None
    advice = "; use --precision fp32 or bf16" if dtype == "F16" else ""
    return f"has a value of {largest:.3g}, {dtype} ends at {limit:.6g}{advice}"


def largest_if_narrowed(tensor: np.ndarray, dtype: str) -> float:
    """The largest magnitude of a tensor that a cast to ``dtype`` could make infinite, else 0."""
    narrower = {"F16": tensor.dtype != np.float16, "F32": tensor.dtype == np.float64}
    if not narrower.get(dtype) or not tensor.size:
        return 0.0
    return max(float(tensor.max()), -float(tensor.min()))


def stored_dtype(info: TensorInfo, storage: str) -> str:
    """The type a tensor is stored in: its own, or the one asked for if it is floating."""
    if storage in ("auto", *INT8_PRECISIONS) or info.dtype not in FLOATS:
        return "F32" if info.dtype == "F64" else info.dtype
    return {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[storage]
