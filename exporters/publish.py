"""Write a folder or a file beside its final name and rename it: a reader sees all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ..errors import StorageError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the disk or a limit allows",
    errno.EROFS: "the disk is read-only",
}
# In the names of unfinished folders: a process number means something on one machine only.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_STALE = re.compile(rf"\.(?P<target>.+)\.{_HOST}\.(?P<pid>\d+)\.[0-9a-f]{{8}}\.(?P<kind>partial|old)")


@contextlib.contextmanager
def published(
    target: Path, *, overwrite: bool = False, marker: str = "kiln.json", kind: str = "bundle"
) -> Iterator[Path]:
    """Give an empty folder on the same file system that becomes ``target`` when the block ends well.

    When the block fails, whatever the reason, SIGTERM included, nothing is left behind. A folder is only
    replaced if it holds ``marker``, which shows that it is a ``kind`` and nothing of the user's own.

    Raises:
        StorageError: ``target`` exists (and may not be replaced), or the disk refused.
    """
    target = Path(os.path.abspath(target))  # "." has no name to put another beside
    _check_replaceable(target, overwrite, marker, kind)
    with _beside(target) as partial:
        yield partial
        _sync(partial)
        _replace(partial, target)


@contextlib.contextmanager
def published_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path on the same file system; the file written there becomes ``target`` when the block ends
    well.

    Raises:
        StorageError: ``target`` exists (and may not be replaced) or is a folder, or the disk refused.
    """
    target = Path(os.path.abspath(target))
    check_free(target, overwrite=overwrite)
    with _beside(target) as partial:
        yield partial / target.name
        _sync(partial)
        check_free(target, overwrite=overwrite)  # another may have come while this one was made
        (partial / target.name).replace(target)


def check_free(target: Path, *, overwrite: bool = False) -> None:
    """Raise a StorageError when a file cannot become ``target``, before work is spent on it."""
    if target.is_dir():
        raise StorageError(f"{target} is a folder; expected the name of a file to write")
    if not overwrite and (target.exists() or target.is_symlink()):
        raise StorageError(f"{target} exists; choose another name, or replace it with --overwrite")


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, removed in the end if it is still there."""
    partial = target.with_name(f".{target.name}.{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _terminated_as_exception():
            target.parent.mkdir(parents=True, exist_ok=True)
            _clear_stale(target.parent)
            partial.mkdir()
            yield partial
    except OSError as exc:
        why = _REASONS.get(exc.errno or 0) or (exc.strerror or str(exc)).lower()
        raise StorageError(
            f"cannot write {target}: {why}; free some space or choose another folder with -o"
        ) from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool, marker: str, kind: str) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if not overwrite:
        raise StorageError(f"{target} exists; choose another name, or replace it with --overwrite")
    if target.is_symlink() or not (target / marker).is_file():
        raise StorageError(
            f"{target} exists and is not a {kind}; Kiln only overwrites {kind}s. Choose another name"
        )


def _clear_stale(folder: Path) -> None:
    """Remove what killed processes of this machine left behind; what runs elsewhere is not touched."""
    for path in folder.glob(f".*.{_HOST}.*"):
        match = _STALE.fullmatch(path.name)
        if match is None or _runs(int(match["pid"])):
            continue
        target = path.with_name(match["target"])
        if match["kind"] == "old" and not target.exists():
            # Killed between the two renames: the bundle that was there is whole.
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _replace(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:  # SIGTERM too
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Reach the disk before the rename does, the manifest's folder last."""
    for path in [*sorted(folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the partial folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
