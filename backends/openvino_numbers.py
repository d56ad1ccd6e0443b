"""Small constants of OpenVINO's graphs, as the lowerings need them."""

from __future__ import annotations

from typing import Any

import numpy as np


def integers(*values: int) -> Any:
    """A constant of int64 with one axis: axes, an order of axes, a shape."""
    from openvino import opset13

    return opset13.constant(np.array(values, np.int64))


def number(value: float) -> Any:
    """A constant of float32 without axes."""
    from openvino import opset13

    return opset13.constant(np.array(value, np.float32))
