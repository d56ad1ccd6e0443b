"""Measure the ranges of activations on real denoising: prompts, all noise levels, guidance, decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...backends.base import Arrays, GraphSource
from ...metrics import Threshold
from .engines import open_graph
from .limits import INT8_LIMITS
from .observe import Observed, observing_graph, saturated_share
from .qdq import Operand
from .quantize import ActivationRange
from .trajectories import Compute, Open, Work, denoise

if TYPE_CHECKING:
    from ...bundle import Bundle


@dataclass(frozen=True, eq=False)
class Watched:
    """What was seen while drawing: activations, and the inputs of every call of the UNet with its output.

    ``observed`` are the UNet's, ``decoder`` those of the VAE's decoder, None if none were asked for.
    """

    observed: Observed
    feeds: tuple[Arrays, ...]
    outputs: tuple[np.ndarray, ...]
    decoder: Observed | None = None


def watch(
    bundle: Bundle, operands: Sequence[Operand], work: Work, decoder: Sequence[Operand] = ()
) -> Watched:
    """Draw in fp32 and look at the tensor of every operand.

    Args:
        bundle: weights as they are to be quantized, in floating point; files are put beside them meanwhile.
        operands: of its UNet.
        work: what to draw.
        decoder: operands of the decoder of its VAE.
    """
    feeds: list[Arrays] = []
    outputs: list[np.ndarray] = []

    def remember(given: Arrays, found: Mapping[str, np.ndarray]) -> None:
        feeds.append({name: array.copy() for name, array in given.items()})
        outputs.append(found["out_sample"])

    with contextlib.ExitStack() as stack:
        observed, opener = stack.enter_context(_observing(bundle.source("unet"), operands, work, remember))
        openers, decoded = {"unet": opener}, None
        if decoder:
            decoded, openers["vae_decoder"] = stack.enter_context(
                _observing(bundle.source("vae_decoder"), decoder, work)
            )
        denoise(bundle, work, openers)
    return Watched(observed, tuple(feeds), tuple(outputs), decoded)


@contextlib.contextmanager
def _observing(
    source: GraphSource,
    operands: Sequence[Operand],
    work: Work,
    also: Callable[[Arrays, Mapping[str, np.ndarray]], object] = lambda given, found: None,
) -> Iterator[tuple[Observed, Open]]:
    """What computes a component and looks at it, and what it saw; ``also`` is told of every call."""
    import onnx

    tensors = list(dict.fromkeys(operand.tensor for operand in operands))
    observed = Observed(tensors, (operand.tensor for operand in operands if operand.symmetric))
    path = source.graph_path.with_name("observing.onnx")
    plain = onnx.load(source.graph_path, load_external_data=False)
    outputs = [port.name for port in plain.graph.output]
    graph = observing_graph(plain, tensors)

    def opener(shapes: Mapping[str, tuple[int, ...]]) -> Compute:
        run = open_graph(graph, path, shapes, threads=work.threads)

        def compute(given: Arrays) -> Mapping[str, np.ndarray]:
            found = run(given)
            observed.add(found)
            also(given, found)
            return {name: found[name] for name in outputs}

        return compute

    try:
        yield observed, opener
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Fit:
    """How well ranges cover a model they were not measured on.

    ``saturated`` is the largest share of a tensor's values that is cut off, in ``saturated_tensor``;
    ``ratio`` the largest quotient of an extreme that was seen and the bound of the range, in
    ``ratio_tensor``.
    """

    saturated: float
    saturated_tensor: str
    ratio: float
    ratio_tensor: str

    def misfits(self, limits: Mapping[str, Threshold] = INT8_LIMITS) -> str | None:
        """What is out of bounds, None when nothing is."""
        if not limits["int8_saturated_share"].holds(self.saturated):
            return (
                f"{self.saturated:.2%} of the values of {self.saturated_tensor} lie outside of its range "
                f"(limit {limits['int8_saturated_share'].limit:.2%})"
            )
        if not limits["int8_range_ratio"].holds(self.ratio):
            return (
                f"the values of {self.ratio_tensor} reach {self.ratio:.1f} times its range "
                f"(limit {limits['int8_range_ratio'].limit:g})"
            )
        return None


def measure_fit(ranges: Mapping[str, ActivationRange], observed: Observed) -> Fit:
    """Compare ranges with what was seen of a model."""
    shares, ratios = {}, {}
    for tensor in observed.tensors:
        given = ranges[tensor]
        shares[tensor] = saturated_share(observed.samples(tensor), given)
        seen = max(observed.highs[tensor], -observed.lows[tensor])
        ratios[tensor] = seen / max(given.high, -given.low, float(np.finfo(np.float32).tiny))
    worst_share, worst_ratio = max(shares, key=lambda t: shares[t]), max(ratios, key=lambda t: ratios[t])
    return Fit(shares[worst_share], worst_share, ratios[worst_ratio], worst_ratio)
