"""Arrays in memory that two processes share, without names that could be left behind.

A block is anonymous memory (``memfd_create``) whose descriptor travels over the socket. Unlike the segments
of ``multiprocessing.shared_memory`` it needs no unlinking and no tracker process, is gone with the last
process that maps it however that ends, and is not held to the size of /dev/shm: 64 MB in most containers.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import SessionError

ALIGNMENT = 64  # bytes: a cache line, and what vector instructions like best

Layout = list[dict[str, Any]]


class Block:
    """Shared memory of a fixed size."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map ``size`` bytes of a descriptor, which the block then owns.

        Raises:
            SessionError: the memory cannot be mapped, or is smaller than it should be.
        """
        self.descriptor, self.size = descriptor, size
        self._descriptor_closer = weakref.finalize(self, os.close, descriptor)
        if os.fstat(descriptor).st_size < size:
            raise SessionError(f"shared memory of {size} bytes was announced, a smaller one came")
        try:
            self._map: mmap.mmap | None = mmap.mmap(descriptor, size)
        except OSError as error:
            raise SessionError(f"{size} bytes of shared memory cannot be mapped: {error.strerror}") from error

    @classmethod
    def create(cls, size: int) -> Block:
        """New memory, which nobody can make smaller under a reader.

        Raises:
            SessionError: there is not enough memory.
        """
        try:
            if hasattr(os, "memfd_create"):
                flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
                descriptor = os.memfd_create("kiln", flags)
            else:
                with tempfile.TemporaryFile() as file:  # has no name either
                    descriptor = os.dup(file.fileno())
            os.ftruncate(descriptor, size)
            if hasattr(fcntl, "F_ADD_SEALS"):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            raise SessionError(f"there are no {size} bytes of shared memory: {error.strerror}") from error
        return cls(descriptor, size)

    def write(self, arrays: Mapping[str, np.ndarray], layout: Layout) -> None:
        """Copy arrays to where ``layout`` says."""
        for entry in layout:
            np.copyto(self._view(entry), arrays[entry["name"]])

    def read(self, layout: Layout) -> dict[str, np.ndarray]:
        """Views of arrays, valid until the next ``write``; writable, because OpenVINO takes no others.

        Raises:
            SessionError: an array would lie outside the block.
        """
        return {entry["name"]: self._view(entry) for entry in layout}

    def close(self) -> None:
        """Give the memory back, or leave it to the last view of it."""
        self._descriptor_closer()
        # Not closed: numpy's views keep the mapping as their base but do not lock it, so a view that an
        # engine still holds would then point nowhere. Unmapped with the last reference instead.
        self._map = None

    def _view(self, entry: Mapping[str, Any]) -> np.ndarray:
        if self._map is None:  # numpy would make a new array in its place
            raise SessionError("this shared memory was given back")
        shape, offset = tuple(entry["shape"]), entry["offset"]
        dtype = np.dtype(entry["dtype"])
        end = offset + dtype.itemsize * math.prod(shape)
        # numpy itself takes a size of -1 and a negative offset.
        if min(shape, default=0) < 0 or not 0 <= offset <= end <= self.size:
            raise SessionError(f"{dict(entry)} does not lie in shared memory of {self.size} bytes")
        return np.ndarray(shape, dtype, buffer=self._map, offset=offset)


def plan(arrays: Mapping[str, np.ndarray]) -> tuple[Layout, int]:
    """Where each array goes in a block, and how large that has to be."""
    layout: Layout = []
    end = 0
    for name, array in arrays.items():
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        layout.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": offset})
        end = offset + array.nbytes
    return layout, max(end, 1)
