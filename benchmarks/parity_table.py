"""Parity per backend and precision: components, latents and images against the fp32 reference, as a table.

    python -m kiln.benchmarks.parity_table BUNDLE [--backend openvino] [--precision bf16] [--size 256]
        [--steps 8] [--prompts 2] [--against BUNDLE] [--reference openvino]

``--backend`` and ``--precision`` repeat; every combination is a row, and one that a backend refuses says so.
The reference is drawn once: the same bundle, or that of ``--against``, in fp32 on the processor. Every row
runs in a process of its own. What is judged, and by which limit, stands below the table; exit 1 when a
limit is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..backends.registry import names
from ..bundle import Bundle, open_bundle
from ..errors import KilnError
from ..exporters.quantization.trajectories import GATE_PROMPTS
from .fidelity.child import FidelityError, child
from .fidelity.components import ComponentReport, measure_components, recording
from .fidelity.drawing import read_drawn
from .fidelity.latents import latent_gates
from .fidelity.limits import run_precision
from .fidelity.pictures import image_gates
from .fidelity.reference import plan_reference
from .fidelity.sampling import Sampling
from .fidelity.trial import Trial
from .records.record import Gate, ModelFacts, Requested, WorkloadFacts
from .report import positive

DEFAULT_BACKENDS = ("openvino", "onnxruntime", "torch")
DEFAULT_PRECISIONS = ("fp32", "bf16")
_COLUMNS = (
    ("component", "text_encoder", "relative_l2"),
    ("component", "unet", "relative_l2"),
    ("component", "vae_decoder", "relative_l2"),
    ("component", "unet", "cosine"),
    ("latents", "last step", "relative_l2"),
    ("latents", "last step", "cosine"),
    ("image", "", "psnr_db"),
    ("image", "", "ssim"),
)
_HEADER = (
    "backend, precision",
    "text encoder L2",
    "UNet L2",
    "VAE L2",
    "UNet cosine",
    "last latents L2",
    "cosine",
    "PSNR dB",
    "SSIM",
    "limits",
)


@dataclass(frozen=True)
class TableRow:
    """One configuration: its gates, or why there are none."""

    label: str
    gates: tuple[Gate, ...] = ()
    refused: str = ""
    judged: str = ""

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that did not hold."""
        return tuple(gate for gate in self.gates if not gate.passed)


def measure(trial: Trial, sampling: Sampling) -> TableRow:
    """One row; an engine that refuses is a row that says why."""
    label = f"{trial.requested.name} {trial.requested.precision}"
    try:
        components = measure_components(trial, sampling)
        gates, judged = _drawn(trial, sampling, components)
    except FidelityError as error:
        return TableRow(label, refused=str(error))
    return TableRow(label, (*components.gates, *gates), judged=judged)


def _drawn(trial: Trial, sampling: Sampling, components: ComponentReport) -> tuple[list[Gate], str]:
    """Latents and images of the whole run."""
    requested, made = trial.requested, recording(trial, sampling)
    with made as wanted, tempfile.TemporaryDirectory() as scratch, child(limits=trial.limits) as worker:
        worker.ask(
            "draw",
            bundle=str(trial.bundle.path),
            requested=asdict(requested),
            workload=asdict(trial.workload),
            sampling=asdict(sampling.of(trial.workload)),
            folder=scratch,
            cache=False,
        )
        latents, images = read_drawn(Path(scratch))
        reference_latents, reference_images = read_drawn(wanted)
    precision = run_precision(trial.bundle, requested, components.effective, trial.against)
    gates, _ = latent_gates(latents, reference_latents, requested, precision=precision)
    more, _ = image_gates(images, reference_images, requested, precision=precision)
    return [*gates, *more], precision


def markdown(rows: Iterable[TableRow]) -> str:
    """The table, and below it what was refused or missed."""
    lines = [_line(_HEADER), _line(["---", *["---:"] * (len(_HEADER) - 2), "---"])]
    notes = []
    for row in rows:
        if row.refused:
            notes.append(f"* {row.label}: {row.refused}")
            continue
        cells = [_cell(row.gates, *column) for column in _COLUMNS]
        verdict = f"{row.judged}: {'missed' if row.failed else 'held'}"
        lines.append(_line([row.label, *cells, "reported" if row.judged == "reported" else verdict]))
        notes += [
            f"* {row.label}: {gate.level} {gate.where}, {gate.metric} {gate.value}, limit {gate.limit}"
            for gate in row.failed
        ]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _cell(gates: Sequence[Gate], level: str, where: str, metric: str) -> str:
    found = [g for g in gates if g.level == level and g.metric == metric and (not where or g.where == where)]
    if not found:
        return ""
    value = found[0].value
    if value is None:
        return "not finite"
    if metric == "psnr_db":
        return f"{value:.1f}"
    return f"{value:.2g}" if metric == "relative_l2" else f"{value:.5f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def workload_of(bundle: Bundle, args: argparse.Namespace) -> WorkloadFacts:
    """What is drawn: prompts of the int8 gate, Euler over the whole schedule, the model's own guidance."""
    from ..runtime.pipeline import CFG_SCALE

    config = bundle.config("vae_decoder")
    tiny = config.get("_class_name") == "AutoencoderTiny"
    levels = config["decoder_block_out_channels" if tiny else "block_out_channels"]
    side = args.size or int(bundle.config("unet")["sample_size"]) * 2 ** (len(levels) - 1)
    return WorkloadFacts(
        id="parity_table@1",
        tier="",
        model=ModelFacts(bundle.name, bundle.family, bundle.content_digest),
        prompts=GATE_PROMPTS[: args.prompts],
        negative_prompt="",
        prompts_digest="",
        latents_digest="",
        seed=args.seed,
        sampler="euler",
        schedule="normal",
        steps=args.steps,
        cfg_scale=float(bundle.manifest.get("defaults", {}).get("cfg_scale", CFG_SCALE)),
        width=side,
        height=side,
        batch=1,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Parity per backend and precision, as a Markdown table.")
    made.add_argument("bundle", type=Path)
    made.add_argument("--backend", action="append", choices=names(), help="repeats")
    made.add_argument("--precision", action="append", help="fp32, bf16, fp16 or auto; repeats")
    made.add_argument("--against", type=Path, help="the reference is this bundle, in fp32")
    made.add_argument(
        "--reference", choices=("torch", "openvino", "onnxruntime"), help="which engine it runs on"
    )
    made.add_argument("--size", type=positive, help="pixels a side; the model's own by default")
    made.add_argument("--steps", type=positive, default=8)
    made.add_argument("--prompts", type=int, choices=(1, 2, 3), default=3)
    made.add_argument("--seed", type=int, default=1000)
    made.add_argument("--points", type=positive, default=4, help="UNet calls that are compared one by one")
    made.add_argument(
        "--force-precision", action="store_true", help="torch only: also where the processor is slow at it"
    )
    made.add_argument("--recordings", type=Path, help="keep what the reference gave here, for the next run")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit 1 when a limit is missed."""
    args = parser().parse_args(arguments)
    try:
        bundle = open_bundle(args.bundle)
        against = open_bundle(args.against) if args.against else None
        reference = plan_reference(against or bundle, {args.reference} if args.reference else None)
        sampling = Sampling(args.prompts, args.steps, args.points)
        with tempfile.TemporaryDirectory(prefix="kiln-parity-") as scratch:
            workload = workload_of(bundle, args)
            recordings = args.recordings or Path(scratch)
            rows = []
            for name in args.backend or DEFAULT_BACKENDS:
                for precision in args.precision or DEFAULT_PRECISIONS:
                    print(f"{name} {precision} ...", file=sys.stderr, flush=True)
                    options = {"force_precision": True} if args.force_precision and name == "torch" else {}
                    asked = Requested("kiln", name, "auto", precision, options=options)
                    trial = Trial(bundle, asked, reference, workload, against=against, recordings=recordings)
                    rows.append(measure(trial, sampling))
    except KilnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{bundle.name}, {workload.width}x{workload.height}, {args.steps} steps, {args.prompts} prompts; "
        f"reference: {(against or bundle).name} on {reference.name} {reference.precision}\n"
    )
    print(markdown(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
