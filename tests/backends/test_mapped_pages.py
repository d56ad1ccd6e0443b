"""Pages of a mapped file are given back, and nothing else is."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from kiln.backends import mapped_pages
from kiln.backends.mapped_pages import release_pages, releasing_pages, trim_heap

SIZE = 32 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's madvise")


def resident_file_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    pytest.skip("the kernel does not tell file pages apart")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(SIZE))
    return made


def test_pages_go_and_come_again(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = resident_file_bytes()
        read = mapped[:]
        assert resident_file_bytes() - before > 0.9 * SIZE
        assert release_pages(path) == SIZE
        assert resident_file_bytes() - before < 0.1 * SIZE
        assert mapped[:] == read == path.read_bytes()


def test_pages_go_while_they_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_pages, "_INTERVAL", 0.001)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = resident_file_bytes()
        with releasing_pages(path):
            read = mapped[:]
            deadline = time.monotonic() + 20
            while resident_file_bytes() - before > 0.1 * SIZE:
                assert time.monotonic() < deadline
        assert mapped[:] == read


def test_the_watcher_ends_with_an_engine_that_fails(path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), releasing_pages(path):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_a_mapping_that_can_be_written_to_is_left_alone(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        assert release_pages(path) == 0
        assert mapped[:4] == b"mine"


def test_where_there_is_no_proc(path: Path, tmp_path: Path) -> None:
    assert release_pages(path, tmp_path) == 0
    assert release_pages(tmp_path / "other") == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a heap of glibc")
def test_holes_of_the_heap_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library")
    pieces = [bytearray(b"x" * 60_000) for _ in range(2_000)]  # too small to be mapped one by one
    full = resident_bytes()
    pieces[:-1] = []  # the last keeps the heap from ending before the hole
    assert trim_heap()
    assert resident_bytes() < full - 60_000_000
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not trim_heap()


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
