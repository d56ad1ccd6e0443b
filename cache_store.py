"""List what is cached, remove some of it, and keep all of it below the limit, least recently used first.

Entries are ``<kind>/<entry>``, and ``compiled/<backend>/<entry>`` for what engines compiled. Only what bears
a digest in its name, as all that Kiln writes here does, is an entry: other files in the same folders are
left alone, and links are never followed. Several processes may do all of this at once and be killed at any
moment: an entry is renamed out of the way before it is deleted, and only while nobody has claimed it
(``cache_locks``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import KINDS, cache_limit, cache_root, format_size
from .cache_locks import LOCK_NAME, claim
from .errors import KilnError

FACTS = "facts.json"
MANIFEST = "kiln.json"  # what bundle.py writes; it imports this room, so the name is said again
TRASH_SUFFIX = ".trash"
_NAME = re.compile(r"(?:.*[^0-9a-f])?[0-9a-f]{12,64}(?:[^0-9a-f].*)?")
_UNFINISHED = re.compile(r"\..*\.(?:partial|old|trash)")
_STAMPS = "stamps.json"
# Seconds after which nobody can still be writing: an export of a large model takes minutes.
_ABANDONED_AFTER_S = 86400.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One thing that is cached.

    ``last_used`` is in seconds since 1970, ``facts`` what was noted when it was made.
    """

    kind: str
    path: Path
    size_bytes: int
    last_used: float
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Pruned:
    """What was removed (or would be), what was wanted removed but is in use, and the bytes that are left."""

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    left_bytes: int

    @property
    def freed_bytes(self) -> int:
        """Bytes of what was removed."""
        return sum(entry.size_bytes for entry in self.removed)


def entries(kinds: Collection[str] = KINDS, root: Path | None = None) -> list[Entry]:
    """All entries of these kinds, least recently used first; one that vanishes meanwhile is left out.

    Args:
        kinds: some of ``cache.KINDS``.
        root: the cache's folder, by default the one in force.
    """
    root = cache_root() if root is None else root
    found = []
    for kind in kinds:
        for path in _paths(kind, root / kind):
            with contextlib.suppress(FileNotFoundError):
                found.append(Entry(kind, path, _size(path), _last_used(path), read_facts(path)))
    return sorted(found, key=lambda entry: (entry.last_used, str(entry.path)))


def prune(
    kinds: Collection[str] = KINDS,
    *,
    limit: int | None = None,
    older_than: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
    root: Path | None = None,
) -> Pruned:
    """Remove entries that are not in use.

    Args:
        kinds: which kinds to look at.
        limit: then remove the least recently used until the rest has at most so many bytes; None for all.
        older_than: remove what was last used more than so many seconds ago.
        everything: remove all.
        dry_run: remove nothing and say what would be removed.
        root: the cache's folder, by default the one in force.
    """
    root = cache_root() if root is None else root
    found, now = entries(kinds, root), time.time()
    left = sum(entry.size_bytes for entry in found)
    removed: list[Entry] = []
    in_use: list[Entry] = []
    for entry in found:
        aged = older_than is not None and now - entry.last_used > older_than
        if not (everything or aged or (limit is not None and left > limit)):
            continue
        gone = not is_in_use(entry.path) if dry_run else remove(entry.path)
        (removed if gone else in_use).append(entry)
        left -= entry.size_bytes if gone else 0
    if not dry_run:
        sweep(kinds, root)
    return Pruned(tuple(removed), tuple(in_use), left)


def enforce_limit() -> None:
    """Keep the cache below its limit; called after something was added. Never stops a run."""
    try:
        held = sum(entry.size_bytes for entry in entries())
        limit = cache_limit(held)
        if limit is None or held <= limit:
            return
        done = prune(limit=limit)
    except (OSError, KilnError) as error:
        log.warning("the cache cannot be kept below its limit: %s", error)
        return
    for entry in done.removed:
        log.info("removed from the cache to make room: %s", entry.path)
    if done.left_bytes > limit > 0:
        log.warning(
            "the cache holds %s in use, more than its limit of %s; set KILN_CACHE_LIMIT",
            format_size(done.left_bytes),
            format_size(limit),
        )


def remove(path: Path) -> bool:
    """Remove an entry unless a process uses it; whether it is gone, by whomever."""
    if _is_folder(path):
        held = claim(path, exclusive=True, wait=False)
        if held is None:
            return not path.exists()
        with held:
            discard(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)


def discard(path: Path) -> None:
    """Remove a folder at once for all who look for it, used or not; a kill in between leaves only trash."""
    trash = path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}{TRASH_SUFFIX}")
    try:
        path.rename(trash)
    except OSError as error:
        if path.exists():
            log.warning("%s cannot be removed: %s", path, error.strerror)
        return
    if trash.is_symlink():
        trash.unlink(missing_ok=True)
    shutil.rmtree(trash, ignore_errors=True)


def is_in_use(path: Path) -> bool:
    """Whether a process has claimed an entry; nothing is written for asking."""
    if not (path / LOCK_NAME).exists():
        return False
    held = claim(path, exclusive=True, wait=False)
    if held is None:
        return path.exists()
    held.release()
    return False


def sweep(kinds: Collection[str] = KINDS, root: Path | None = None) -> None:
    """Remove what killed processes left: all trash, and half-made entries that nobody makes any more."""
    root = cache_root() if root is None else root
    for kind in kinds:
        for folder in _folders(kind, root / kind):
            for found in _scan(folder):
                if not _UNFINISHED.fullmatch(found.name) or found.is_symlink():
                    continue
                with contextlib.suppress(OSError):
                    old = time.time() - found.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S
                    if old or found.name.endswith(TRASH_SUFFIX):
                        _delete(found)


def write_facts(entry: Path, facts: Mapping[str, Any]) -> None:
    """Note what an entry is; ``kiln cache list`` shows it. Values that JSON lacks become texts."""
    partial = entry / f".{FACTS}.{os.getpid()}.{secrets.token_hex(4)}"
    partial.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(entry / FACTS)


def read_facts(path: Path) -> dict[str, Any]:
    """What was noted of an entry, of a bundle its manifest; empty if there is nothing to be read."""
    if _is_folder(path):
        file = path / (MANIFEST if (path / MANIFEST).is_file() else FACTS)
    elif path.suffix == ".json" and path.name != _STAMPS:
        file = path
    else:
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _paths(kind: str, folder: Path) -> Iterator[Path]:
    for inner in _folders(kind, folder):
        for found in _scan(inner):
            named = _NAME.fullmatch(found.name) or (kind == "verified" and found.name == _STAMPS)
            if named and not found.name.startswith(".") and not found.name.endswith(".lock"):
                if found.is_symlink():
                    log.warning("%s is a link and not followed", found.path)
                    continue
                yield Path(found.path)


def _folders(kind: str, folder: Path) -> list[Path]:
    """The folders whose children are entries; none where a link leads elsewhere."""
    if not _is_folder(folder):
        return []
    if kind != "compiled":
        return [folder]
    return [Path(found.path) for found in _scan(folder) if found.is_dir(follow_symlinks=False)]


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as rows:
            return sorted(rows, key=lambda row: row.name)
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    """Whether it is a folder and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _size(path: Path) -> int:
    """Bytes of the files below, without following links."""
    total = path.lstat().st_size if not _is_folder(path) else 0
    for parent, _, files in os.walk(path):  # does not follow links, and yields nothing for a file
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _last_used(path: Path) -> float:
    """The time of the last claim; of a plain file, and of a folder that nobody claimed, the last reading."""
    with contextlib.suppress(OSError):
        return (path / LOCK_NAME).lstat().st_mtime
    found = path.lstat()
    return max(found.st_mtime, 0 if _is_folder(path) else found.st_atime)


def _delete(found: os.DirEntry[str]) -> None:
    if found.is_dir(follow_symlinks=False):
        shutil.rmtree(found.path, ignore_errors=True)
    else:
        os.unlink(found.path)
