"""A tiny SD1 whose text encoder is wide enough for a single file, which tells its heads by its width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_sd1(write_tiny_sd1: Callable[[int, int], Path]) -> Path:
    """A diffusers folder, fp32."""
    return write_tiny_sd1(64, 1)
