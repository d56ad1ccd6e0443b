"""Write the weights of one component: a safetensors file, streamed, digested while it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .tensors import DTYPES, TensorInfo

# The data of the first tensor begins at a multiple of this, so that engines can map it.
_ALIGNMENT = 64

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the file being written."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def place(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Placed]]:
    """Lay out ``(name, dtype, shape)`` one behind the other.

    Returns:
        The file's header (length, JSON, padding) and the place of each tensor, by absolute offset.
    """
    header: dict[str, object] = {}
    relative: dict[str, Placed] = {}
    end = 0
    # Wider types first: then every tensor is aligned to its own element size without holes.
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPES[t[1]].itemsize, t[0])):
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        relative[name] = Placed(dtype, shape, end, nbytes)
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    placed = {n: Placed(p.dtype, p.shape, start + p.offset, p.nbytes) for n, p in relative.items()}
    return len(text).to_bytes(8, "little") + text, placed


def write_weights(path: Path, header: bytes, tensors: Iterable[np.ndarray]) -> tuple[int, str]:
    """Write header and tensors in the order of the header; two tensors are in memory at a time.

    Returns:
        The file's size in bytes and its SHA-256.
    """
    digest = hashlib.sha256()
    size = len(header)

    def take(data: memoryview) -> None:
        digest.update(data)
        file.write(data)

    # Digest and disk work on one tensor while the next is read and baked: both let go of the interpreter.
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        pending = writer.submit(take, memoryview(header))
        for tensor in tensors:
            data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
            pending.result()
            pending = writer.submit(take, data)
            size += len(data)
        pending.result()
        file.flush()
    return size, digest.hexdigest()


def overflow(tensor: np.ndarray, dtype: str) -> str | None:
    """Why finite values of a tensor would become infinite in a narrower type, or None when they do not."""
    narrower = {"F16": tensor.dtype != np.float16, "F32": tensor.dtype == np.float64}
    if not narrower.get(dtype) or not tensor.size:
        return None
    limit, largest = float(np.finfo(DTYPES[dtype]).max), max(float(tensor.max()), -float(tensor.min()))
    if not limit < largest < float("inf"):
        return None
    advice = "; use --precision fp32 or bf16" if dtype == "F16" else ""
    return f"has a value of {largest:.3g}, {dtype} ends at {limit:.6g}{advice}"


def stored_dtype(info: TensorInfo, storage: str) -> str:
    """The type a tensor is stored in: its own, or the one asked for if it is floating."""
    if storage == "auto" or info.dtype not in FLOATS:
        return "F32" if info.dtype == "F64" else info.dtype
    return {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[storage]
