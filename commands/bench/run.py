"""``kiln bench run``: measure a workload on every combination of what the options name."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ..options import MODEL_HELP

_FOLDER = Path("kiln-bench")


@click.command()
@click.argument("workload", default="quick")
@click.option("-m", "--model", help=f"{MODEL_HELP} The workload's own if not given.")
@click.option("--backend", "backends", multiple=True, help="A backend, with a device: torch:cuda; or all.")
@click.option("--precision", "precisions", multiple=True, help="auto, fp32, bf16 or fp16.")
@click.option("--size", "sizes", multiple=True, help="Pixels: 512 or 512x768, width by height.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Images denoised together.")
@click.option("--steps", multiple=True, type=click.IntRange(1), help="Denoising steps.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE:STRENGTH", help="Adapters, joined by +; or none."
)
@click.option("--threads", multiple=True, type=click.IntRange(0), help="CPU threads; 0: the engine chooses.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=PYTHON", help="Another project, in its Python.")
@click.option("--against", metavar="BUNDLE", help="Measure this one too, and compare the pictures with its.")
@click.option("--min-images", type=click.IntRange(1), help="Timed batches at least; the workload's own.")
@click.option(
    "--min-seconds", type=click.FloatRange(0), help="Seconds they take at least; the workload's own."
)
@click.option(
    "--delay", type=click.FloatRange(0), default=0.0, help="Seconds to cool down before each batch."
)
@click.option(
    "--parity/--no-parity", default=True, help="Compare with the reference; without, rows are invalid."
)
@click.option("--explain", is_flag=True, help="Find where each configuration parts from the reference first.")
@click.option("--lpips", metavar="FILE", help="Tell LPIPS too: AlexNet's weights, or hub to fetch them.")
@click.option("--clip", metavar="FOLDER", help="Tell the CLIP score too: a CLIP model, or hub to fetch it.")
@click.option(
    "--aa/--no-aa", default=None, help="Measure the first configuration twice, for the noise floor."
)
@click.option("--cold/--no-cold", default=True, help="Measure compiling with an empty cache.")
@click.option("--resume", is_flag=True, help="Go on with the run that was interrupted in this folder.")
@click.option("--fresh", is_flag=True, help="Drop the run that was interrupted in this folder.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=_FOLDER,
    help="Results folder.",
)
@click.option("--report/--no-report", default=True, help="Write report.html into the results folder.")
@click.option("-v", "--verbose", is_flag=True, help="Print progress line by line, and what workers log.")
def run(workload: str, **options: Any) -> None:
    """Measure WORKLOAD: quick, standard, full, random, or a .json file.

    Options that repeat are combined. Each configuration runs in processes of its own: compiling with an empty
    cache in one, the timed batches in another. All that fit into memory take turns. Exit code 1 when a row is
    invalid.

    Example:

    \b
        kiln bench run quick
        kiln bench run standard --backend openvino --backend onnxruntime --precision fp32 -o results
        kiln bench run full -m model.safetensors --backend all --size 512 --size 768
        kiln bench run random --backend openvino --peer diffusers=venv/bin/python
    """
    from ...benchmarks.harness.driver import Run

    say = _Progress(verbose=options["verbose"])
    plan = _plan(workload, options, say)
    # A service manager's or a batch system's way to say stop is to be as kind as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(plan, say)
    outcomes = run.measure()
    say.end()
    records = [outcome.record for outcome in outcomes]
    _print(records)
    if options["report"] and records:
        _report(options["output"])
    click.echo(f"records: {options['output'] / 'records.jsonl'}, run {run.facts.run}", err=True)
    if any(outcome.failed for outcome in outcomes):
        click.get_current_context().exit(1)


def _plan(name: str, options: dict[str, Any], say: _Progress) -> Any:
    from ...benchmarks.fidelity.learned import LearnedOptions, check_learned
    from ...benchmarks.harness.axes import Axes, Variant, configurations, lora_variants
    from ...benchmarks.harness.models import find_bundle, parse_adapters
    from ...benchmarks.harness.partial import check_interrupted
    from ...benchmarks.harness.plan import Plan, RunOptions
    from ...benchmarks.harness.workloads import load_workload
    from ...exporters.resolve import resolve_model

    if options["resume"] and options["fresh"]:
        raise UsageError("--resume goes on with what --fresh drops; give one or the other")
    workload = load_workload(name)
    names = ("backends", "precisions", "sizes", "batches", "steps", "loras", "threads", "peers")
    axes = Axes(**{key: options[key] for key in names})
    learned = LearnedOptions(options["lpips"], options["clip"])
    check_learned(learned)
    check_interrupted(options["output"], resume=options["resume"], fresh=options["fresh"])
    sweep = lora_variants(axes)
    variants = []
    for text in sweep:
        bundle = find_bundle(workload, options["model"], parse_adapters(text), say).bundle
        variants.append(Variant(bundle, _short(text) if len(sweep) > 1 or axes.loras else ""))
    against = None
    if options["against"]:
        against = resolve_model(options["against"]).bundle
        variants = [Variant(v.bundle, v.name or v.bundle.name) for v in variants]
        variants.append(Variant(against, against.name))
    least = options["min_images"]
    run_options = RunOptions(
        directory=options["output"],
        min_batches={"cpu": least, "gpu": least} if least else workload.min_batches,
        min_seconds=workload.min_seconds if options["min_seconds"] is None else options["min_seconds"],
        delay_s=options["delay"],
        parity=options["parity"],
        cold=options["cold"],
        aa=workload.aa if options["aa"] is None else options["aa"],
        explain=options["explain"],
        learned=learned if learned != LearnedOptions() else None,
        resume=options["resume"],
        command=_command(),
    )
    bundles = {variant.bundle.path: variant.bundle for variant in variants}
    return Plan(tuple(configurations(workload, axes, variants)), bundles, run_options, against)


def _command() -> tuple[str, ...]:
    """The command line, with files by their names only: a folder may be named for whom it belongs to."""
    return ("kiln", *(re.sub(r"[^=+]*/", "", argument) for argument in sys.argv[1:]))


def _short(lora: str) -> str:
    """A value of --lora without folders and suffixes."""
    return "+".join(Path(part).name.replace(".safetensors", "") for part in lora.split("+"))


def _print(records: list[Any]) -> None:
    """The table, on standard output."""
    from rich.console import Console

    from ...benchmarks.html.terminal import print_records

    print_records(records, Console())


def _report(folder: Path) -> None:
    from ...benchmarks.html.build import write_report

    click.echo(write_report(folder))


class _Progress:
    """What happens, on standard error: a line that is overwritten on a terminal, else a line each."""

    def __init__(self, *, verbose: bool) -> None:
        self._over = sys.stderr.isatty() and not verbose
        self._width = 0
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        text = f"{time.monotonic() - self._start:7.1f} s  {text}"
        if not self._over:
            click.echo(text, err=True)
            return
        click.echo("\r" + text[:100].ljust(self._width), nl=False, err=True)
        self._width = min(len(text), 100)

    def end(self) -> None:
        """Clear the line."""
        if self._over and self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)
