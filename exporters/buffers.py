"""Memory that tensors are read into, used again as soon as they are written.

A fresh array is zeroed by the kernel page by page; for a checkpoint that passes through once, that took as
long as reading it.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

_LEAST = 1 << 16  # bytes; smaller ones come out of the allocator's own lists


class Buffers:
    """Lends byte arrays and takes them back; for one thread that takes and one that gives back."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """A uint8 array of ``nbytes`` with anything in it."""
        if nbytes < _LEAST:
            return np.empty(nbytes, np.uint8)
        size = 1 << (nbytes - 1).bit_length()
        with self._lock:
            whole = self._free[size].pop() if self._free[size] else np.empty(size, np.uint8)
            self._lent[_address(whole)] = whole
        return whole[:nbytes]

    def give_back(self, array: np.ndarray) -> None:
        """Lend the memory of ``array`` again; an array that was not lent from here is left alone.

        ``array`` may be any view that begins where the lent one did. Nobody may use it afterwards.
        """
        with self._lock:
            whole = self._lent.pop(_address(array), None)
            if whole is not None:
                self._free[whole.size].append(whole)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
