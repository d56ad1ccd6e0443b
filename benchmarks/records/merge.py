"""Several results folders as one: records by id, pictures by content, nothing overwritten and nothing
guessed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import StorageError, UsageError
from .forms import to_dict
from .record import Record
from .store import append_lines, read_store, records_file


@dataclass(frozen=True)
class Merged:
    """What a merge came to.

    ``added`` went into the folder, ``known`` were there already or in two sources; ``repeated`` are keys
    that were measured more than once: all their records are kept. ``torn`` are lines that were left out.
    """

    added: tuple[Record, ...]
    known: int
    images: int
    repeated: dict[str, int]
    torn: tuple[str, ...]


def merge_folders(sources: Sequence[Path], output: Path) -> Merged:
    """Bring the records and pictures of several results folders into one, which may exist.

    Records are ordered by time and id, so the order of the sources makes no difference. Two records of one
    id have to be equal, word for word. Everything is looked at before anything is written.

    Raises:
        UsageError: two records of one id differ, a picture is missing or is not what its record says,
            or a source is no results folder; the text names all of them.
        StorageError: the disk refused.
    """
    stored = [read_store(source) for source in sources]
    present = read_store(output).records if records_file(output).is_file() else ()
    found: dict[str, Record] = {record.id: record for record in present}
    conflicts: list[str] = []
    fresh: list[tuple[Record, bytes, Path]] = []
    known = 0
    for store in stored:
        for record, line in zip(store.records, store.texts, strict=True):
            other = found.get(record.id)
            if other is None:
                found[record.id] = record
                fresh.append((record, line, store.folder))
            elif other == record:
                known += 1
            else:
                conflicts.append(f"{record.id} of {store.path} differs in {_differing(other, record)}")
    fresh.sort(key=lambda row: (row[0].created, row[0].id))
    pictures, problems = _pictures([(record, folder) for record, _, folder in fresh], output)
    if conflicts or problems:
        text = "; ".join([*conflicts, *problems])
        raise UsageError(
            f"nothing was merged: {text}. `kiln bench verify` tells which folder is to be trusted"
        )
    for name, data in pictures.items():
        write_file(output / name, data)
    append_lines(output, [line for _, line, _ in fresh])
    keys = Counter(record.key for record in found.values())
    repeated = {key: count for key, count in keys.items() if count > 1}
    return Merged(
        tuple(record for record, _, _ in fresh),
        known,
        len(pictures),
        repeated,
        tuple(s.torn for s in stored if s.torn),
    )


def image_files(record: Record) -> dict[str, str]:
    """The SHA-256 of every picture of a record, by its file."""
    return {image.file: image.sha256 for image in (*record.images, *record.parity.reference_images)}


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _pictures(fresh: Sequence[tuple[Record, Path]], output: Path) -> tuple[dict[str, bytes], list[str]]:
    found: dict[str, bytes] = {}
    problems = []
    for record, folder in fresh:
        for name, digest in image_files(record).items():
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                problems.append(f"{folder / name} of {record.id} cannot be read: {error.strerror or error}")
                continue
            if hashlib.sha256(data).hexdigest() != digest:
                problems.append(f"{folder / name} is not the picture that {record.id} names")
            elif not (output / name).is_file():
                found[name] = data
            elif hashlib.sha256((output / name).read_bytes()).hexdigest() != digest:
                problems.append(f"{output / name} is there, and is not the picture that {record.id} names")
    return found, list(dict.fromkeys(problems))


def _differing(a: Record, b: Record) -> str:
    one, other = to_dict(a), to_dict(b)
    return ", ".join(name for name in one if one[name] != other[name])
