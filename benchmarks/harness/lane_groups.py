"""Which lanes are in memory at once: all, where they fit, else groups that are measured one after another."""

from __future__ import annotations

from collections.abc import Sequence

from .lane import Lane
from .measure import groups
from .memory import available_bytes
from .plan import Say

# Of what the machine has left, this much stays free.
_RESERVE = 0.15
# What a process takes when it draws, against when it has loaded: activations. Where it was not loaded yet,
# against its files: weights in float16 that become float32.
_GROWTH = 1.5
_UNPACKED = 2.0


def grouped(lanes: Sequence[Lane], say: Say) -> list[list[Lane]]:
    """Groups in order; where there are several, each lane says so in its record.

    Args:
        lanes: with the memory that their cold processes took.
        say: gets a line where there are several groups.
    """
    free = available_bytes()
    made = groups([_need(lane) for lane in lanes], None if free is None else int(free * (1 - _RESERVE)))
    if len(made) > 1:
        say(f"memory: {len(lanes)} configurations take turns in {len(made)} groups")
        for number, group in enumerate(made, 1):
            for i in group:
                lanes[i].remarks.append(
                    f"took turns in group {number} of {len(made)}: all together would not fit into memory"
                )
    return [[lanes[i] for i in group] for group in made]


def _need(lane: Lane) -> int:
    if lane.failed:
        return 0
    files = sum(int(facts["size"]) for facts in lane.bundle.manifest["files"].values())
    return int(lane.cold_bytes * _GROWTH or files * _UNPACKED)
