"""A folder for an engine that writes its own cache files (TensorRT, MIGraphX), one for each key.

Such files are code: loading one runs it. So a folder is used again only if it is the user's own and closed
to others, and every file in it has the SHA-256 that was recorded when the engine was done; anything added,
missing or changed throws the whole folder away. The record lies outside of what the engine sees:

    <key>/engine/       the engine's files
    <key>/engine.json   {name: [size, SHA-256]}, written last: without it the folder is unfinished
    <key>/facts.json    what it belongs to
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import keeps_nothing, private_folder, untrusted
from ..cache_locks import Claim, claim
from ..cache_store import discard, enforce_limit, write_facts

FILES = "engine"
RECORD = "engine.json"
_ATTEMPTS = 5  # each is lost only to another process that removes the same entry at that moment

log = logging.getLogger(__name__)

Record = dict[str, list[object]]


@dataclass(frozen=True)
class EngineFolder:
    """Where the engine may keep its files.

    ``ready``: they were made under the same key before and none has changed. Otherwise the folder is empty.
    """

    path: Path
    ready: bool


@contextmanager
def engine_folder(
    folder: Path, key: str, facts: Mapping[str, Any], *, limited: bool = False
) -> Iterator[EngineFolder]:
    """Lend the folder of a key for as long as the engine loads or builds; the files are recorded afterwards.

    An engine that compiles at its first run needs that run inside the block. Who builds excludes all others
    who want the same key: they wait and then find it ready. When the block fails, what it built is removed.
    A cache that cannot be used costs a warning, and the engine gets an empty folder that goes afterwards.

    Args:
        folder: the folder of all keys of a backend.
        key: as of ``compiled_cache.cache_key``.
        facts: what to note beside the files.
        limited: whether the limit of the cache holds here.
    """
    held = None if limited and keeps_nothing() else _claimed(folder / key)
    if held is None:
        with tempfile.TemporaryDirectory(prefix="kiln-engine-") as name:
            yield EngineFolder(Path(name), ready=False)
        return
    entry = folder / key
    with held:
        ready = not held.exclusive
        before = _snapshot(entry / FILES)
        try:
            yield EngineFolder(entry / FILES, ready)
            # An engine may add to what it found ready, for example a shape that it had not seen.
            if (not ready or _snapshot(entry / FILES) != before) and not _seal(entry, facts):
                # Others may be reading what was ready before; without its record nobody else takes it up.
                (entry / RECORD).unlink(missing_ok=True) if ready else discard(entry)
        except BaseException:
            if not ready:
                discard(entry)
            raise
        held.touch()
    if limited and not ready:
        enforce_limit()


def _claimed(entry: Path) -> Claim | None:
    """A shared claim on a folder that is ready, or an exclusive one on an empty one; None without a cache."""
    for _ in range(_ATTEMPTS):
        try:
            private_folder(entry)
        except OSError as error:
            log.warning("compiled models cannot be kept in %s: %s", entry.parent, error.strerror)
            return None
        why = untrusted(entry.parent) or untrusted(entry)
        if why:
            log.warning("compiled models are not kept: %s", why)
            return None
        shared = claim(entry)
        if shared is None:
            continue
        if not _fault(entry):
            return shared
        shared.release()
        alone = claim(entry, exclusive=True)
        if alone is None:
            if entry.is_dir():
                log.warning("compiled models are not kept: %s cannot be locked", entry)
                return None
            continue
        fault = _fault(entry)
        if not fault:  # another process was faster; take a shared claim on what it made
            alone.release()
            continue
        try:
            return _cleared(entry, alone, fault)
        except OSError as error:
            log.warning("compiled models cannot be kept in %s: %s", entry, error.strerror)
            alone.release()
            return None
    log.warning("compiled models are not kept: other processes keep removing %s", entry)
    return None


def _cleared(entry: Path, alone: Claim, fault: str) -> Claim:
    if (entry / RECORD).exists() or (entry / FILES).exists():
        log.warning("the compiled model in %s is thrown away and made again: %s", entry, fault)
    _empty(entry)
    (entry / FILES).mkdir(mode=0o700)
    return alone


def _empty(entry: Path) -> None:
    """Remove record and files; the record first, so that a kill in between leaves an unfinished entry."""
    (entry / RECORD).unlink(missing_ok=True)
    shutil.rmtree(entry / FILES, ignore_errors=True)


def _fault(entry: Path) -> str:
    """Why the files of an entry may not be used, empty if they may."""
    try:
        recorded = json.loads((entry / RECORD).read_text())
    except FileNotFoundError:
        return "it is unfinished"
    except (OSError, ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        return "its record cannot be read"
    why = untrusted(entry / FILES)
    if why:
        return why
    try:
        found = _digests(entry / FILES)
    except (OSError, ValueError) as error:
        return str(error)
    if found != recorded:
        changed = {name for name in {*found, *recorded} if found.get(name) != recorded.get(name)}
        return f"{', '.join(sorted(changed))} is not as the engine left it"
    return "" if found else "it is empty"


def _digests(folder: Path) -> Record:
    """Size and SHA-256 of every file below a folder.

    Raises:
        ValueError: there is something else than files and folders of the user's own.
    """
    record: Record = {}
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is neither a file nor a folder")
        if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"{path} belongs to the user {found.st_uid}")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        record[path.relative_to(folder).as_posix()] = [found.st_size, digest]
    return record


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (row.st_size, row.st_mtime_ns) for name, row in found.items() if stat.S_ISREG(row.st_mode)}


def _seal(entry: Path, facts: Mapping[str, Any]) -> bool:
    """Record what the engine left; whether that is to be kept."""
    try:
        record = _digests(entry / FILES)
        if not record:
            return False  # an engine that kept nothing, for whatever reason of its own
        write_facts(entry, facts)
        partial = entry / f".{RECORD}.{os.getpid()}.{secrets.token_hex(4)}"
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(entry / RECORD)
    except (OSError, ValueError) as error:
        log.warning("the compiled model in %s cannot be kept: %s", entry, error)
        return False
    return True
