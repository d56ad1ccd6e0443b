"""Quantize a weight to int8: symmetric, one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = 127  # symmetric: -128 is not used, so that the range is the same on both sides
_BLOCK_VALUES = 1 << 16  # values in hand at a time, 256 KiB in float32: they stay in the cache of a core
_LEAST_STEP = 1e-20  # of a tensor that was never anything but 0; float32 divides by it without overflow


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """int8 values in the weight's shape, and float32 scales, one for each index of the first axis."""

    values: np.ndarray
    scale: np.ndarray


def row_scales(weight: np.ndarray) -> np.ndarray:
    """The scale of each output channel: its largest magnitude over 127.

    Args:
        weight: float ``(out, ...)``.

    Returns:
        float32 ``(out,)``, above 0; a channel of zeros has the scale 1.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0)).astype(np.float32)
    # A subnormal scale would lose the digits of the division.
    scale = np.maximum(largest / np.float32(LEVELS), np.finfo(np.float32).tiny)
    return np.where(largest > 0, scale, np.float32(1))


def quantize_weight(weight: np.ndarray) -> Int8Weight:
    """Round a weight to int8, half to even as ONNX's ``QuantizeLinear`` does.

    Args:
        weight: float ``(out, ...)``, finite; computed in float32, some rows at a time.

    Returns:
        Values and scales with ``|weight - values * scale| <= scale / 2``, up to the rounding of float32.
    """
    rows = weight.reshape(len(weight), -1)
    values = np.empty(rows.shape, np.int8)
    scale = np.empty(len(rows), np.float32)
    step = max(1, _BLOCK_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = rows[part].astype(np.float32)  # a copy, worked on in place
        scale[part] = row_scales(block)
        block /= scale[part, None]
        # A scale that was rounded down puts the largest value at 127.00001, which rounds to 127.
        values[part] = np.rint(block, out=block)
    return Int8Weight(values.reshape(weight.shape), scale)


@dataclass(frozen=True)
class ActivationRange:
    """The range of a tensor that uint8 is to cover; zero lies inside and is represented exactly.

    If it is ``symmetric``, zero lies in the middle, at 128, and the range reaches as far on both sides.
    """

    low: float
    high: float
    symmetric: bool = False

    @property
    def scale(self) -> float:
        """The width of one step."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        return max(max(high, -low) / LEVELS if self.symmetric else (high - low) / 255, _LEAST_STEP)

    @property
    def zero_point(self) -> int:
        """The value that stands for zero."""
        return 128 if self.symmetric else int(np.clip(round(-min(self.low, 0.0) / self.scale), 0, 255))


def fake_quantize(values: np.ndarray, given: ActivationRange) -> np.ndarray:
    """Values after uint8 and back, float32: ONNX's ``QuantizeLinear`` and ``DequantizeLinear``."""
    scale, zero = np.float32(given.scale), given.zero_point
    levels = np.clip(np.rint(values / scale) + zero, 0, 255)
    return ((levels - zero) * scale).astype(np.float32)
