"""What baking another LoRA into a full-size bundle costs, as a ratio to copying the same bytes.

    python -m kiln.benchmarks.rebake_cost WORK [--repeat 7]

WORK is the folder of ``export_cost``. Baking is the whole command ``kiln bake`` in a fresh process; copying
the bundle is done in this one, every file brought to the disk as publishing a bundle does. They take turns,
and the order changes from round to round. Before each turn everything written has reached the disk and
what is going to be read is in the file cache, so that neither inherits the state the other left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from ..bundle import is_bundle
from .children import run_kiln
from .export_cost import export_own, prepared_model
from .random_models import random_lora
from .report import Report, Samples, positive, ratio_check, run


def measure(args: argparse.Namespace) -> Report:
    """Bake and copy in turns."""
    report = Report("rebake_cost", vars(args))
    work: Path = args.work
    if not is_bundle(work / "bundle"):
        export_own(work, prepared_model(work))
    # Two LoRAs in turn: every bake is one of another LoRA.
    loras = [random_lora(work / f"lora-{seed}.safetensors", seed=seed) for seed in (1, 2)]
    # The first opening of a bundle reads every byte to verify it; that is shown apart.
    first = bake_once(work, loras[1])
    baked: list[float] = []
    copied: list[float] = []
    for index in range(args.repeat):
        turns = [(baked, lambda lora: bake_once(work, lora)), (copied, lambda _: copy_once(work))]
        for samples, turn in turns if index % 2 == 0 else reversed(turns):
            samples.append(turn(loras[index % 2]))
    shutil.rmtree(work / "baked")
    report.facts = {"bytes": read_through(work / "bundle"), "lora_bytes": loras[0].stat().st_size}
    ours, theirs = Samples("kiln bake", "s", tuple(baked)), Samples("copy and fsync", "s", tuple(copied))
    report.samples = [Samples("kiln bake, bundle not verified yet", "s", (first,)), ours, theirs]
    report.checks = [ratio_check("rebake_time_ratio", ours, theirs)]
    return report


def bake_once(work: Path, lora: Path) -> float:
    """Seconds of one ``kiln bake`` into ``work/baked``."""
    shutil.rmtree(work / "baked", ignore_errors=True)
    os.sync()
    for path in (work / "model", work / "bundle", lora):
        read_through(path)
    arguments = ("bake", work / "bundle", "-o", work / "baked", "--lora", f"{lora}:0.8")
    return run_kiln(*arguments, cache=work / "cache").seconds


def copy_once(work: Path) -> float:
    """Seconds of copying the bundle to ``work/copied``: the bytes that baking writes anew."""
    target = work / "copied"
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    read_through(work / "bundle")
    seconds = copy_to_disk(work / "bundle", target)
    shutil.rmtree(target)
    return seconds


def read_through(path: Path) -> int:
    """Bring a file, or all files of a folder, into the file cache; how many bytes they have."""
    done = 0
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while block := stream.read(1 << 22):
                    done += len(block)
    return done


def copy_to_disk(source: Path, target: Path) -> float:
    """Copy a folder and bring every file and folder to the disk; seconds it took."""
    start = time.perf_counter()
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in [*sorted(target.rglob("*")), target]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return time.perf_counter() - start


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Time of baking another LoRA against copying the bytes.")
    made.add_argument("work", type=Path, help="the folder of export_cost")
    made.add_argument("--repeat", type=positive, default=7)
    made.add_argument("--json", type=Path, help="default: rebake_cost.json in WORK")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when the limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
