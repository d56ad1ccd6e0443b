"""Say that an entry of the cache is in use, so that no process removes it meanwhile.

A claim is a lock on the file ``in-use.lock`` inside the entry's folder: shared by all who read the entry,
exclusive for who makes or removes it. The kernel gives it up when its process ends, however it ends.

NOTE: ``fcntl.flock`` and not filelock, which has no shared lock but one built on SQLite. Where a file system
has no locks at all, entries can be read and made, and are never removed to make room.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_NAME = "in-use.lock"

log = logging.getLogger(__name__)


class Claim:
    """A claim on an entry; ends with ``release``, with the block, or with the process."""

    def __init__(self, descriptor: int | None, *, exclusive: bool) -> None:
        self._descriptor = descriptor
        self.exclusive = exclusive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def touch(self) -> None:
        """Note that the entry was used now; the oldest entries are removed first."""
        if self._descriptor is not None:
            try:
                os.utime(self._descriptor)
            except OSError as error:  # a cache that is mounted read-only
                log.debug("the use of a cache entry cannot be noted: %s", error)

    def release(self) -> None:
        """Give the claim up; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def claim(entry: Path, *, exclusive: bool = False, wait: bool = True) -> Claim | None:
    """Claim the folder of an entry.

    Args:
        entry: the folder.
        exclusive: for making or removing it; otherwise for reading.
        wait: until whoever holds an excluding claim gives it up.

    Returns:
        None when the folder is not there (any more), or is claimed by others and ``wait`` is false, or,
        for an exclusive claim, cannot be locked at all.
    """
    while True:
        try:
            descriptor = _open(entry / LOCK_NAME)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            # Nothing can be written here, so nothing can be removed either.
            return None if exclusive or not entry.is_dir() else Claim(None, exclusive=False)
        if not _lock(descriptor, entry, exclusive=exclusive, wait=wait):
            os.close(descriptor)
            return None
        if _is_still_there(descriptor, entry / LOCK_NAME):
            return Claim(descriptor, exclusive=exclusive)
        os.close(descriptor)  # removed, or made anew, between opening and locking


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def _lock(descriptor: int, entry: Path, *, exclusive: bool, wait: bool) -> bool:
    """Whether the claim may be used: it is locked, or is shared on a file system without locks."""
    try:
        import fcntl
    except ImportError:
        return True
    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        log.info("waiting for another process that makes or removes %s", entry)
        fcntl.flock(descriptor, how)
    except OSError as error:
        log.debug("%s cannot be locked: %s", entry, error)
        return not exclusive
    return True


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
