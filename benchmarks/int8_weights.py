"""Which weights of a UNet int8 hurts: each is rounded by itself, and the output compared with that of floats.

    python -m kiln.benchmarks.int8_weights BUNDLE [--size 256] [--steps 4] [--prompts 1] [--points 2]

BUNDLE is of floats. It is drawn with torch in fp32, and the UNet's calls are kept; then each weight that
could be int8 is, one at a time, in diffusers' module. Squared errors of different weights add up: what they
give together stands in the report beside what was measured with all. Held against limits is the rule for what
``kiln export --precision int8`` keeps in floats: few values, most of the error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bundle import Bundle, open_bundle
from ..errors import UsageError
from ..exporters.graphs import find_graph
from ..exporters.quantization.hurting import hurting_weights
from ..exporters.quantization.plan import weight_sites
from ..exporters.quantization.quantize import quantize_weight
from ..int8 import SCALE_SUFFIX, dequantized
from ..metrics import relative_l2
from .fidelity.calls import Call, read_calls
from .fidelity.components import recording
from .fidelity.reference import plan_reference
from .fidelity.sampling import Sampling
from .fidelity.trial import Trial
from .parity_table import workload_of
from .report import Check, Report, Samples, positive, run

if TYPE_CHECKING:
    import torch

Outputs = Sequence[np.ndarray]


def measure(args: argparse.Namespace) -> Report:
    """Round every weight by itself, all, and all but those that the rule keeps."""
    report = Report("int8_weights", vars(args))
    bundle = open_bundle(args.bundle)
    if "int8" in str(bundle.manifest.get("storage")):
        raise UsageError(f"{args.bundle} is of int8; give the bundle of floats that it was made from")
    sites = weight_sites("unet", find_graph("unet", bundle.config("unet")))
    sizes = {site.weight: int(np.prod(site.shape)) for site in sites}
    if not sizes:
        raise UsageError(f"the UNet of {args.bundle} is too small for int8")
    probe = WeightProbe(bundle, recorded(bundle, args))
    alone = {name: rms(probe.errors([name])) for name in sizes}
    kept = hurting_weights(sizes)
    rest = [name for name in sizes if name not in kept]
    for label, chosen in (("all weights in int8", sizes), ("all but those that are kept", rest)):
        report.samples.append(Samples(label, "%", tuple(100 * error for error in probe.errors(chosen))))
    report.facts = {
        "alone": {name: {"error": alone[name], "values": sizes[name]} for name in by_value(alone, sizes)},
        "kept": list(kept),
        "expected_of_all": float(np.linalg.norm([*alone.values()])),
    }
    report.checks = rule_checks(alone, sizes, kept)
    return report


def rule_checks(alone: Mapping[str, float], sizes: Mapping[str, int], kept: Iterable[str]) -> list[Check]:
    """How many of the values a rule keeps in floats, and how much of the squared error is theirs.

    Args:
        alone: relative L2 of the output with one weight rounded, by weight.
        sizes: values of each weight.
        kept: the weights that stay.
    """
    kept = set(kept)
    squares = {name: error**2 for name, error in alone.items()}
    shares = [sum(of[name] for name in kept) / sum(of.values()) for of in (sizes, squares)]
    names = ("int8_kept_values_share", "int8_kept_error_share")
    return [Check(name, float(share)) for name, share in zip(names, shares, strict=True)]


def by_value(alone: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """Weights by their squared error for each value, the worst first."""
    return sorted(alone, key=lambda name: -(alone[name] ** 2) / sizes[name])


def rms(errors: Sequence[float]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(errors))))


def recorded(bundle: Bundle, args: argparse.Namespace) -> list[Call]:
    """UNet calls of a real denoising with the bundle in fp32 on torch."""
    reference = plan_reference(bundle, {"torch"})
    trial = Trial(bundle, reference, reference, workload_of(bundle, args))
    with recording(trial, Sampling(args.prompts, args.steps, args.points)) as folder:
        return list(read_calls(folder, "unet"))


class WeightProbe:
    """The UNet as a torch module in fp32, whose weights can be rounded to int8 for one look at its output."""

    def __init__(self, bundle: Bundle, calls: Sequence[Call]) -> None:
        import torch

        from ..backends.torch_modules import load_module

        self._module = load_module(bundle.source("unet"), torch.float32, torch.device("cpu"))
        self._weights = dict(self._module.named_parameters())
        self._calls = calls
        self._exact = self._outputs()

    def errors(self, names: Iterable[str]) -> list[float]:
        """Relative L2 of the output of each call with these weights in int8."""
        before = {name: self._weights[name].data for name in names}
        try:
            for name, weight in before.items():
                self._weights[name].data = rounded(weight)
            return [relative_l2(out, exact) for out, exact in zip(self._outputs(), self._exact, strict=True)]
        finally:
            for name, weight in before.items():
                self._weights[name].data = weight

    def _outputs(self) -> Outputs:
        import torch

        from ..backends.torch_modules import call_module

        with torch.inference_mode():
            feeds = [{k: torch.from_numpy(np.asarray(v)) for k, v in c.feeds.items()} for c in self._calls]
            return [call_module("unet", self._module, given)[0].numpy() for given in feeds]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight after int8 and back."""
    import torch

    made = quantize_weight(weight.numpy())
    return torch.from_numpy(
        dequantized("weight", {"weight": made.values, f"weight{SCALE_SUFFIX}": made.scale})
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Round each weight of a UNet to int8 by itself.")
    made.add_argument("bundle", type=Path)
    made.add_argument("--size", type=positive, help="pixels a side; the model's own by default")
    made.add_argument("--steps", type=positive, default=4)
    made.add_argument("--prompts", type=int, choices=(1, 2, 3), default=1)
    made.add_argument("--points", type=positive, default=2, help="UNet calls that are looked at")
    made.add_argument("--seed", type=int, default=1000)
    made.add_argument("--json", type=Path, default=Path("int8_weights.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; exit 1 when the rule misses a limit."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
