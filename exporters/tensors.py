"""Lazy, torch-free reading of one safetensors file, with its header checked strictly.

The format is https://github.com/huggingface/safetensors: eight bytes of little-endian header length, a
JSON header, then the tensors without holes. Tensors are read with seek and readinto, not mapped, so that
only the one in hand counts as resident memory.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, KilnError
from .buffers import Buffers
from .file_kinds import foreign_format, open_regular

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: safetensors type name, shape, absolute byte offset in the file, byte count."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorSource(Protocol):
    """What reads tensors lazily: a safetensors file, or a torch file behind the same interface."""

    path: Path
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str, buffers: Buffers | None = None) -> np.ndarray:
        """One tensor in its stored type, in memory of ``buffers`` where that can be used."""
        ...

    def close(self) -> None:
        """Give the file back; reading afterwards is an error."""
        ...


class TensorFile:
    """One open safetensors file: ``infos`` in file order, ``metadata``, and tensors read one at a time."""

    def __init__(
        self,
        path: Path,
        stream: BinaryIO,
        infos: dict[str, TensorInfo],
        metadata: dict[str, str],
        error: type[KilnError],
    ) -> None:
        self.path = path
        self.infos = infos
        self.metadata = metadata
        self._stream = stream
        self._error = error
        self._lock = threading.Lock()  # seek and read belong together

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, error: type[KilnError] = CheckpointError) -> TensorFile:
        """Open a file and check its header; no tensor is read yet.

        Args:
            path: a safetensors file.
            error: the class of every error raised here and while reading.

        Raises:
            KilnError: of class ``error``: the file is missing, is not a safetensors file (the text names
                what it is instead), is truncated, or its header contradicts itself.
        """
        path = Path(path)
        stream, size = open_regular(path, error)
        try:
            infos, metadata = _read_header(stream, size, path, error)
        except OSError as cause:
            stream.close()
            raise error(f"{path}: cannot be read: {cause.strerror}") from cause
        except BaseException:
            stream.close()
            raise
        return cls(path, stream, infos, metadata, error)

    def read(self, name: str, buffers: Buffers | None = None) -> np.ndarray:
        """Read one tensor.

        Args:
            name: the tensor's.
            buffers: lend the memory, which the caller gives back; without them it is fresh.

        Returns:
            A C-contiguous array that nobody else holds, of the tensor's shape in its stored type
            (bfloat16 and the float8 types are those of ml_dtypes).

        Raises:
            KilnError: no tensor has this name, or the file has shrunk since it was opened.
        """
        info = self.infos.get(name)
        if info is None:
            raise self._error(f"{self.path}: has no tensor named {name!r}")
        raw = np.empty(info.nbytes, np.uint8) if buffers is None else buffers.take(info.nbytes)
        try:
            with self._lock:
                self._stream.seek(info.offset)
                got = _read_fully(self._stream, raw.data)
        except (OSError, ValueError) as cause:  # ValueError: the stream is closed
            raise self._error(f"{self.path}: tensor {name!r} cannot be read: {cause}") from cause
        if got != info.nbytes:
            raise self._error(f"{self.path}: ends inside tensor {name!r}; the file changed while it was open")
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_fully(stream: BinaryIO, view: memoryview) -> int:
    """Fill ``view``; one raw read moves at most 2 GiB on Linux. Returns the bytes read."""
    done = 0
    while done < len(view):
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done


def _read_header(
    stream: BinaryIO, size: int, path: Path, error: type[KilnError]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    head = bytearray(min(64, size))
    _read_fully(stream, memoryview(head))
    if not head:
        raise error(f"{path}: is empty (0 bytes); expected a safetensors file")
    foreign = foreign_format(bytes(head))
    if foreign:
        raise error(f"{path}: is {foreign}; expected a safetensors file")
    if size < 8:
        raise error(f"{path}: is truncated: {size} bytes, a safetensors file has at least 10")
    length = int.from_bytes(head[:8], "little")
    if length > HEADER_LIMIT:
        raise error(
            f"{path}: is not a safetensors file: its header would be {length} bytes long "
            f"(at most {HEADER_LIMIT})"
        )
    if length > size - 8:
        raise error(
            f"{path}: is truncated: the header needs {length} bytes, {size - 8} are there; download it again"
        )
    raw = bytearray(length)
    stream.seek(8)
    _read_fully(stream, memoryview(raw))
    header = _parse_json(bytes(raw), path, error)
    metadata = _checked_metadata(header.pop("__metadata__", {}), path, error)
    infos = {name: _tensor_info(name, entry, 8 + length, path, error) for name, entry in header.items()}
    return _checked_layout(infos, 8 + length, size, path, error), metadata


def _parse_json(raw: bytes, path: Path, error: type[KilnError]) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("the same name stands in it twice")
        return found

    def no_constant(text: str) -> object:
        raise ValueError(f"{text} is not JSON")

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise error(
            f"{path}: is not a safetensors file: the header cannot be read: {reason[:200]}"
        ) from cause
    if not isinstance(header, dict):
        raise error(f"{path}: is not a safetensors file: the header is not a JSON object")
    return header


def _checked_metadata(value: object, path: Path, error: type[KilnError]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{path}: damaged header: __metadata__ is not a table of texts")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(name: str, entry: object, start: int, path: Path, error: type[KilnError]) -> TensorInfo:
    def fail(why: str) -> KilnError:
        return error(f"{path}: damaged header: tensor {name[:200]!r} {why}")

    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"has the type {str(dtype)[:40]!r}; Kiln reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_count, shape)):
        raise fail("has a shape that is not a list of counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fail("has data_offsets that are not two counts")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise fail(f"should have {nbytes} bytes by type and shape, its offsets say {end - begin}")
    return TensorInfo(dtype, tuple(shape), start + begin, nbytes)


def _checked_layout(
    infos: dict[str, TensorInfo], start: int, size: int, path: Path, error: type[KilnError]
) -> dict[str, TensorInfo]:
    """Tensors in file order, after checking that they fill the file exactly."""
    ordered = sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    position = start
    for name, info in ordered:
        if info.offset != position:
            what = "overlaps the one before it" if info.offset < position else "leaves a hole before it"
            raise error(f"{path}: damaged header: tensor {name[:200]!r} {what}")
        position += info.nbytes
    if position > size:
        raise error(f"{path}: is truncated: {size} bytes, the header describes {position}; download it again")
    if position < size:
        raise error(f"{path}: is damaged: {size - position} bytes follow the last tensor")
    return dict(ordered)
