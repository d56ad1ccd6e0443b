"""Digests of files: all bytes, or a cheap fingerprint over the beginning and sampled blocks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

_SAMPLES = 64
_BLOCK = 4096  # bytes
_HEAD = 1 << 20  # bytes; holds the header of any model's safetensors file

_known: dict[tuple[str, int, int, int, bool], str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, remembered by path, inode, size and time of change."""
    return _remembered(path, sampled=False)


def file_fingerprint(path: Path) -> str:
    """SHA-256 over size, first MiB and 64 evenly spread blocks of 4 KiB: tells apart, proves nothing."""
    return _remembered(path, sampled=True)


def _remembered(path: Path, sampled: bool) -> str:
    try:
        with open(path, "rb") as stream:
            state = os.fstat(stream.fileno())
            key = (os.path.realpath(path), state.st_ino, state.st_size, state.st_mtime_ns, sampled)
            if key not in _known:
                if sampled:
                    _known[key] = _sample(stream, state.st_size)
                else:
                    _known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            return _known[key]
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause


def _sample(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    digest.update(stream.read(_HEAD))
    for index in range(_SAMPLES):
        stream.seek(max(0, size - _BLOCK) * index // (_SAMPLES - 1))
        digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
