"""Weights that stay in floating point when weights alone are int8: few values that make most of the error.

Rounding a weight moves the output by about as much whatever its size, so a small one costs more for each of
its values. Which are worst for their size is the same in the two UNets measured, one trained and one random:
those of the outermost level, which see the image at its full size, and the shortcuts of resnets, through
which all of a stream passes with nothing beside it. (Q-Diffusion, Li et al. 2023, found the latter.)
``benchmarks/int8_weights.py`` measures each weight by itself, and how much of the error the rule takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LEVEL = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.")
SHORTCUT = ".conv_shortcut."


def hurting_weights(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a UNet's weights to leave in floating point, in the order they are given.

    Args:
        names: of weights of one UNet, by diffusers' names; of all that could be int8.

    Returns:
        Weights of the first block on the way down and of the last on the way up, and of every shortcut.
    """
    named = tuple(names)
    levels = [int(found[2]) for name in named if (found := _LEVEL.match(name)) and found[1] == "up_blocks"]
    outermost = ("down_blocks.0.", f"up_blocks.{max(levels, default=0)}.")
    return tuple(name for name in named if name.startswith(outermost) or SHORTCUT in name)
