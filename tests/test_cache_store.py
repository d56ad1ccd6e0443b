"""The cache as a whole: where it may lie, what is in it, what goes first, and what is never touched."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln import cache, cache_store
from kiln.cache_locks import LOCK_NAME, claim
from kiln.errors import UsageError

MB = 1_000_000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KILN_CACHE", str(folder))
    monkeypatch.delenv("KILN_CACHE_LIMIT", raising=False)
    return folder


def digest(number: int) -> str:
    return f"{number:x}".ljust(64, "a")


def make(root: Path, where: str, size: int, age_s: float, **facts: object) -> Path:
    """A folder of a cached thing, last used ``age_s`` seconds ago."""
    entry = root / where
    entry.mkdir(parents=True)
    (entry / "model.blob").write_bytes(b"x" * size)
    (entry / LOCK_NAME).touch()
    if facts:
        cache_store.write_facts(entry, facts)
    os.utime(entry / LOCK_NAME, (time.time() - age_s,) * 2)
    return entry


def names(found: list[cache_store.Entry] | tuple[cache_store.Entry, ...]) -> list[str]:
    return [entry.path.name for entry in found]


@pytest.mark.parametrize("place", ["/", "~", "home's parent", "link to home"])
def test_a_root_among_other_things_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home/me"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    places = {"/": "/", "~": str(home), "home's parent": str(home.parent), "link to home": tmp_path / "link"}
    monkeypatch.setenv("KILN_CACHE", str(places[place]))
    with pytest.raises(UsageError, match="set it to a folder of its own"):
        cache.cache_folder("compiled")
    monkeypatch.setenv("KILN_CACHE", str(home / ".cache/kiln"))
    assert cache.cache_folder("compiled") == home / ".cache/kiln/compiled"


@pytest.mark.parametrize(
    ("text", "size"),
    [("10GB", 10**10), ("10g", 10**10), ("1.5 GiB", 3 << 29), ("500MB", 5 * 10**8), ("0", 0), ("None", None)],
)
def test_sizes(text: str, size: int | None) -> None:
    assert cache.parse_size(text) == size


@pytest.mark.parametrize("text", ["10", "", "GB", "-1GB", "10 bytes", "1e3MB", "nothing"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no size; expected for example 10GB"):
        cache.parse_size(text)


def test_ages() -> None:
    assert [cache.parse_age(text) for text in ("30d", "12h", "2w", "45m")] == [2592000, 43200, 1209600, 2700]
    with pytest.raises(UsageError, match="is no age"):
        cache.parse_age("30")


def test_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100 << 30})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    assert cache.cache_limit(0) == 20 << 30
    usage.free = 10 << 30
    assert cache.cache_limit(2 << 30) == 6 << 30  # a small disk: half of what is free or Kiln's
    for text, expected in (("3GB", 3 * 10**9), ("none", None), ("0", 0)):
        monkeypatch.setenv("KILN_CACHE_LIMIT", text)
        assert cache.cache_limit(0) == expected
        assert cache.keeps_nothing() == (text == "0")
    monkeypatch.setenv("KILN_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="KILN_CACHE_LIMIT: 'much' is no size"):
        cache.cache_limit(0)


def test_folders_are_private_and_tagged(root: Path) -> None:
    (root / "compiled").mkdir(parents=True, mode=0o777)
    (root / "compiled").chmod(0o777)
    cache.private_folder(root / "compiled/engine")
    for folder in (root / "compiled", root / "compiled/engine"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_untrusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.private_folder(tmp_path / "mine")
    assert cache.untrusted(folder) == ""
    folder.chmod(0o770)
    assert "others may write" in cache.untrusted(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    assert "is a link" in cache.untrusted(tmp_path / "link")
    assert "cannot be read" in cache.untrusted(tmp_path / "nothing")
    if folder.stat().st_uid != 0:  # what root wrote is trusted by all
        monkeypatch.setattr(cache, "_user", lambda: 12345678)
        assert "belongs to the user" in cache.untrusted(folder)


def test_what_another_user_owns_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    folder = cache.private_folder(tmp_path / "theirs")
    os.chown(folder, 12345, 12345)
    assert "belongs to the user 12345" in cache.untrusted(folder)


def test_entries_of_all_kinds(root: Path) -> None:
    make(root, f"compiled/openvino/{digest(1)}", 10, 50, component="unet")
    make(root, f"bundles/{digest(2)[:24]}", 20, 40)
    (root / "graphs").mkdir()
    (root / "graphs/unet-8999421c5919e034.onnx.xz").write_bytes(b"12345")
    (root / "verified").mkdir()
    (root / "verified/stamps.json").write_text("[]")
    found = cache_store.entries()
    assert [entry.kind for entry in found][:2] == ["compiled", "bundles"]
    assert {entry.kind for entry in found} == {"compiled", "bundles", "graphs", "verified"}
    assert found[0].facts == {"component": "unet"}
    assert found[1].size_bytes == 20
    assert [entry.size_bytes for entry in cache_store.entries(("graphs",))] == [5]


def test_only_what_kiln_wrote_is_an_entry(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever points KILN_CACHE at a folder with a ``bundles`` of their own loses nothing."""
    outside = make(tmp_path, digest(9), 10, 1e9)
    mine = make(root, "bundles/my-favourite-model", 10, 1e9)
    (root / "bundles" / digest(3)).symlink_to(outside)
    (root / "compiled").symlink_to(tmp_path)
    (root / "bundles" / f"{digest(4)}.lock").touch()
    (root / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        done = cache_store.prune(everything=True)
    assert done.removed == ()
    assert "is a link and not followed" in caplog.text
    assert (mine / "model.blob").exists()
    assert (outside / "model.blob").exists()
    assert (root / "bundles" / digest(3)).is_symlink()


def test_a_link_inside_an_entry_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"x" * 1000)
    entry = make(root, f"compiled/openvino/{digest(1)}", 10, 5)
    (entry / "link").symlink_to(tmp_path / "outside")
    assert cache_store.entries()[0].size_bytes < 1000
    assert len(cache_store.prune(everything=True).removed) == 1
    assert (tmp_path / "outside/file").exists()


def test_least_recently_used_goes_first(root: Path) -> None:
    for number, age in ((1, 10), (2, 1000), (3, 100)):
        make(root, f"compiled/openvino/{digest(number)}", MB, age)
    make(root, f"bundles/{digest(4)[:24]}", MB, 500)
    done = cache_store.prune(limit=2 * MB)
    assert names(done.removed) == [digest(2), digest(4)[:24]]
    assert done.freed_bytes == 2 * MB
    assert done.left_bytes == 2 * MB
    assert sorted(names(cache_store.entries())) == sorted([digest(1), digest(3)])


def test_using_an_entry_saves_it(root: Path) -> None:
    old, new = (make(root, f"compiled/openvino/{digest(n)}", MB, 1000 / n) for n in (1, 2))
    held = claim(old)
    assert held is not None
    held.touch()
    held.release()
    assert [entry.path for entry in cache_store.prune(limit=MB).removed] == [new]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=8), st.integers(0, 40))
def test_pruning_keeps_the_most_recent_that_fit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], limit: int
) -> None:
    root = tmp_path_factory.mktemp("cache")
    for number, (size, age) in enumerate(rows):
        make(root, f"compiled/openvino/{digest(number)}", size, 100 * age + number)
    by_age = sorted(range(len(rows)), key=lambda n: -(100 * rows[n][1] + n))
    left, expected = sum(size for size, _ in rows), []
    while by_age and left > limit:
        expected.append(digest(by_age[0]))
        left -= rows[by_age.pop(0)][0]
    done = cache_store.prune(limit=limit, root=root)
    assert names(done.removed) == expected
    assert done.left_bytes == left


def test_older_than_kinds_and_dry_run(root: Path) -> None:
    make(root, f"compiled/openvino/{digest(1)}", 10, 1000)
    make(root, f"bundles/{digest(2)[:24]}", 10, 2000)
    make(root, f"bundles/{digest(3)[:24]}", 10, 10)
    done = cache_store.prune(older_than=500, dry_run=True)
    assert len(done.removed) == 2
    assert len(cache_store.entries()) == 3
    assert names(cache_store.prune(("bundles",), older_than=500).removed) == [digest(2)[:24]]
    assert names(cache_store.prune(("bundles",), everything=True).removed) == [digest(3)[:24]]
    assert names(cache_store.entries()) == [digest(1)]


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_in_use_stays(root: Path, dry_run: bool) -> None:
    used = make(root, f"bundles/{digest(1)[:24]}", MB, 1e6)
    make(root, f"bundles/{digest(2)[:24]}", MB, 10)
    with claim(used) or pytest.fail("no claim"):
        assert cache_store.is_in_use(used)
        done = cache_store.prune(everything=True, dry_run=dry_run)
        assert names(done.in_use) == [used.name]
        assert len(done.removed) == 1
        assert done.left_bytes == MB
        assert used.exists()
    assert not cache_store.is_in_use(used)
    assert names(cache_store.prune(everything=True).removed)[0] == used.name


def test_a_killed_user_frees_its_entry(root: Path) -> None:
    entry = make(root, f"bundles/{digest(1)[:24]}", 10, 10)
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


def test_claims_exclude_each_other(tmp_path: Path) -> None:
    entry = make(tmp_path, digest(1), 1, 0)
    first, second = claim(entry), claim(entry)
    assert first
    assert second
    assert claim(entry, exclusive=True, wait=False) is None
    first.release()
    second.release()
    second.release()
    with claim(entry, exclusive=True, wait=False) or pytest.fail("no claim"):
        assert claim(entry, wait=False) is None
    assert claim(tmp_path / "nothing") is None


def test_a_claim_on_what_was_removed_meanwhile_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock and locking it, another process removes the entry."""
    from kiln import cache_locks

    entry, real = make(tmp_path, digest(1), 1, 0), cache_locks._lock

    def slow(descriptor: int, path: Path, *, exclusive: bool, wait: bool) -> bool:
        cache_store.discard(path)
        return real(descriptor, path, exclusive=exclusive, wait=wait)

    monkeypatch.setattr(cache_locks, "_lock", slow)
    assert claim(entry) is None


def test_enforcing(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    old = make(root, f"compiled/openvino/{digest(1)}", 2 * MB, 100)
    new = make(root, f"compiled/openvino/{digest(2)}", 2 * MB, 10)
    cache_store.enforce_limit()
    assert old.exists()
    monkeypatch.setenv("KILN_CACHE_LIMIT", "3MB")
    cache_store.enforce_limit()
    assert not old.exists()
    assert new.exists()
    monkeypatch.setenv("KILN_CACHE_LIMIT", "1MB")
    with claim(new) or pytest.fail("no claim"), caplog.at_level(logging.WARNING):
        cache_store.enforce_limit()
    assert "holds 2.0 MB in use, more than its limit of 1.0 MB" in caplog.text


def test_left_overs_are_swept(root: Path) -> None:
    folder = root / "bundles"
    for name in (".abc.12.ffff.trash", ".x.host.1.aaaa.partial", ".y.host.1.aaaa.old", ".young.1.b.partial"):
        (folder / name).mkdir(parents=True)
        if "young" not in name:
            os.utime(folder / name, (0, 0))
    cache_store.prune(limit=None)
    assert [path.name for path in folder.iterdir()] == [".young.1.b.partial"]


def test_facts_that_cannot_be_read(root: Path) -> None:
    entry = make(root, f"compiled/openvino/{digest(1)}", 10, 10)
    for text in ("{", "[1]", ""):
        (entry / "facts.json").write_text(text)
        assert cache_store.entries()[0].facts == {}
    cache_store.write_facts(entry, {"where": Path("a")})
    assert json.loads((entry / "facts.json").read_text()) == {"where": "a"}


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


def test_processes_that_store_load_and_prune_at_once_and_are_killed(root: Path) -> None:
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
