"""A UNet step of Stable Diffusion 1.5 in int8: Kiln's bundle against optimum-intel's full int8 by NNCF.

    python -m kiln.benchmarks.int8_step INT8_BUNDLE PEER [--float FP16_BUNDLE] [--rounds 9] [--threads N]
    python -m kiln.benchmarks.int8_step INT8_BUNDLE PEER --make-peer PYTHON OPTIMUM_FOLDER

INT8_BUNDLE is of ``kiln export --precision int8-full``, which keeps some layers in floats, or with
``--most-kept 0`` none, as NNCF does. PEER is a folder with the UNet that optimum-intel makes with
``OVQuantizationConfig``: the second form makes it from OPTIMUM_FOLDER, an export of the same weights by
optimum-intel, in PYTHON, the interpreter that has optimum-intel and nncf. Both are compiled by one OpenVINO
in one process with the same properties and static shapes (batch 2, for guidance), and take turns.

Outputs are not compared with each other, because each has its own error; Kiln's is what its export measured,
and stands in the report. One image is drawn in a process of its own for the peak of memory. With
FP16_BUNDLE, its size is compared, and decoding by the VAE, where that is in int8 too.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..backends.base import PrepareOptions
from ..backends.openvino_backend import OpenVINOBackend
from ..bundle import Bundle, open_bundle
from ..errors import UsageError
from .children import run_kiln, run_script
from .report import Check, Report, Samples, positive, ratio_check, run
from .unet_step import Step, interleaved, make_feeds, own_step, peer_step

_SMALL_CELLS = 16

# What ``OVQuantizer`` calls for a UNet with ``OVQuantizationConfig()``. Ranges do not change the speed, so
# three calls with small latents are enough.
_MAKE_PEER = """
import sys
import numpy as np
import nncf
import openvino
from optimum.intel import OVQuantizationConfig
from optimum.intel.openvino.quantization import _full_quantization
model = openvino.Core().read_model(sys.argv[1] + "/unet/openvino_model.xml")
port, rng = model.input("timestep"), np.random.default_rng(0)
shape, kind = [1] * port.partial_shape.rank.get_length(), port.element_type.to_dtype()
calls = [
    {
        "sample": rng.standard_normal((2, 4, 32, 32), np.float32),
        "timestep": np.full(shape, step, kind),
        "encoder_hidden_states": rng.standard_normal((2, 77, 768), np.float32),
    }
    for step in (1, 500, 990)
]
made = _full_quantization(model, OVQuantizationConfig(num_samples=3), nncf.Dataset(calls))
openvino.save_model(made, sys.argv[2] + "/unet/openvino_model.xml", compress_to_fp16=True)
report(0)
"""


def measure(args: argparse.Namespace) -> Report:
    """Time both in turns, and look at kernels, size and memory of Kiln's."""
    report = Report("int8_step", vars(args))
    bundle = open_bundle(args.bundle)
    if "int8" not in str(bundle.manifest.get("storage")):
        raise UsageError(f"{args.bundle} is not of int8; make one with: kiln export --precision int8-full")
    if args.make_peer:
        python, folder = args.make_peer
        make_peer(python, folder, args.peer)
    feeds = make_feeds(args.batch, args.size // 8)
    source = bundle.source("unet")
    ours, in_force = own_step(source, feeds, args.precision, args.threads)
    theirs = peer_step(args.peer, feeds, in_force)
    times = interleaved({"kiln": ours, "optimum-intel": theirs}, feeds, args.rounds, args.warmups)
    del ours, theirs
    gc.collect()
    own_times, peer_times = (Samples(name, "s", values) for name, values in times.items())
    report.samples = [own_times, peer_times]
    report.facts = {
        "in_force": {k: str(v) for k, v in in_force.items()},
        "precision": bundle.manifest["storage"],
        "parity": bundle.manifest.get("parity", "not measured"),
        "kernels": kernels(bundle),
    }
    report.checks = [ratio_check("int8_step_time_ratio", own_times, peer_times), *_parity_checks(bundle)]
    if args.float:
        floats = open_bundle(args.float)
        report.checks.append(Check("int8_size_ratio", _size(bundle) / _size(floats)))
        if bundle.manifest["components"]["vae_decoder"].get("int8", {}).get("activations"):
            decoding = decode_times({"int8": bundle, "floats": floats}, args)
            report.samples += decoding
            report.checks.append(ratio_check("int8_decode_time_ratio", *decoding))
    if not args.no_memory:
        report.checks.append(Check("int8_peak_rss_gb", peak_rss_gb(args)))
    return report


def decode_times(bundles: Mapping[str, Bundle], args: argparse.Namespace) -> list[Samples]:
    """Seconds to decode one image with each bundle's VAE, taking turns."""
    cells = args.size // 8
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, cells, cells), np.float32)}
    options = PrepareOptions(
        {name: array.shape for name, array in feeds.items()},
        precision=args.precision,
        threads=args.threads,
    )

    def step(bundle: Bundle) -> Step:
        session = OpenVINOBackend().prepare(bundle.source("vae_decoder"), options)
        return lambda given: session.run(given)["sample"]

    steps = {name: step(bundle) for name, bundle in bundles.items()}
    times = interleaved(steps, feeds, args.rounds, args.warmups)
    return [Samples(f"decoding, {name}", "s", values) for name, values in times.items()]


def kernels(bundle: Bundle) -> dict[str, int]:
    """How many convolutions and fully connected layers run in which kernel, as OpenVINO's own graph says."""
    import openvino

    feeds = make_feeds(2, _SMALL_CELLS)
    core = openvino.Core()
    model = core.read_model(bundle.source("unet").graph_path)
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    compiled = core.compile_model(model, "CPU")
    found: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in ("Convolution", "FullyConnected"):
            found[f"{kind} {facts['primitiveType'].astype(str)}"] += 1
    return dict(found)


def make_peer(python: str, folder: str, out: Path) -> None:
    """optimum-intel's full int8 quantization of the UNet it exported to ``folder``.

    Raises:
        ChildError: it failed; the text ends with what it last wrote.
    """
    (out / "unet").mkdir(parents=True, exist_ok=True)
    run_script(python, _MAKE_PEER, (folder, out), {"PYTHONPATH": ""})


def peak_rss_gb(args: argparse.Namespace) -> float:
    """Peak resident memory of drawing one image in two steps with an empty cache, GB of 1e9 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        size = ("-W", str(args.size), "-H", str(args.size), "--steps", "2", "-q", "-s", "1")
        image = Path(folder) / "image.png"
        run = run_kiln(
            "generate",
            "a castle",
            "-m",
            args.bundle,
            *size,
            "--backend",
            "openvino",
            "-o",
            image,
            cache=Path(folder) / "cache",
        )
    return run.peak_rss_bytes / 1e9


def _parity_checks(bundle: Bundle) -> list[Check]:
    stem = str(bundle.manifest["storage"]).replace("-", "_")
    parity = bundle.manifest.get("parity", {})
    return [
        Check(f"{stem}_{name}", float(parity[name]))
        for name in ("image_psnr_db", "image_ssim")
        if name in parity
    ]


def _size(bundle: Bundle) -> int:
    return sum(int(facts["size"]) for facts in bundle.manifest["files"].values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="A UNet step in int8 against optimum-intel's.")
    made.add_argument("bundle", type=Path, help="a full-size SD1.5 bundle of --precision int8-full")
    made.add_argument("peer", type=Path, help="a folder with optimum-intel's int8 UNet")
    made.add_argument("--make-peer", nargs=2, metavar=("PYTHON", "FOLDER"), help="make it first")
    made.add_argument("--float", type=Path, help="the same model as fp16 bundle, to compare the size with")
    made.add_argument("--no-memory", action="store_true", help="do not draw an image for its memory")
    made.add_argument("--rounds", type=positive, default=9)
    made.add_argument("--warmups", type=positive, default=2)
    made.add_argument("--batch", type=positive, default=2)
    made.add_argument("--size", type=positive, default=512, help="pixels a side")
    made.add_argument("--threads", type=int, default=0, help="0 lets the engine choose")
    made.add_argument("--precision", default="auto", help="what is not int8 computes in")
    made.add_argument("--json", type=Path, default=Path("int8_step.json"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit 1 when a limit is missed."""
    return run(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
