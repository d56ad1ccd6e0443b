"""Do jobs on several threads, some of them ahead of their turn, and give what they return in their order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# What may be done before its turn, in bytes: enough that large and small tensors even out.
_AHEAD = 128 << 20
_MOST_THREADS = 4  # each has its own working memory, and the file is written by one


def in_order(
    jobs: Iterable[tuple[int, Callable[[], T]]], ahead: int = _AHEAD, *, together: bool = True
) -> Iterator[T]:
    """What the jobs return, in their order.

    Args:
        jobs: how many bytes each keeps until it has been taken, and what it does. They are drawn in the
            thread of the caller, those to come before the first is taken.
        ahead: how many bytes may wait. One job more than there are threads is always begun.
        together: False does each job in the thread of the caller when it is its turn.

    Raises:
        Exception: what a job raises, when it is its turn; what follows is not begun any more.
    """
    if not together:
        yield from (job() for _, job in jobs)
        return
    threads = min(_MOST_THREADS, _processors())
    waiting: deque[tuple[int, Future[T]]] = deque()
    with ThreadPoolExecutor(threads, "kiln-ahead") as pool:
        try:
            for nbytes, job in jobs:
                waiting.append((nbytes, pool.submit(job)))
                while len(waiting) > threads and sum(size for size, _ in waiting) > ahead:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
