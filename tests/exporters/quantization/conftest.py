"""What tests of int8 share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kiln.exporters.quantization import plan, produce
from kiln.exporters.quantization.trajectories import Work


@pytest.fixture(scope="module")
def small_int8() -> Iterator[None]:
    """Let components as small as the tiny ones be int8, and judge by two steps of one prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_LEAST_COMPONENT", 0)
        patch.setattr(plan, "_LEAST_WEIGHT", 64)
        patch.setattr(produce, "GATE_WORK", Work(("blue car",), 2))
        patch.setattr(produce, "_LARGE", 0)  # coarse groups, few points
        yield
