"""The cache of compiled models, without an engine."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kiln.backends import compiled_cache
from kiln.backends.compiled_cache import CompiledCache, cache_key, compiling_for
from kiln.cache_store import entries, prune, read_facts

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


def test_entries_are_private(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "openvino")
    cache.store(KEY, b"compiled")
    assert (tmp_path / "openvino").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "openvino" / KEY).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "openvino" / KEY / "model.blob").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("which", ["entry", "folder", "link"])
def test_what_others_could_have_written_is_not_loaded(
    tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CompiledCache(tmp_path / "openvino")
    cache.store(KEY, b"compiled")
    entry = tmp_path / "openvino" / KEY
    if which == "link":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    else:
        (entry if which == "entry" else entry.parent).chmod(0o777)
    assert cache.load(KEY) is None
    assert "is thrown away and made again" in caplog.text
    assert cache.store(KEY, b"compiled")
    assert cache.load(KEY) == b"compiled"


def test_the_key_remembers_its_facts_and_the_entry_notes_them(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "openvino")
    key = cache_key({"component": "unet", "shapes": {"sample": (2, 4, 16, 16)}, "where": Path("a")})
    assert key == str(key)
    assert key.facts["component"] == "unet"
    with compiling_for("emoji"):
        cache.store(key, b"compiled")
    cache.store(KEY, b"compiled")  # a plain text is a key too
    facts = read_facts(tmp_path / "openvino" / key)
    assert (facts["bundle"], facts["backend"], facts["component"]) == ("emoji", "openvino", "unet")
    assert facts["shapes"] == {"sample": [2, 4, 16, 16]}
    assert read_facts(tmp_path / "openvino" / KEY)["bundle"] == ""


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledCache:
    """Below the cache's root, where its limit holds."""
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    return CompiledCache(tmp_path / "compiled/openvino")


def test_limit(inside: CompiledCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE_LIMIT", "3kB")
    for number in range(4):
        assert inside.store(cache_key({"n": number}), bytes(1000))
        assert inside.load(cache_key({"n": 0})) is not None  # the first is used all the time
        for entry in entries():
            if entry.facts["n"] != 0:
                os.utime(entry.path, (entry.facts["n"],) * 2)
    assert sorted(entry.facts["n"] for entry in entries()) == [0, 3]


def test_a_limit_of_nothing_keeps_nothing(inside: CompiledCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE_LIMIT", "0")
    assert not inside.store(KEY, b"compiled")
    assert entries() == []


def test_elsewhere_the_limit_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KILN_CACHE_LIMIT", "0")
    assert CompiledCache(tmp_path / "own").store(KEY, b"compiled")
    assert CompiledCache(tmp_path / "own").load(KEY) == b"compiled"


def test_an_entry_that_is_read_is_not_pruned_halfway(
    inside: CompiledCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = cache_key({"n": 1})
    inside.store(key, b"compiled")
    real = Path.read_bytes

    def reading(path: Path) -> bytes:
        assert prune(everything=True).in_use
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    assert inside.load(key) == b"compiled"


def test_an_entry_that_is_being_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, for the same bundle; a reader does not take it for absent."""
    cache, went = CompiledCache(tmp_path), threading.Event()
    real = compiled_cache.write_facts

    def slowly(folder: Path, facts: Mapping[str, Any]) -> None:
        assert went.wait(30)
        real(folder, facts)

    monkeypatch.setattr(compiled_cache, "write_facts", slowly)
    with compiling_for("mine"):
        cache.store_later(KEY, lambda: [b"com", b"piled"])
    assert not (tmp_path / KEY).exists()
    threading.Timer(0.2, went.set).start()
    assert cache.load(KEY) == b"compiled"
    assert read_facts(tmp_path / KEY)["bundle"] == "mine"
    cache.wait(KEY)  # nothing is left to wait for


def test_an_entry_that_cannot_be_written_in_another_thread_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = CompiledCache(tmp_path / "file")
    cache.store_later(KEY, lambda: [b"x"])
    cache.wait(KEY)
    assert "cannot be kept" in caplog.text

    def broken() -> list[bytes]:
        raise RuntimeError("no such\nformat")

    CompiledCache(tmp_path).store_later(KEY, broken)
    assert CompiledCache(tmp_path).load(KEY) is None
    assert "not kept: no such format" in caplog.text


def test_a_process_that_ends_at_once_can_wait_for_all(tmp_path: Path) -> None:
    went = threading.Event()

    def slowly() -> list[bytes]:
        assert went.wait(30)
        return [b"x"]

    CompiledCache(tmp_path).store_later(KEY, slowly)
    assert not (tmp_path / KEY).exists()
    threading.Timer(0.2, went.set).start()
    compiled_cache.wait_for_writers()
    assert (tmp_path / KEY).is_dir()
