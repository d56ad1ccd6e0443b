"""Peak memory of drawing one image with full-size Stable Diffusion 1.5: the whole of ``kiln generate``.

    python -m kiln.benchmarks.run_memory BUNDLE [--steps 2] [--size 512] [--limit fp16|int8]

Each run is a fresh process with its own peak (VmHWM): first with an empty cache, when the networks are
compiled, then with the one just filled. Resident memory counts the pages of mapped files too. The number of
steps does not change it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .children import ChildRun, run_kiln
from .report import Check, Report, Samples, positive, run

_LIMITS = {"fp16": "run_peak_rss_gb", "int8": "run_int8_peak_rss_gb"}


def measure(args: argparse.Namespace) -> Report:
    """Generate with an empty cache, then from it; the worst run is held against the limit."""
    report = Report("run_memory", vars(args))
    first: list[ChildRun] = []
    second: list[ChildRun] = []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as name:
            first.append(generate(args, Path(name)))
            second.append(generate(args, Path(name)))
    for label, runs in (("empty cache", first), ("filled cache", second)):
        peaks = tuple(run.peak_rss_bytes / 1e9 for run in runs)
        report.samples.append(Samples(f"peak RSS, {label}", "GB", peaks))
        report.samples.append(Samples(f"whole command, {label}", "s", tuple(run.seconds for run in runs)))
    # Memory that is needed once has to be there.
    worst = max(run.peak_rss_bytes for run in first + second) / 1e9
    report.facts = {"heavy_imports": sorted({name for run in first + second for name in run.heavy})}
    report.checks = [Check(_LIMITS[args.limit], worst)]
    return report


def generate(args: argparse.Namespace, work: Path) -> ChildRun:
    """One ``kiln generate`` of a random model; a flat image is no error here, its weights mean nothing."""
    size = str(args.size)
    return run_kiln(
        *("generate", "red apple", "-m", args.bundle, "-W", size, "-H", size, "-s", "1"),
        *("--steps", str(args.steps), "--backend", args.backend, "-o", work / "image.png"),
        cache=work / "cache",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Peak memory of generating with full-size SD1.5.")
    made.add_argument("bundle", type=Path, help="a full-size SD1.5 bundle: WORK/bundle of export_cost")
    made.add_argument("--repeat", type=positive, default=1)
    made.add_argument("--steps", type=positive, default=2)
    made.add_argument("--size", type=positive, default=512, help="pixels a side")
    made.add_argument("--backend", default="openvino")
    made.add_argument("--limit", choices=_LIMITS, default="fp16", help="the storage type of the bundle")
    made.add_argument("--json", type=Path, default=Path("run_memory.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
