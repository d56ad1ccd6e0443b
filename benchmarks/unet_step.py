"""One UNet step of Stable Diffusion 1.5 in OpenVINO: the bundle's graph against optimum-intel's.

    python -m kiln.benchmarks.unet_step BUNDLE PEER [--rounds 9] [--threads N] [--precision auto]

PEER is a folder exported by optimum-intel from the same weights. Both are compiled by one OpenVINO in one
process with the same properties and static shapes, and take turns. The batch is that of guidance: one latent
twice, with two prompts, which the bundle's graph uses and optimum-intel's does not (``--plain`` leaves that
out). Before that both run once in fp32 on small latents: only graphs that compute the same are worth
comparing.

Outputs are compared at timestep 0. optimum-intel stores the frequencies of the timestep's embedding in
float16, which alone moves its fp32 output by 7e-3 at timestep 500 and 1.6e-2 at 999, where the bundle's
stays within 5e-6 of torch's; a step takes the same time at every timestep.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..backends.base import GraphSource, PrepareOptions
from ..backends.openvino_backend import SHARED_SAMPLE, OpenVINOBackend
from ..bundle import open_bundle
from ..errors import UsageError
from .parity import relative_l2
from .report import Check, Report, Samples, positive, ratio_check, run

Feeds = dict[str, np.ndarray]
Step = Callable[[Feeds], np.ndarray]

_CHECK_CELLS = 16  # side of the latents on which the two graphs are compared in fp32


def measure(args: argparse.Namespace) -> Report:
    """Compare the outputs, then time both in turns."""
    report = Report("unet_step", vars(args))
    source = open_bundle(args.bundle).source("unet")
    small = make_feeds(2, _CHECK_CELLS)
    ours, precise = own_step(source, small, "fp32", args.threads, plain=args.plain)
    theirs = peer_step(args.peer, small, precise)
    same = relative_l2(ours(small), theirs(small))
    del ours, theirs
    gc.collect()

    feeds = make_feeds(args.batch, args.size // 8)
    ours, in_force = own_step(source, feeds, args.precision, args.threads, plain=args.plain)
    theirs = peer_step(args.peer, feeds, in_force)
    report.facts = {"in_force": {k: str(v) for k, v in in_force.items()}}
    near = relative_l2(ours(feeds), theirs(feeds))  # also the first warm-up of each
    times = interleaved({"kiln": ours, "optimum-intel": theirs}, feeds, args.rounds, args.warmups - 1)
    own_times, peer_times = (Samples(name, "s", values) for name, values in times.items())
    report.samples = [own_times, peer_times]
    report.checks = [
        Check("component_relative_l2", same),
        Check("unet_step_relative_l2", near),
        ratio_check("unet_step_time_ratio", own_times, peer_times),
    ]
    return report


def make_feeds(batch: int, cells: int) -> Feeds:
    """Inputs by Kiln's names: latents of ``cells`` by ``cells``, timestep 0, text states; seeded.

    The second half of the batch has the latents of the first, as under guidance.
    """
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch // 2, 4, cells, cells), np.float32)
    return {
        "sample": np.concatenate([latents, latents]),
        "timestep": np.zeros((), np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 768), np.float32),
    }


def own_step(
    source: GraphSource, feeds: Feeds, precision: str, threads: int, *, plain: bool = False
) -> tuple[Step, dict[str, object]]:
    """The bundle's UNet, prepared as the pipeline does; and the properties that are in force."""
    options = PrepareOptions(
        {n: a.shape for n, a in feeds.items()},
        precision=precision,
        threads=threads,
        extra={} if plain else {SHARED_SAMPLE: True},
    )
    session = OpenVINOBackend().prepare(source, options)
    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[session.in_force.precision]
    properties: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": session.in_force.threads,
    }
    return lambda given: session.run(given)["out_sample"], properties


def peer_step(folder: Path, feeds: Feeds, properties: dict[str, object]) -> Step:
    """optimum-intel's UNet at the same shapes, compiled by the same engine with the same properties.

    Raises:
        UsageError: the folder holds no UNet of optimum-intel, or one with other inputs.
    """
    import openvino

    path = folder / "unet/openvino_model.xml"
    if not path.is_file():
        raise UsageError(f"{path} is not there; expected optimum-intel's folder, WORK/peer of export_cost")
    core = openvino.Core()
    model = core.read_model(path)
    names = [port.any_name for port in model.inputs]
    if sorted(names) != sorted(feeds):
        raise UsageError(f"{path} takes {sorted(names)}; expected {sorted(feeds)}")
    ranks = {port.any_name: port.partial_shape.rank.get_length() for port in model.inputs}
    # optimum-intel's timestep may be a scalar or a list of one.
    shapes = {n: (1,) * ranks[n] if n == "timestep" else feeds[n].shape for n in names}
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    compiled = core.compile_model(model, "CPU", properties)
    types = {port.any_name: port.element_type.to_dtype() for port in compiled.inputs}
    request = compiled.create_infer_request()

    def step(given: Feeds) -> np.ndarray:
        ready = {n: given[n].reshape(shapes[n]).astype(types[n], copy=False) for n in names}
        return np.asarray(request.infer(ready, share_inputs=True, share_outputs=False)[0])

    return step


def interleaved(
    steps: dict[str, Step], feeds: Feeds, rounds: int, warmups: int
) -> dict[str, tuple[float, ...]]:
    """Seconds of every run by name: in each round everything runs once, in an order that alternates."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-warmups, rounds):
        for name in list(steps) if index % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            steps[name](feeds)
            if index >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: tuple(values) for name, values in times.items()}


def even(text: str) -> int:
    """An argument that counts pairs."""
    value = positive(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{value} is odd; guidance runs pairs")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="A UNet step from the bundle against optimum-intel's.")
    made.add_argument("bundle", type=Path, help="a full-size SD1.5 bundle: WORK/bundle of export_cost")
    made.add_argument("peer", type=Path, help="optimum-intel's export: WORK/peer of export_cost")
    made.add_argument("--rounds", type=positive, default=9)
    made.add_argument("--warmups", type=positive, default=2)
    made.add_argument("--batch", type=even, default=2)
    made.add_argument("--plain", action="store_true", help="do not tell that the two latents are the same")
    made.add_argument("--size", type=positive, default=512, help="pixels a side")
    made.add_argument("--threads", type=int, default=0, help="0 lets the engine choose")
    made.add_argument("--precision", default="auto", help="auto is bf16 where the processor has it")
    made.add_argument("--json", type=Path, default=Path("unet_step.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
