"""Samples, what is said about them, and the report of a script's measurement: a table, a JSON file, an exit
code.

The scripts of this folder measure a part of Kiln, an export, a step, a start, in seconds or megabytes, and
hold ratios against limits. ``records.record`` is the other form of result, that of ``kiln bench``: one
configuration that draws images. It cannot serve here: it needs a workload with prompts and noise, what each
network reports to be in force, parity and a verdict, which others verify. A script has none of these, and a
record that may lack them would be accepted from ``kiln bench`` too. What both say of samples, the machine and
limits is written once, in ``records.stats``, ``records.bootstrap``, ``machine`` and ``parity``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import KilnError
from .machine import Machine, describe_machine, load_average
from .parity import THRESHOLDS
from .records.bootstrap import ratio_interval
from .records.stats import mad_of


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in the order they were made; none is ever dropped."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def mad(self) -> float:
        """Median absolute deviation from the median: the spread that one outlier does not change."""
        return mad_of(self.values)

    def row(self) -> dict[str, Any]:
        """Everything that is said about these samples, and the samples."""
        return {
            "name": self.name,
            "unit": self.unit,
            "count": len(self.values),
            "median": self.median,
            "mad": self.mad,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


@dataclass(frozen=True)
class Check:
    """A figure held against its limit in ``parity.THRESHOLDS``."""

    threshold: str
    value: float
    interval: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return THRESHOLDS[self.threshold].holds(self.value)

    def __str__(self) -> str:
        limit = THRESHOLDS[self.threshold]
        spread = f" (95 % {self.interval[0]:.3g} to {self.interval[1]:.3g})" if self.interval else ""
        side = "at most" if limit.at_most else "at least"
        verdict = "ok" if self.passed else "MISSED"
        return f"{verdict:6} {self.threshold}: {self.value:.4g}{spread}, {side} {limit.limit:g}: {limit.why}"

    def row(self) -> dict[str, Any]:
        """The figure, its limit and the verdict."""
        limit = THRESHOLDS[self.threshold]
        return {
            "threshold": self.threshold,
            "value": self.value,
            "interval_95": self.interval,
            "limit": limit.limit,
            "at_most": limit.at_most,
            "passed": self.passed,
        }


def ratio_check(threshold: str, above: Samples, below: Samples) -> Check:
    """The ratio of two medians with its interval."""
    return Check(threshold, above.median / below.median, ratio_interval(above.values, below.values))


@dataclass
class Report:
    """One measurement: what was run, on what, every sample, and whether the limits hold."""

    benchmark: str
    arguments: dict[str, Any]
    machine: Machine = field(default_factory=describe_machine)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    load_before: float | None = field(default_factory=load_average)
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The whole record, as JSON holds it."""
        return {
            "schema": "kiln-benchmark/1",
            "benchmark": self.benchmark,
            "started": self.started,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in self.arguments.items()},
            "machine": asdict(self.machine),
            "load_average": {"before": self.load_before, "after": load_average()},
            "facts": self.facts,
            "samples": [samples.row() for samples in self.samples],
            "checks": [check.row() for check in self.checks],
            "passed": self.passed,
        }

    def finish(self, path: Path) -> int:
        """Print the table, write the JSON; 0 when every limit holds, else 1."""
        record = self.as_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        machine = self.machine
        print(f"{self.benchmark} on {machine.cpu}, {machine.threads} threads, {machine.system}")
        print(f"load average {self.load_before} before, {record['load_average']['after']} after")
        print(table(self.samples))
        for check in self.checks:
            print(check)
        print(f"samples in {path}")
        return 0 if self.passed else 1


def table(samples: Iterable[Samples]) -> str:
    """Samples as a table of plain text, one row each."""
    lines = [f"{'':44} {'median':>9} {'mad':>8} {'min':>9} {'max':>9}  n unit"]
    for s in samples:
        figures = f"{s.median:9.3f} {s.mad:8.3f} {min(s.values):9.3f} {max(s.values):9.3f}"
        lines.append(f"{s.name:44} {figures} {len(s.values):2} {s.unit}")
    return "\n".join(lines)


def positive(text: str) -> int:
    """An argument that counts something: an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a count; expected 1 or more")
    return value


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Report],
    arguments: list[str] | None,
) -> int:
    """Measure as the command line says and finish the report; the exit code.

    Args:
        parser: of the script; it has ``json``, and where that may be None also the folder ``work``.
        measure: the script's own.
        arguments: those of the process if None.

    Returns:
        0 when every limit holds, 1 when one is missed, else the code of Kiln's error, which is printed.
    """
    args = parser.parse_args(arguments)
    try:
        report = measure(args)
        return report.finish(args.json or args.work / f"{report.benchmark}.json")
    except KilnError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
