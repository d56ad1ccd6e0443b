"""Keep compiled models between runs, each in a folder of its own and checked before it is used.

Engines have caches too, but theirs do not notice that the weights changed, and a damaged entry loads and
computes NaN. Here the key holds everything the result depends on, and a SHA-256 lies beside each entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

BLOB = "model.blob"
CHECKSUM = "model.blob.sha256"
_PARTIAL_SUFFIX = ".partial"
_STALE_AFTER = 3600.0  # seconds; nobody writes an entry for an hour

log = logging.getLogger(__name__)


def cache_key(facts: Mapping[str, object]) -> str:
    """SHA-256 of what a compiled model depends on, as 64 hex digits; the order of ``facts`` is irrelevant."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class CompiledCache:
    """Entries under ``folder/<key>/``.

    A cache that cannot be read or written never stops a run: the model is compiled as if there were no
    cache, and a warning is logged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> bytes | None:
        """The bytes kept under a key, None if there are none; a damaged entry is removed."""
        entry = self._folder / key
        try:
            blob = (entry / BLOB).read_bytes()
            recorded = (entry / CHECKSUM).read_text(errors="replace").strip()
        except FileNotFoundError:
            if entry.exists():
                self.remove(key, "it is incomplete")
            return None
        except OSError as error:
            log.warning("the compiled model in %s cannot be read: %s", entry, error.strerror)
            return None
        if hashlib.sha256(blob).hexdigest() != recorded:
            self.remove(key, "its checksum is wrong")
            return None
        return blob

    def store(self, key: str, blob: bytes) -> bool:
        """Keep bytes under a key; whether that worked. Readers see the whole entry or none."""
        partial = self._folder / f".{key[:16]}.{os.getpid()}.{secrets.token_hex(4)}{_PARTIAL_SUFFIX}"
        try:
            partial.mkdir(parents=True)
            _write(partial / BLOB, blob)
            _write(partial / CHECKSUM, hashlib.sha256(blob).hexdigest().encode() + b"\n")
            os.rename(partial, self._folder / key)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (self._folder / key / CHECKSUM).exists():  # another process was faster; its entry is as good
                return True
            log.warning("the compiled model cannot be kept in %s: %s", self._folder, error.strerror)
            return False
        self._sweep()
        return True

    def remove(self, key: str, why: str) -> None:
        """Throw an entry away and say why."""
        log.warning("the compiled model in %s is thrown away and made again: %s", self._folder / key, why)
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for partial in self._folder.glob(f".*{_PARTIAL_SUFFIX}"):
            try:
                if time.time() - partial.stat().st_mtime > _STALE_AFTER:
                    shutil.rmtree(partial, ignore_errors=True)
            except OSError:
                continue


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
