"""Tells what a weights file really is by its first bytes, and opens only regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import KilnError


def open_regular(path: Path, error: type[KilnError]) -> tuple[BinaryIO, int]:
    """Open a regular file for unbuffered reading; returns the stream and its size in bytes."""
    try:
        # Checked before opening: opening a pipe would wait for a writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: is not a file; expected a .safetensors file")
        stream = open(path, "rb", buffering=0)  # noqa: SIM115 - handed to the caller
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL byte in the path
        raise error(f"{path}: cannot be opened: {getattr(cause, 'strerror', None) or cause}") from cause
    return stream, os.fstat(stream.fileno()).st_size


def foreign_format(head: bytes) -> str | None:
    """What a file that begins with ``head`` is, when that is something well known and not safetensors.

    Eight printable bytes cannot begin a safetensors file: as a length they would exceed the limit.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return (
            "a git-LFS pointer, not the weights; fetch them with 'git lfs pull' or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page saved instead of the weights; download the file again (a login may be needed)"
    if head.startswith(b"PK\x03\x04"):
        return (
            "a zip archive (torch's .ckpt/.pt format has this form); rename it to .ckpt if it is a torch file"
        )
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:8] != b"\0" * 6:
        return "a Python pickle (torch's old .ckpt/.pt format); rename it to .ckpt if it is a torch file"
    if head.startswith(b"GGUF"):
        return "a GGUF file (quantized); use the fp16 or fp32 .safetensors of the same model"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras weights); use the .safetensors of the same model"
    if len(head) >= 8 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return None


def is_pickle(head: bytes) -> bool:
    """Whether a file beginning with ``head`` is one of torch's two forms: a zip archive, or a bare pickle."""
    return foreign_format(head) is not None and (head.startswith(b"PK\x03\x04") or head[:1] == b"\x80")
