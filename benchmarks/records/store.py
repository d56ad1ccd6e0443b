"""A results folder's records: ``records.jsonl``, one record a line, added to and never rewritten."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import StorageError, UsageError
from .forms import RecordError, from_json, to_json
from .record import Record

RECORDS = "records.jsonl"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Line:
    """One line of a file of records: a record, or why it is none."""

    number: int
    text: bytes
    record: Record | None
    error: str | None = None
    torn: bool = False


@dataclass(frozen=True)
class Stored:
    """What a file of records holds.

    ``texts`` are the lines of ``records`` as they stand there, for whoever hands them on: a record that an
    older Kiln wrote has a key that follows from its own fields. ``torn`` says what was left of lines that
    were not written to their end.
    """

    path: Path
    records: tuple[Record, ...]
    texts: tuple[bytes, ...]
    torn: str | None = None

    @property
    def folder(self) -> Path:
        """What ``ImageFacts.file`` is relative to."""
        return self.path.parent


def append_record(directory: Path, record: Record) -> Path:
    """Add a record to a results folder; it is on the disk when this returns. Gives the file.

    Others may append at the same time. If the last line there was torn by a crash, it is ended first, so
    that it takes no other record with it.

    Raises:
        RecordError: the record holds what JSON cannot.
        StorageError: the disk refused.
    """
    return append_lines(directory, [to_json(record).encode()])


def append_lines(directory: Path, texts: Iterable[bytes]) -> Path:
    """As ``append_record``, for records that are written out already: all are added, or the file is as it
    was.
    """
    import filelock

    data = b"".join(text + b"\n" for text in texts)
    path = directory / RECORDS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{RECORDS}.lock")), path.open("ab") as file:
            start = file.tell()
            try:
                file.write(b"\n" + data if _is_torn(path) else data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_records(path: Path) -> tuple[Record, ...]:
    """All records of a results folder or of a ``.jsonl`` file; a torn line is left out.

    Raises:
        UsageError: there is no such file, or a line is no record; the text has its number.
        StorageError: it cannot be read.
    """
    return read_store(path).records


def read_store(path: Path) -> Stored:
    """As ``read_records``, and what was torn.

    Raises:
        UsageError: there is no such file, or a line is no record; the text has its number.
        StorageError: it cannot be read.
    """
    lines = read_lines(path)
    for line in lines:
        if line.error and not line.torn:
            raise RecordError(line.error)
    torn = "; ".join(line.error for line in lines if line.torn and line.error)
    good = [(line.record, line.text) for line in lines if line.record]
    return Stored(records_file(path), tuple(r for r, _ in good), tuple(t for _, t in good), torn or None)


def read_lines(path: Path) -> tuple[Line, ...]:
    """Every line by itself, those that are no records with the reason.

    A line is torn when a process died while writing it: it begins an object that never ends, and is the last
    line, or one after which an append has gone on.

    Raises:
        UsageError: there is no such file.
        StorageError: it cannot be read.
    """
    file = records_file(path)
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UsageError(
            f"{file} does not exist; give a results folder of `kiln bench run -o`, or a .jsonl file"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
    return tuple(_line(file, number, text) for number, text in enumerate(lines, 1) if text.strip())


def records_file(path: Path) -> Path:
    """The file of records of a results folder; a file is itself."""
    return path / RECORDS if path.is_dir() else path


def _line(file: Path, number: int, text: bytes) -> Line:
    try:
        return Line(number, text, from_json(text))
    except RecordError as error:
        if _is_beginning(text):
            why = f"line {number} of {file} was not written to its end ({len(text)} bytes) and is left out"
            return Line(number, text, None, why, torn=True)
        return Line(number, text, None, f"line {number} of {file}: {error}")


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _is_beginning(text: bytes) -> bool:
    """Whether an object begins here and does not end, whatever is in its texts."""
    bare = _STRING.sub(b"", text.lstrip())
    return bare.startswith(b"{") and (b'"' in bare or bare.count(b"{") > bare.count(b"}"))
