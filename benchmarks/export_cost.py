"""What exporting full-size Stable Diffusion 1.5 costs: time and peak memory, against optimum-intel.

    python -m kiln.benchmarks.export_cost WORK [--peer-python PATH] [--repeat N] [--peer-repeat N]

Every export is a fresh process and is timed from its start to its exit, imports and all. WORK keeps the
random model, the last bundle and the peer's folder, which the other benchmarks use.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from ..bundle import open_bundle
from .children import ChildRun, run_kiln, run_optimum_intel
from .random_models import write_random_model
from .report import Check, Report, Samples, positive, ratio_check, run


def measure(args: argparse.Namespace) -> Report:
    """Export with Kiln and, if there is a peer, with optimum-intel, taking turns."""
    report = Report("export_cost", vars(args))
    model = prepared_model(args.work)
    own: list[ChildRun] = []
    peer: list[ChildRun] = []
    for index in range(max(args.repeat, args.peer_repeat if args.peer_python else 0)):
        if index < args.repeat:
            own.append(export_own(args.work, model))
        if args.peer_python and index < args.peer_repeat:
            peer.append(export_peer(args.work, model, args.peer_python))
    # A fast export of a bundle that does not open would be worth nothing.
    size = sum(
        int(facts["size"])
        for facts in open_bundle(args.work / "bundle", verify="full").manifest["files"].values()
    )
    heavy = sorted({name for run in own for name in run.heavy})
    report.facts = {"bundle_bytes": size, "heavy_imports": heavy}
    seconds = Samples("kiln export", "s", tuple(run.seconds for run in own))
    memory = Samples("kiln export, peak RSS", "GB", tuple(run.peak_rss_bytes / 1e9 for run in own))
    report.samples += [seconds, memory]
    # The worst run counts: memory that is needed once has to be there.
    report.checks += [
        Check("export_peak_rss_gb", max(memory.values)),
        Check("export_heavy_imports", len(heavy)),
    ]
    if peer:
        report.facts["peer_versions"] = dict(peer[0].versions)
        theirs = Samples("optimum-intel export", "s", tuple(run.seconds for run in peer))
        their_memory = tuple(run.peak_rss_bytes / 1e9 for run in peer)
        report.samples += [theirs, Samples("optimum-intel export, peak RSS", "GB", their_memory)]
        report.checks.append(ratio_check("export_time_ratio", seconds, theirs))
    return report


def prepared_model(work: Path) -> Path:
    """The random model in ``work``, written if it is not there."""
    model = work / "model"
    if not model.exists():
        partial = work / f"model.{os.getpid()}.partial"
        write_random_model(partial)
        partial.rename(model)
    return model


def export_own(work: Path, model: Path) -> ChildRun:
    """One ``kiln export`` into ``work/bundle``."""
    shutil.rmtree(work / "bundle", ignore_errors=True)
    os.sync()  # so that nobody pays for what the run before has still to write
    return run_kiln("export", model, "-o", work / "bundle", cache=work / "cache")


def export_peer(work: Path, model: Path, python: str) -> ChildRun:
    """One export by optimum-intel into ``work/peer``, weights stored in float16 as Kiln's are."""
    shutil.rmtree(work / "peer", ignore_errors=True)
    os.sync()
    return run_optimum_intel(python, model, work / "peer")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Time and peak memory of exporting full-size SD1.5.")
    made.add_argument("work", type=Path, help="folder for some 8 GB of models")
    made.add_argument("--peer-python", help="Python that has optimum-intel; without it there is no ratio")
    made.add_argument("--repeat", type=positive, default=3)
    made.add_argument("--peer-repeat", type=positive, default=1)
    made.add_argument("--json", type=Path, help="default: export_cost.json in WORK")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
