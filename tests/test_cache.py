"""Where the cache may lie, how large it may be, and who may write into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kiln import cache
from kiln.errors import UsageError


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


def test_limit(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_folders_are_private_and_tagged(own_cache: Path) -> None:
    (own_cache / "compiled").mkdir(parents=True, mode=0o777)
    (own_cache / "compiled").chmod(0o777)
    cache.private_folder(own_cache / "compiled/engine")
    for folder in (own_cache / "compiled", own_cache / "compiled/engine"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (own_cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


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
