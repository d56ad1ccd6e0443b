"""Keep compiled models between runs, each in a folder of its own and checked before it is used.

Engines have caches too, but theirs do not notice that the weights changed, and a damaged entry loads and
computes NaN. Here the key holds everything the result depends on, and a SHA-256 lies beside each entry.

What an engine compiled is code. The checksum tells damage, not malice: who can write here can write a
checksum too. So the folders are closed to other users (0700), and what another user owns or could have
written is not loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, Self

from ..cache import cache_root, keeps_nothing, private_folder, untrusted
from ..cache_locks import claim
from ..cache_store import discard, enforce_limit, write_facts
from .engine_folder import EngineFolder, engine_folder
from .errors_map import one_line

BLOB = "model.blob"
CHECKSUM = "model.blob.sha256"
PARTIAL_SUFFIX = ".partial"
_STALE_AFTER = 3600.0  # seconds; nobody writes an entry for an hour

log = logging.getLogger(__name__)

# What this process is writing in threads of their own, by the folder of the entry. They are no daemons, so
# that a process does not end before they have.
_writers: dict[Path, threading.Thread] = {}

# For whom something is compiled: not in the key, only in what ``kiln cache list`` says.
_owner: ContextVar[str] = ContextVar("_owner", default="")


def wait_for_writers() -> None:
    """Wait for all that ``store_later`` was asked for: for a process that ends by ``os._exit``."""
    for writer in list(_writers.values()):
        writer.join()


class CacheKey(str):
    """A key that remembers what it is the digest of."""

    facts: Mapping[str, object]

    def __new__(cls, digest: str, facts: Mapping[str, object]) -> Self:
        """Attach the facts."""
        key = super().__new__(cls, digest)
        key.facts = facts
        return key


def cache_key(facts: Mapping[str, object]) -> CacheKey:
    """SHA-256 of what a compiled model depends on, as 64 hex digits; the order of ``facts`` is irrelevant."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return CacheKey(hashlib.sha256(text.encode()).hexdigest(), facts)


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Note ``name``, the bundle's, with what is compiled inside."""
    token = _owner.set(name)
    try:
        yield
    finally:
        _owner.reset(token)


class CompiledCache:
    """Entries under ``folder/<key>/``; the folder's name is the backend's.

    A cache that cannot be read or written never stops a run: the model is compiled as if there were no
    cache, and a warning is logged. Below ``cache.cache_root()`` the limit of the cache holds; elsewhere the
    caller sees to the size.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> bytes | None:
        """The bytes kept under a key, None if there are none; a damaged entry is removed."""
        entry = self._folder / key
        self.wait(key)
        held = claim(entry)
        if held is None:
            return None
        with held:
            why = untrusted(self._folder) or untrusted(entry)
            if why:
                self.remove(key, why)
                return None
            try:
                blob = (entry / BLOB).read_bytes()
                recorded = (entry / CHECKSUM).read_text(errors="replace").strip()
            except FileNotFoundError:
                self.remove(key, "it is incomplete")
                return None
            except OSError as error:
                log.warning("the compiled model in %s cannot be read: %s", entry, error.strerror)
                return None
            if hashlib.sha256(blob).hexdigest() != recorded:
                self.remove(key, "its checksum is wrong")
                return None
            held.touch()
            return blob

    def store_later(self, key: str, parts: Callable[[], Iterable[bytes]]) -> None:
        """``store`` what a function gives, in another thread: an image need not wait for that.

        A function that raises is logged, as a cache that cannot be written is.
        """

        def write() -> None:
            try:
                given = list(parts())
            except Exception as error:  # of the engine, which has its own
                log.warning("the compiled model is not kept: %s", one_line(error))
            else:
                self.store(key, *given)

        context = copy_context()  # with the name of whom it is compiled for
        writer = threading.Thread(target=context.run, args=(write,), name="kiln-cache")
        _writers[self._folder / key] = writer
        writer.start()

    def wait(self, key: str) -> None:
        """Wait until what ``store_later`` was asked for under this key is done."""
        writer = _writers.get(self._folder / key)
        if writer is not None:
            writer.join()
            _writers.pop(self._folder / key, None)

    def store(self, key: str, *parts: bytes) -> bool:
        """Keep bytes under a key; whether that worked. Readers see the whole entry or none.

        Args:
            key: of ``cache_key``.
            parts: what is kept, one after the other.
        """
        if self._is_ours() and keeps_nothing():
            return False
        partial = self._folder / f".{key[:16]}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
        try:
            private_folder(self._folder)
            why = untrusted(self._folder)
            if why:
                log.warning("the compiled model is not kept: %s", why)
                return False
            partial.mkdir(mode=0o700)
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            _write(partial / BLOB, *parts)
            _write(partial / CHECKSUM, digest.hexdigest().encode() + b"\n")
            write_facts(partial, self._facts(key))
            os.rename(partial, self._folder / key)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (self._folder / key / CHECKSUM).exists():  # another process was faster; its entry is as good
                return True
            log.warning("the compiled model cannot be kept in %s: %s", self._folder, error.strerror)
            return False
        self._sweep()
        if self._is_ours():
            enforce_limit()
        return True

    def engine_folder(self, key: str) -> AbstractContextManager[EngineFolder]:
        """A folder for the files of an engine that keeps its own; see ``engine_folder.engine_folder``."""
        return engine_folder(self._folder, key, self._facts(key), limited=self._is_ours())

    def remove(self, key: str, why: str) -> None:
        """Throw an entry away and say why."""
        log.warning("the compiled model in %s is thrown away and made again: %s", self._folder / key, why)
        discard(self._folder / key)

    def _is_ours(self) -> bool:
        return self._folder.is_relative_to(cache_root())

    def _facts(self, key: str) -> dict[str, Any]:
        """What is noted beside an entry."""
        known = dict(key.facts) if isinstance(key, CacheKey) else {}
        return {"bundle": _owner.get(), "backend": self._folder.name, "made": time.time(), **known}

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for partial in self._folder.glob(f".*{PARTIAL_SUFFIX}"):
            try:
                if time.time() - partial.stat().st_mtime > _STALE_AFTER:
                    shutil.rmtree(partial, ignore_errors=True)
            except OSError:
                continue


def _write(path: Path, *parts: bytes) -> None:
    with path.open("xb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.writelines(parts)
        stream.flush()
        os.fsync(stream.fileno())
