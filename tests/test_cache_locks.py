"""Claims on entries of the cache: who waits for whom, and processes that are killed in the middle."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kiln import cache_locks, cache_store
from kiln.cache_locks import LOCK_NAME, claim


@pytest.fixture
def entry(own_cache: Path) -> Path:
    """A bundle in the cache, with its lock."""
    folder = own_cache / "bundles" / "1".ljust(24, "a")
    folder.mkdir(parents=True)
    (folder / "model.blob").write_bytes(b"x")
    (folder / LOCK_NAME).touch()
    return folder


def test_claims_exclude_each_other(entry: Path) -> None:
    first, second = claim(entry), claim(entry)
    assert first
    assert second
    assert claim(entry, exclusive=True, wait=False) is None
    first.release()
    second.release()
    second.release()
    with claim(entry, exclusive=True, wait=False) or pytest.fail("no claim"):
        assert claim(entry, wait=False) is None
    assert claim(entry.parent / "nothing") is None


def test_a_claim_on_what_was_removed_meanwhile_fails(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock and locking it, another process removes the entry."""
    real = cache_locks._lock

    def slow(descriptor: int, path: Path, *, exclusive: bool, wait: bool) -> bool:
        cache_store.discard(path)
        return real(descriptor, path, exclusive=exclusive, wait=wait)

    monkeypatch.setattr(cache_locks, "_lock", slow)
    assert claim(entry) is None


def test_a_killed_user_frees_its_entry(entry: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kiln.cache_locks import claim\n"
        "held = claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    user = subprocess.Popen([sys.executable, "-c", code, str(entry)], stdout=subprocess.PIPE)
    assert user.stdout is not None
    assert user.stdout.readline() == b"held\n"
    assert not cache_store.remove(entry)
    user.send_signal(signal.SIGKILL)
    user.wait()
    user.stdout.close()
    assert cache_store.remove(entry)
    assert not entry.exists()


WORKER = """
import random, sys
from pathlib import Path
from kiln.backends.compiled_cache import CompiledCache
from kiln.cache import cache_folder
from kiln.cache_store import prune
import logging
logging.disable(logging.WARNING)
rng = random.Random(int(sys.argv[1]))
cache = CompiledCache(cache_folder("compiled") / "fake")
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    number = rng.randrange(6)
    content = bytes([number]) * (1000 + number)
    if rng.random() < 0.5:
        key = f"b{number}".rjust(64, "0")
        blob = cache.load(key)
        assert blob in (None, content), "a wrong blob"
        if blob is None:
            cache.store(key, content)
    else:
        key = f"e{number}".rjust(64, "0")
        with cache.engine_folder(key) as folder:
            found = {p.name: p.read_bytes() for p in folder.path.iterdir()}
            assert found == ({"engine": content} if folder.ready else {}), found
            if not folder.ready:
                with open(folder.path / "engine", "wb") as stream:
                    for part in (content[:500], content[500:]):
                        stream.write(part)
                        stream.flush()
    if rng.random() < 0.3:
        prune(limit=rng.choice((0, 3000, 6000)))
"""


def test_processes_that_store_load_and_prune_at_once_and_are_killed(own_cache: Path) -> None:
    """Nobody ever sees half an entry or another one's bytes, and nothing raises."""
    rng = random.Random(1)

    def start(seed: int, rounds: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WORKER, str(seed), str(rounds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    steady = [start(seed, 120) for seed in range(3)]
    for seed in range(10, 16):
        victim = start(seed, 10_000)
        assert victim.stdout is not None
        victim.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.15))
        victim.kill()
        _, errors = victim.communicate()
        assert errors == b""
    for worker in steady:
        _, errors = worker.communicate(timeout=120)
        assert (worker.returncode, errors) == (0, b"")
    cache_store.prune(everything=True)
    assert cache_store.entries() == []
