"""How often, and in which order: warm-up until it is stable, then configurations that take turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..records.record import Sample

WARM_UP_LEAST = 2
WARM_UP_MOST = 10
WARM_UP_TOLERANCE = 0.03

Lane = TypeVar("Lane")


@dataclass(frozen=True)
class Floor:
    """At least so many timed batches that together take so many seconds."""

    batches: int
    seconds: float

    def reached(self, samples: Sequence[Sample]) -> bool:
        """Whether there are enough."""
        return len(samples) >= self.batches and sum(sample.seconds for sample in samples) >= self.seconds


def is_stable(samples: Sequence[Sample]) -> bool:
    """Whether there are two or more, and the last two differ by 3 % or less."""
    if len(samples) < WARM_UP_LEAST:
        return False
    last, before = samples[-1].seconds, samples[-2].seconds
    return abs(last - before) <= WARM_UP_TOLERANCE * max(last, before)


def warm_up(draw: Callable[[], Sample], done: Sequence[Sample] = ()) -> tuple[list[Sample], bool]:
    """Draw until it is stable, ten batches at most, of which ``done`` were drawn already.

    Returns:
        All warm-ups, ``done`` first, and whether it became stable.
    """
    samples = list(done)
    while not is_stable(samples) and len(samples) < max(WARM_UP_MOST, len(done)):
        samples.append(draw())
    return samples, is_stable(samples)


def turns(lanes: Sequence[Lane], wants: Callable[[Lane], bool]) -> Iterator[Lane]:
    """Who is next, until nobody wants another turn: ABC CBA ABC ..., so that a slow drift hits all alike."""
    for index in itertools.count():
        order = [lane for lane in lanes if wants(lane)]
        if not order:
            return
        for lane in order if index % 2 == 0 else reversed(order):
            if wants(lane):
                yield lane


def groups(needs: Sequence[int], free: int | None) -> list[list[int]]:
    """Which configurations may be in memory at once: positions, in order, none left out.

    Args:
        needs: bytes that each is expected to take.
        free: bytes that all together may take, None if it is not known.

    Returns:
        One group where all fit together; one that fits nowhere has a group of its own.
    """
    made: list[list[int]] = []
    for position, need in enumerate(needs):
        held = sum(needs[i] for i in made[-1]) if made else 0
        if made and (free is None or held + need <= free):
            made[-1].append(position)
        else:
            made.append([position])
    return made
