"""What adapters cost: ten of different families in one bake of full-size SD1.5, and each family by itself.

    python -m kiln.benchmarks.adapter_cost WORK [--repeat 3]

WORK is the folder of ``export_cost``. Baking is the whole command ``kiln bake`` in a fresh process, of all
ten and of the first of them in turn; of the ten the worst peak of memory counts. What a family costs is the
time of its changes alone, without reading and writing the model, divided by the number of its modules.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ..bundle import is_bundle
from ..errors import AdapterError
from ..exporters.adapters.base import AdapterRef
from ..exporters.adapters.plan import BakePlan, plan_bake
from ..exporters.tensors import TensorFile
from .children import ChildRun, run_kiln
from .export_cost import export_own, prepared_model
from .random_adapters import FAMILIES, modules, write_all
from .random_models import weight_shapes
from .rebake_cost import read_through
from .report import Check, Report, Samples, positive, ratio_check, run

_NETWORKS = ("unet", "text_encoder")
_STRENGTH = 0.5


def measure(args: argparse.Namespace) -> Report:
    """Bake ten and one in turns; then every family apart."""
    report = Report("adapter_cost", vars(args))
    work: Path = args.work
    if not is_bundle(work / "bundle"):
        export_own(work, prepared_model(work))
    adapters = write_all(work / "adapters")
    counts = check_all_apply(adapters)
    paths = list(adapters.values())
    one: list[ChildRun] = []
    ten: list[ChildRun] = []
    # The first opening of a bundle reads every byte to verify it, which is no cost of an adapter.
    bake_once(work, paths[:1])
    for index in range(args.repeat):
        turns = [(one, paths[:1]), (ten, paths)]
        for runs, chosen in turns if index % 2 == 0 else reversed(turns):
            runs.append(bake_once(work, chosen))
    shutil.rmtree(work / "baked")
    report.facts = {
        "modules": counts,
        "adapter_bytes": {name: path.stat().st_size for name, path in adapters.items()},
        "strength": _STRENGTH,
    }
    first = next(iter(adapters))
    single = Samples(f"kiln bake, {first}", "s", tuple(run.seconds for run in one))
    whole = Samples(f"kiln bake, {len(paths)} families", "s", tuple(run.seconds for run in ten))
    memory = Samples(
        f"kiln bake, {len(paths)} families, peak RSS", "GB", tuple(r.peak_rss_bytes / 1e9 for r in ten)
    )
    alone = Samples(f"kiln bake, {first}, peak RSS", "GB", tuple(r.peak_rss_bytes / 1e9 for r in one))
    report.samples = [single, whole, alone, memory]
    report.samples += [
        Samples(f"{name}, {counts[name]} modules", "ms/module", family_cost(work, path, args.repeat))
        for name, path in adapters.items()
    ]
    # The worst run counts: memory that is needed once has to be there.
    report.checks = [
        Check("adapters_peak_rss_gb", max(memory.values)),
        ratio_check("adapters_time_ratio", whole, single),
    ]
    return report


def check_all_apply(adapters: dict[str, Path]) -> dict[str, int]:
    """How many modules each adapter changes; an error when one is left out, as its time says nothing."""
    shapes = {network: weight_shapes(network) for network in _NETWORKS}
    counts = {}
    for family in FAMILIES:
        expected = sum(1 for _ in modules(family))
        with plan_bake(shapes, [AdapterRef(adapters[family.name])]) as plan:
            (found,) = plan.reports
        counts[family.name] = sum(found.matched_modules.values())
        if found.unmatched_keys or counts[family.name] != expected:
            raise AdapterError(
                f"{adapters[family.name]}: {counts[family.name]} modules are applied and "
                f"{len(found.unmatched_keys)} keys are not; expected all {expected} modules"
            )
    return counts


def bake_once(work: Path, adapters: list[Path]) -> ChildRun:
    """One ``kiln bake`` into ``work/baked``."""
    shutil.rmtree(work / "baked", ignore_errors=True)
    os.sync()
    for path in (work / "model", work / "bundle", *adapters):
        read_through(path)
    options = [part for path in adapters for part in ("--lora", f"{path}:{_STRENGTH}")]
    return run_kiln("bake", work / "bundle", "-o", work / "baked", *options, cache=work / "cache")


def family_cost(work: Path, adapter: Path, repeat: int) -> tuple[float, ...]:
    """Milliseconds for each module of one adapter, its tensors read and its changes added and cast."""
    shapes = {network: weight_shapes(network) for network in _NETWORKS}
    found = []
    for _ in range(repeat):
        read_through(adapter)
        seconds, count = 0.0, 0
        # As in a bake, which works on tensors side by side.
        with threadpool_limits(1), plan_bake(shapes, [AdapterRef(adapter, _STRENGTH)]) as plan:
            for network in _NETWORKS:
                weights = TensorFile.open(work / "bundle" / network / "weights.safetensors")
                for name in filter(weights.infos.__contains__, shapes[network]):
                    if plan.is_touched(network, name):
                        seconds += baked_in(plan, network, name, weights.read(name))
                weights.close()
            count = sum(plan.reports[0].matched_modules.values())
        found.append(seconds * 1e3 / count)
    return tuple(found)


def baked_in(plan: BakePlan, network: str, name: str, weight: np.ndarray) -> float:
    """Seconds of one tensor's changes."""
    out = np.empty_like(weight)
    start = time.perf_counter()
    plan.bake_into(network, name, weight, out)
    return time.perf_counter() - start


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Time and memory of baking ten adapters of ten families.")
    made.add_argument("work", type=Path, help="the folder of export_cost")
    made.add_argument("--repeat", type=positive, default=3)
    made.add_argument("--json", type=Path, help="default: adapter_cost.json in WORK")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
