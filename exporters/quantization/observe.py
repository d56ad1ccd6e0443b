"""Look at activations while the network runs: extremes exactly, and a sample of the values between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .quantize import ActivationRange, fake_quantize

if TYPE_CHECKING:
    import onnx

# Values of one tensor that are kept of one run, about; and of which at most so many are used.
SAMPLES = 2048
_STRIDE_UNIT = 30
# What is tried: how much of the observed range uint8 covers.
SHRINKS = tuple(np.linspace(1.0, 0.3, 29).tolist())


def observing_graph(graph: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of a graph with four more outputs for each tensor: least, largest, some values, how many.

    The values are every n-th of the flattened tensor. n is one more than a multiple of 30, because sizes and
    channels of these networks are products of 2, 3 and 5: so no channel is looked at more than another.
    """
    import onnx
    from onnx import helper

    made = onnx.ModelProto()
    made.CopyFrom(graph)
    constants = {
        "observe_flat": np.array([-1], np.int64),
        "observe_start": np.array([0], np.int64),
        "observe_end": np.array([np.iinfo(np.int64).max], np.int64),
        "observe_unit": np.array([_STRIDE_UNIT], np.int64),
        "observe_many": np.array([SAMPLES * _STRIDE_UNIT], np.int64),
        "observe_one": np.array([1], np.int64),
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    for index, tensor in enumerate(tensors):
        low, high, some, size = observation_names(index)
        stem = f"observe_{index}"
        made.graph.node.extend(
            [
                helper.make_node("Reshape", [tensor, "observe_flat"], [f"{stem}_line"]),
                helper.make_node("ReduceMin", [f"{stem}_line"], [low], keepdims=1),
                helper.make_node("ReduceMax", [f"{stem}_line"], [high], keepdims=1),
                helper.make_node("Shape", [f"{stem}_line"], [size]),
                helper.make_node("Div", [size, "observe_many"], [f"{stem}_times"]),
                helper.make_node("Mul", [f"{stem}_times", "observe_unit"], [f"{stem}_even"]),
                helper.make_node("Add", [f"{stem}_even", "observe_one"], [f"{stem}_stride"]),
                helper.make_node(
                    "Slice",
                    [f"{stem}_line", "observe_start", "observe_end", "observe_start", f"{stem}_stride"],
                    [some],
                ),
            ]
        )
        made.graph.output.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in (low, high, some)
        )
        made.graph.output.append(helper.make_tensor_value_info(size, onnx.TensorProto.INT64, [1]))
    return made


def observation_names(index: int) -> tuple[str, str, str, str]:
    """Names of the outputs for the tensor of an index: least, largest, some values, how many there are."""
    stem = f"observe_{index}"
    return f"{stem}_low", f"{stem}_high", f"{stem}_some", f"{stem}_size"


class Observed:
    """What was seen of some tensors over several runs; ``sizes`` are their numbers of values in the last."""

    def __init__(self, tensors: Sequence[str], symmetric: Iterable[str] = ()) -> None:
        self.tensors = tuple(tensors)
        self._symmetric = frozenset(symmetric)
        self.lows = dict.fromkeys(tensors, float("inf"))
        self.highs = dict.fromkeys(tensors, float("-inf"))
        self.sizes = dict.fromkeys(tensors, 0)
        self._samples: dict[str, list[np.ndarray]] = {tensor: [] for tensor in tensors}

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in the outputs of one run of an observing graph."""
        for index, tensor in enumerate(self.tensors):
            low, high, some, size = (outputs[name] for name in observation_names(index))
            self.sizes[tensor] = int(size[0])
            self.lows[tensor] = min(self.lows[tensor], float(low.min()))
            self.highs[tensor] = max(self.highs[tensor], float(high.max()))
            values = np.asarray(some, np.float32).ravel()
            stride = len(values) // (SAMPLES * _STRIDE_UNIT) * _STRIDE_UNIT + 1
            even = len(values) > 2 * SAMPLES and stride == 1
            self._samples[tensor].append(values[:: 31 if even else stride].copy())

    def samples(self, tensor: str) -> np.ndarray:
        """The values seen, float32, with both extremes among them."""
        return np.concatenate(
            [*self._samples[tensor], np.array([self.lows[tensor], self.highs[tensor]], np.float32)]
        )

    def ranges(self) -> dict[str, ActivationRange]:
        """The best range of every tensor, by the mean square of the error."""
        return {
            t: best_range(self.samples(t), ActivationRange(self.lows[t], self.highs[t], t in self._symmetric))
            for t in self.tensors
        }


def best_range(
    values: np.ndarray, whole: ActivationRange, shrinks: Iterable[float] = SHRINKS
) -> ActivationRange:
    """Of a range and shares of it the one whose uint8 is nearest, by the mean square of the error.

    What is gained by finer steps is weighed against what is cut off; cf. the MSE calibration of Nagel et al.,
    "A White Paper on Neural Network Quantization", 2106.08295, section 3.1.
    """

    def error(given: ActivationRange) -> float:
        return float(np.mean((fake_quantize(values, given) - values) ** 2, dtype=np.float64))

    shares = (replace(whole, low=whole.low * share, high=whole.high * share) for share in shrinks)
    return min(shares, key=error)


def saturated_share(values: np.ndarray, given: ActivationRange) -> float:
    """The share of values that uint8 cuts off by more than half a step."""
    low = (0 - given.zero_point - 0.5) * given.scale
    high = (255 - given.zero_point + 0.5) * given.scale
    return float(np.mean((values < low) | (values > high)))
