"""From the shell to the PNG with the bundled model: the first run, the runs after it, where the time goes.

    python -m kiln.benchmarks.startup [--model emoji] [--steps 20] [--first 3] [--second 5]

Each run is ``kiln generate -v`` in a fresh process, timed from outside; when one of its lines arrives is the
time of what it reports. A first run has an empty cache of its own, a second one that of a first. The
operating system's file cache is warm in all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .children import ChildError
from .report import Check, Report, Samples, positive, run

_PHASE = re.compile(r"^(load|encode|denoise|decode)\s+(.*?)\s*([\d.]+) s$")
_IMPORTS = re.compile(r"^start to first import ([\d.]+) s, all ([\d.]+) s$")
# In the order in which they happen; what is between them is named after what it does.
ROWS = (
    "interpreter, imports",
    "open the bundle, backend, tokenizer",
    "load text_encoder",
    "encode",
    "load unet",
    "denoise",
    "load vae_decoder",
    "decode",
    "write the PNG, exit",
)
BEFORE_FIRST_STEP = ROWS[: ROWS.index("denoise")]


@dataclass(frozen=True)
class Run:
    """One generation: seconds from start to exit, and of each of ``ROWS``; they add up to the whole."""

    total: float
    rows: dict[str, float]

    @property
    def before_first_step(self) -> float:
        """Seconds from the start of the process to the first denoising step."""
        return sum(self.rows[name] for name in BEFORE_FIRST_STEP)


def measure(args: argparse.Namespace) -> Report:
    """First runs in fresh caches, then second runs in the last of them."""
    report = Report("startup", vars(args))
    command = [sys.executable, "-W", "ignore", "-m", "kiln.cli", "generate", args.prompt, "-v"]
    command += ["-m", args.model, "--steps", str(args.steps), "-s", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = [run_once(command, folder / f"cache-{i}", folder) for i in range(args.first)]
        cache = folder / f"cache-{args.first - 1}"
        second = [run_once(command, cache, folder) for _ in range(args.second)]
    for label, runs in (("first", first), ("second", second)):
        for row in ROWS:
            report.samples.append(Samples(f"{label}: {row}", "s", tuple(run.rows[row] for run in runs)))
        report.samples.append(Samples(f"{label}: all", "s", tuple(run.total for run in runs)))
    before = Samples("second: before the first step", "s", tuple(run.before_first_step for run in second))
    report.samples.append(before)
    medians = {samples.name: samples.median for samples in report.samples}
    report.checks = [
        Check("startup_first_s", medians["first: all"]),
        Check("startup_second_s", medians["second: all"]),
        Check("startup_before_first_step_s", before.median),
    ]
    return report


def run_once(command: list[str], cache: Path, folder: Path) -> Run:
    """Generate one image and take the times at which the lines of ``-v`` arrive.

    Raises:
        ChildError: the command failed or wrote no image.
    """
    png = folder / "image.png"
    png.unlink(missing_ok=True)
    environment = {**os.environ, "KILN_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    lines: list[tuple[float, str]] = []
    start = time.perf_counter()
    quiet, read = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        [*command, "-o", str(png)], env=environment, stdout=quiet, stderr=read, text=True
    ) as child:
        lines.extend((time.perf_counter() - start, line.rstrip()) for line in child.stderr or ())
    total = time.perf_counter() - start
    if child.returncode or not png.is_file():
        raise ChildError(f"{' '.join(command)} failed: {' '.join(text for _, text in lines)[-1000:]}")
    return Run(total, split(lines, total))


def split(lines: list[tuple[float, str]], total: float) -> dict[str, float]:
    """Seconds of each of ``ROWS`` from lines of ``kiln generate -v`` and when they arrived.

    Raises:
        UsageError: a line is missing: another version of the command, or several batches.
    """
    ended: dict[str, tuple[float, float]] = {}
    imports = None
    for arrived, line in lines:
        if phase := _PHASE.match(line):
            name = f"load {phase[2]}" if phase[1] == "load" else phase[1]
            ended[name] = (arrived, float(phase[3]))
        elif found := _IMPORTS.match(line):
            imports = float(found[1])
    missing = [row for row in ROWS[2:-1] if row not in ended]
    if missing or imports is None:
        raise UsageError(f"kiln generate -v said nothing of {', '.join(missing) or 'its imports'}")
    rows = {ROWS[0]: imports}
    last = imports
    arrived, took = ended["load text_encoder"]
    rows[ROWS[1]] = max(0.0, arrived - took - last)
    last += rows[ROWS[1]]
    for row in ROWS[2:-1]:  # each phase begins where the one before it ended
        rows[row] = ended[row][0] - last
        last = ended[row][0]
    rows[ROWS[-1]] = total - last
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Time from the shell to the PNG with the bundled model.")
    made.add_argument("--model", default="emoji", help="a bundled model or a bundle")
    made.add_argument("--prompt", default="red apple")
    made.add_argument("--steps", type=positive, default=20)
    made.add_argument("--first", type=positive, default=3, help="runs with an empty cache")
    made.add_argument("--second", type=positive, default=5, help="runs with a filled cache")
    made.add_argument("--json", type=Path, default=Path("startup.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
