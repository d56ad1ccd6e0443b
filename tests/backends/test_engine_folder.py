"""Folders for engines that write their own cache files, with an engine made of a few bytes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kiln.backends import engine_folder as module
from kiln.backends.compiled_cache import CompiledCache, cache_key, compiling_for
from kiln.cache_store import entries, read_facts

KEY = "k" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledCache:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    monkeypatch.delenv("KILN_CACHE_LIMIT", raising=False)
    return CompiledCache(tmp_path / "compiled/engine")


def use(cache: CompiledCache, key: str = KEY, content: bytes = b"compiled") -> bool:
    """As an engine does: read what is ready, else build; whether it was ready."""
    with cache.engine_folder(key) as folder:
        file = folder.path / "sub/net.engine"
        if folder.ready:
            assert file.read_bytes() == content
        else:
            assert list(folder.path.iterdir()) == []
            file.parent.mkdir()
            file.write_bytes(content)
        return folder.ready


def entry_of(cache: CompiledCache, key: str = KEY) -> Path:
    return cache._folder / key


def test_second_time_ready(cache: CompiledCache) -> None:
    assert [use(cache), use(cache), use(cache)] == [False, True, True]
    assert not use(cache, "other" * 10, b"other")
    for folder in (entry_of(cache), entry_of(cache) / "engine"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_facts_are_noted(cache: CompiledCache) -> None:
    key = cache_key({"component": "unet", "engine": "10.16"})
    with compiling_for("emoji"):
        use(cache, key)
    assert (
        read_facts(entry_of(cache, key)).items()
        >= {
            "bundle": "emoji",
            "backend": "engine",
            "component": "unet",
            "engine": "10.16",
        }.items()
    )


def flip(entry: Path) -> None:
    file = entry / "engine/sub/net.engine"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda entry: os.truncate(entry / "engine/sub/net.engine", 3),
    "missing": lambda entry: (entry / "engine/sub/net.engine").unlink(),
    "added": lambda entry: (entry / "engine/planted.engine").write_bytes(b"x"),
    "renamed": lambda entry: (entry / "engine/sub/net.engine").rename(entry / "engine/sub/net2.engine"),
    "link": lambda entry: (entry / "engine/link").symlink_to("/etc/passwd"),
    "no record": lambda entry: (entry / "engine.json").unlink(),
    "bad record": lambda entry: (entry / "engine.json").write_text("{"),
    "other record": lambda entry: (entry / "engine.json").write_text('["sub/net.engine"]'),
    "open to others": lambda entry: (entry / "engine").chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_folder_is_thrown_away(
    cache: CompiledCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    use(cache)
    DAMAGES[damage](entry_of(cache))
    with caplog.at_level(logging.WARNING):
        assert not use(cache)
    assert "is thrown away and made again" in caplog.text
    assert use(cache)


def test_what_the_engine_adds_later_is_kept(cache: CompiledCache) -> None:
    use(cache)
    with cache.engine_folder(KEY) as folder:
        assert folder.ready
        (folder.path / "another-shape.engine").write_bytes(b"more")
    with cache.engine_folder(KEY) as folder:
        assert folder.ready
        assert (folder.path / "another-shape.engine").read_bytes() == b"more"


def test_a_failed_build_leaves_nothing(cache: CompiledCache) -> None:
    def fail() -> None:
        with cache.engine_folder(KEY) as folder:
            (folder.path / "half").write_bytes(b"x")
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        fail()
    assert not entry_of(cache).exists()
    assert not use(cache)


def test_an_engine_that_keeps_nothing(cache: CompiledCache) -> None:
    for _ in range(2):
        with cache.engine_folder(KEY) as folder:
            assert not folder.ready
    assert not entry_of(cache).exists()


def test_failing_while_ready_keeps_the_files(cache: CompiledCache) -> None:
    use(cache)
    with pytest.raises(ValueError, match="later"), cache.engine_folder(KEY):
        raise ValueError("later")
    assert use(cache)


def test_a_killed_build_is_not_used(cache: CompiledCache, caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from kiln.backends.compiled_cache import CompiledCache\n"
        "with CompiledCache(Path(sys.argv[1])).engine_folder(sys.argv[2]) as folder:\n"
        "    (folder.path / 'half').write_bytes(b'x')\n"
        "    print('building', flush=True); time.sleep(60)\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, str(cache._folder), KEY], stdout=subprocess.PIPE)
    assert builder.stdout is not None
    assert builder.stdout.readline() == b"building\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    builder.stdout.close()
    with caplog.at_level(logging.WARNING):
        assert not use(cache)
    assert "it is unfinished" in caplog.text
    assert use(cache)


def test_one_builds_and_the_others_wait(cache: CompiledCache) -> None:
    ready: list[bool] = []
    threads = [threading.Thread(target=lambda: ready.append(use(cache))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ready) == [False] + [True] * 5


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = CompiledCache(tmp_path / "file/engine")
    with caplog.at_level(logging.WARNING):
        with cache.engine_folder(KEY) as folder:
            assert not folder.ready
            assert folder.path.is_dir()
            assert not folder.path.is_relative_to(tmp_path)
        assert not folder.path.exists()
    assert "cannot be kept" in caplog.text


def test_a_folder_of_somebody_else_is_not_used(
    cache: CompiledCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(cache)
    monkeypatch.setattr(module, "untrusted", lambda path: f"{path} belongs to the user 7, not to 1")
    with caplog.at_level(logging.WARNING), cache.engine_folder(KEY) as folder:
        assert not folder.ready
        assert not folder.path.is_relative_to(cache._folder)
    assert "belongs to the user 7" in caplog.text


def test_limits(cache: CompiledCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE_LIMIT", "0")
    assert [use(cache), use(cache)] == [False, False]
    assert entries() == []
    monkeypatch.setenv("KILN_CACHE_LIMIT", "3kB")
    for number in range(4):
        use(cache, f"{number}".rjust(64, "0"), bytes(1000))
        os.utime(entry_of(cache, f"{number}".rjust(64, "0")) / "in-use.lock", (number, number))
    assert [entry.path.name[-1] for entry in entries()] == ["2", "3"]
