"""What is in the cache, what goes first when it is full, and what is never touched."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln import cache_store
from kiln.cache_locks import LOCK_NAME, claim

MB = 1_000_000


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


def test_entries_of_all_kinds(own_cache: Path) -> None:
    make(own_cache, f"compiled/openvino/{digest(1)}", 10, 50, component="unet")
    make(own_cache, f"bundles/{digest(2)[:24]}", 20, 40)
    (own_cache / "graphs").mkdir()
    (own_cache / "graphs/unet-8999421c5919e034.onnx.xz").write_bytes(b"12345")
    (own_cache / "verified").mkdir()
    (own_cache / "verified/stamps.json").write_text("[]")
    found = cache_store.entries()
    assert [entry.kind for entry in found][:2] == ["compiled", "bundles"]
    assert {entry.kind for entry in found} == {"compiled", "bundles", "graphs", "verified"}
    assert found[0].facts == {"component": "unet"}
    assert found[1].size_bytes == 20
    assert [entry.size_bytes for entry in cache_store.entries(("graphs",))] == [5]


def test_only_what_kiln_wrote_is_an_entry(
    own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever points KILN_CACHE at a folder with a ``bundles`` of their own loses nothing."""
    outside = make(tmp_path, digest(9), 10, 1e9)
    mine = make(own_cache, "bundles/my-favourite-model", 10, 1e9)
    (own_cache / "bundles" / digest(3)).symlink_to(outside)
    (own_cache / "compiled").symlink_to(tmp_path)
    (own_cache / "bundles" / f"{digest(4)}.lock").touch()
    (own_cache / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        done = cache_store.prune(everything=True)
    assert done.removed == ()
    assert "is a link and not followed" in caplog.text
    assert (mine / "model.blob").exists()
    assert (outside / "model.blob").exists()
    assert (own_cache / "bundles" / digest(3)).is_symlink()


def test_a_link_inside_an_entry_is_not_followed(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"x" * 1000)
    entry = make(own_cache, f"compiled/openvino/{digest(1)}", 10, 5)
    (entry / "link").symlink_to(tmp_path / "outside")
    assert cache_store.entries()[0].size_bytes < 1000
    assert len(cache_store.prune(everything=True).removed) == 1
    assert (tmp_path / "outside/file").exists()


def test_least_recently_used_goes_first(own_cache: Path) -> None:
    for number, age in ((1, 10), (2, 1000), (3, 100)):
        make(own_cache, f"compiled/openvino/{digest(number)}", MB, age)
    make(own_cache, f"bundles/{digest(4)[:24]}", MB, 500)
    done = cache_store.prune(limit=2 * MB)
    assert names(done.removed) == [digest(2), digest(4)[:24]]
    assert done.freed_bytes == 2 * MB
    assert done.left_bytes == 2 * MB
    assert sorted(names(cache_store.entries())) == sorted([digest(1), digest(3)])


def test_using_an_entry_saves_it(own_cache: Path) -> None:
    old, new = (make(own_cache, f"compiled/openvino/{digest(n)}", MB, 1000 / n) for n in (1, 2))
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


def test_older_than_kinds_and_dry_run(own_cache: Path) -> None:
    make(own_cache, f"compiled/openvino/{digest(1)}", 10, 1000)
    make(own_cache, f"bundles/{digest(2)[:24]}", 10, 2000)
    make(own_cache, f"bundles/{digest(3)[:24]}", 10, 10)
    done = cache_store.prune(older_than=500, dry_run=True)
    assert len(done.removed) == 2
    assert len(cache_store.entries()) == 3
    assert names(cache_store.prune(("bundles",), older_than=500).removed) == [digest(2)[:24]]
    assert names(cache_store.prune(("bundles",), everything=True).removed) == [digest(3)[:24]]
    assert names(cache_store.entries()) == [digest(1)]


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_in_use_stays(own_cache: Path, dry_run: bool) -> None:
    used = make(own_cache, f"bundles/{digest(1)[:24]}", MB, 1e6)
    make(own_cache, f"bundles/{digest(2)[:24]}", MB, 10)
    with claim(used) or pytest.fail("no claim"):
        assert cache_store.is_in_use(used)
        done = cache_store.prune(everything=True, dry_run=dry_run)
        assert names(done.in_use) == [used.name]
        assert len(done.removed) == 1
        assert done.left_bytes == MB
        assert used.exists()
    assert not cache_store.is_in_use(used)
    assert names(cache_store.prune(everything=True).removed)[0] == used.name


def test_enforcing(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = make(own_cache, f"compiled/openvino/{digest(1)}", 2 * MB, 100)
    new = make(own_cache, f"compiled/openvino/{digest(2)}", 2 * MB, 10)
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


def test_left_overs_are_swept(own_cache: Path) -> None:
    folder = own_cache / "bundles"
    for name in (".abc.12.ffff.trash", ".x.host.1.aaaa.partial", ".y.host.1.aaaa.old", ".young.1.b.partial"):
        (folder / name).mkdir(parents=True)
        if "young" not in name:
            os.utime(folder / name, (0, 0))
    cache_store.prune(limit=None)
    assert [path.name for path in folder.iterdir()] == [".young.1.b.partial"]


def test_facts_that_cannot_be_read(own_cache: Path) -> None:
    entry = make(own_cache, f"compiled/openvino/{digest(1)}", 10, 10)
    for text in ("{", "[1]", ""):
        (entry / "facts.json").write_text(text)
        assert cache_store.entries()[0].facts == {}
    cache_store.write_facts(entry, {"where": Path("a")})
    assert json.loads((entry / "facts.json").read_text()) == {"where": "a"}
