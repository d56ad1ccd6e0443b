"""Give back memory: of a file that an engine has mapped and read, and of a heap that has been emptied.

An engine that packs weights into layouts of its own reads the mapped file once; the pages then count as
memory of the process until the system needs them elsewhere, or a limit of a container strikes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_INTERVAL = 0.1  # seconds; engines read some 2 GB/s while they pack, so little gathers in between

_MADV_DONTNEED = 4  # Linux, asm-generic/mman-common.h


def release_pages(path: Path, root: Path = Path("/")) -> int:
    """Drop the pages of a file from this process where they are mapped for reading only.

    What is dropped is read from the file again when somebody touches it, so nothing is lost; a mapping that
    can be written to is left alone. Elsewhere than on Linux nothing happens.

    Returns:
        How many bytes of address space were released.
    """
    try:
        lines = (root / "proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    released = 0
    wanted = os.path.realpath(path)
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != wanted or "w" in fields[1]:
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if _advise(start, end - start):
            released += end - start
    return released


@contextmanager
def releasing_pages(path: Path) -> Iterator[None]:
    """Release the pages of a file again and again while an engine reads it, and once more at the end.

    Without that a file of weights and all that is packed from it are in memory at the same moment.

    The caller sees to it that the file stays mapped all the while: an address that is mapped anew between
    looking it up and releasing it would lose what another has written there.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            release_pages(path)

    watcher = threading.Thread(target=watch, name="kiln-mapped-pages", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        release_pages(path)


def trim_heap() -> bool:
    """Give free memory of the C heap back to the system; whether there was some, and a heap that can.

    An engine that compiles leaves 50 to 100 MB behind, in small holes that glibc keeps for later.
    See malloc_trim(3).
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False


def _advise(start: int, length: int) -> bool:
    """Whether the kernel took the advice; see madvise(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(libc.madvise(start, length, _MADV_DONTNEED) == 0)
