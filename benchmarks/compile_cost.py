"""What preparing the UNet of Stable Diffusion 1.5 in OpenVINO costs: the first time, and from the cache.

    python -m kiln.benchmarks.compile_cost BUNDLE PEER [--repeat 3] [--size 512]

The first time is held against the same network from OpenVINO's own format (PEER, optimum-intel's export of
the same weights), read and compiled with the same properties. Every one is a fresh process, timed inside from
after the engine's start; the operating system's file cache is warm in all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .children import run_script
from .report import Check, Report, Samples, positive, ratio_check, run

_OWN = """
import sys, time, json
from pathlib import Path
from kiln.backends.base import PrepareOptions
from kiln.backends.openvino_backend import SHARED_SAMPLE, OpenVINOBackend
from kiln.bundle import open_bundle
source = open_bundle(sys.argv[1], verify="stamped").source("unet")
cells = int(sys.argv[3])
shapes = {"sample": (2, 4, cells, cells), "timestep": (), "encoder_hidden_states": (2, 77, 768)}
backend = OpenVINOBackend()
assert backend.devices()
options = PrepareOptions(
    shapes, precision=sys.argv[4], cache_dir=Path(sys.argv[2]), extra={SHARED_SAMPLE: True}
)
start = time.perf_counter()
session = backend.prepare(source, options)
print(json.dumps({"seconds": time.perf_counter() - start, "cached": session.in_force.from_cache,
                  "precision": session.in_force.precision}))
report(0)
"""

_PEER = """
import sys, time, json, openvino
core = openvino.Core()
core.available_devices
cells = int(sys.argv[3])
shapes = {"sample": [2, 4, cells, cells], "encoder_hidden_states": [2, 77, 768]}
start = time.perf_counter()
model = core.read_model(sys.argv[1])
names = {port.any_name: port.partial_shape.rank.get_length() for port in model.inputs}
model.reshape({name: shapes.get(name, [1] * rank) for name, rank in names.items()})
compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                                             "INFERENCE_PRECISION_HINT": sys.argv[2]})
request = compiled.create_infer_request()
print(json.dumps({"seconds": time.perf_counter() - start}))
report(0)
"""


@dataclass(frozen=True)
class Prepared:
    """One preparation: seconds, peak resident bytes of its process, precision, whether from the cache."""

    seconds: float
    peak_rss_bytes: int
    precision: str = ""
    cached: bool = False


def measure(args: argparse.Namespace) -> Report:
    """Prepare in turns: with an empty cache, with the one just filled, and the peer."""
    report = Report("compile_cost", vars(args))
    model = args.peer / "unet/openvino_model.xml"
    if not model.is_file():
        raise UsageError(f"{model} is not there; expected optimum-intel's folder, WORK/peer of export_cost")
    runs: dict[str, list[Prepared]] = {"first": [], "cached": [], "peer": []}
    sizes = []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as name:
            for kind in ("first", "cached"):
                runs[kind].append(prepare_own(args.bundle, Path(name), args.size // 8, args.precision))
            sizes.append(sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file()))
        hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[runs["first"][-1].precision]
        runs["peer"].append(prepare_peer(model, hint, args.size // 8))
    if any(run.cached for run in runs["first"]) or not all(run.cached for run in runs["cached"]):
        raise UsageError("the compiled model was not kept, or was there before; look at the warnings above")
    samples = {
        kind: Samples(f"{kind}: prepare the UNet", "s", tuple(run.seconds for run in found))
        for kind, found in runs.items()
    }
    for kind, found in runs.items():
        memory = tuple(run.peak_rss_bytes / 1e9 for run in found)
        report.samples += [samples[kind], Samples(f"{kind}: peak RSS", "GB", memory)]
    report.facts = {"cache_entry_bytes": sizes, "precision": runs["first"][-1].precision}
    report.checks = [
        ratio_check("compile_time_ratio", samples["first"], samples["peer"]),
        Check("compile_cached_s", samples["cached"].median),
    ]
    return report


def prepare_own(bundle: Path, cache: Path, cells: int, precision: str) -> Prepared:
    """Prepare the bundle's UNet in a fresh process."""
    run = run_script(sys.executable, _OWN, (bundle, cache, str(cells), precision), {})
    facts = json.loads(run.output.splitlines()[-1])
    return Prepared(facts["seconds"], run.peak_rss_bytes, facts["precision"], facts["cached"])


def prepare_peer(model: Path, hint: str, cells: int) -> Prepared:
    """Read and compile optimum-intel's UNet in a fresh process."""
    run = run_script(sys.executable, _PEER, (model, hint, str(cells)), {})
    return Prepared(json.loads(run.output.splitlines()[-1])["seconds"], run.peak_rss_bytes)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Time to prepare the SD1.5 UNet in OpenVINO.")
    made.add_argument("bundle", type=Path, help="a full-size SD1.5 bundle: WORK/bundle of export_cost")
    made.add_argument("peer", type=Path, help="optimum-intel's export: WORK/peer of export_cost")
    made.add_argument("--repeat", type=positive, default=3)
    made.add_argument("--size", type=positive, default=512, help="pixels a side")
    made.add_argument("--precision", default="auto", help="auto is bf16 where the processor has it")
    made.add_argument("--json", type=Path, default=Path("compile_cost.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
