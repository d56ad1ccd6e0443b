"""The cache of compiled models, without an engine."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from kiln.backends import compiled_cache
from kiln.backends.compiled_cache import CompiledCache, cache_key

KEY = "k" * 64


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "a/b")
    assert cache.load(KEY) is None
    assert cache.store(KEY, b"compiled")
    assert cache.load(KEY) == b"compiled"
    assert cache.load("other") is None
    assert names(tmp_path / "a/b") == [KEY]
    assert cache.store(KEY, b"again")  # an entry that is there stays
    assert cache.load(KEY) == b"compiled"
    assert names(tmp_path / "a/b") == [KEY]


@pytest.mark.parametrize("position", range(8))
def test_every_flipped_byte_is_found(tmp_path: Path, position: int) -> None:
    cache = CompiledCache(tmp_path)
    cache.store(KEY, b"compiled")
    blob = tmp_path / KEY / "model.blob"
    data = bytearray(blob.read_bytes())
    data[position] ^= 0x40
    blob.write_bytes(data)
    assert cache.load(KEY) is None
    assert names(tmp_path) == []


def test_key_depends_on_every_fact_and_not_on_order() -> None:
    facts = {"digest": "a", "shapes": {"sample": [1, 2]}, "threads": 1}
    assert cache_key(facts) == cache_key(dict(reversed(facts.items())))
    for change in ({"digest": "b"}, {"shapes": {"sample": [2, 1]}}, {"threads": "1"}, {"more": None}):
        assert cache_key({**facts, **change}) != cache_key(facts)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not CompiledCache(tmp_path).store(KEY, b"compiled")
    assert names(tmp_path) == []
    assert "No space left on device" in caplog.text


def test_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = CompiledCache(tmp_path / "file")
    assert not cache.store(KEY, b"compiled")
    assert cache.load(KEY) is None
    assert "cannot be kept" in caplog.text


def test_many_writers(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=CompiledCache(tmp_path).store, args=(KEY, b"x" * 9999)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CompiledCache(tmp_path).load(KEY) == b"x" * 9999
    assert names(tmp_path) == [KEY]


def test_leftovers_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompiledCache(tmp_path)
    for name in (".old.1.aa.partial", ".new.2.bb.partial"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".old.1.aa.partial", (0, 0))
    cache.store(KEY, b"compiled")
    assert names(tmp_path) == [".new.2.bb.partial", KEY]
    monkeypatch.setattr(compiled_cache, "_STALE_AFTER", -1.0)
    cache.store("other", b"compiled")
    assert names(tmp_path) == [KEY, "other"]
