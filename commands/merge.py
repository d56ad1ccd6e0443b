"""``kiln merge``: checkpoints to one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B [C]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="NAME.safetensors when A is a single file, a folder when A is one.",
)
@click.option(
    "--method",
    default="weighted-sum",
    help="weighted-sum: (1 - alpha) A + alpha B. add-difference: A + alpha (B - C).",
)
@click.option(
    "--alpha", type=float, help="How much of B (0.5 unless said), or of the difference (1 unless said)."
)
@click.option(
    "--block-weights",
    metavar="LIST",
    help="An alpha for each block of the UNet: 25 numbers (IN00 to IN11, M00, OUT00 to OUT11), or 26 with "
    "that of the text encoder and the VAE first, which else have --alpha.",
)
@click.option(
    "--precision", default="auto", help="Type weights are stored in: auto (those of A), fp32, fp16, bf16."
)
@click.option("--overwrite", is_flag=True, help="Replace a file, or a folder that Kiln wrote, of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(
    models: tuple[str, ...],
    output: Path,
    method: str,
    alpha: float | None,
    block_weights: str | None,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge checkpoints of one architecture, block by block if asked.

    The result has the layout of A and the names of its tensors, so what opens A opens it.

    Example:

    \b
        kiln merge a.safetensors b.safetensors -o both.safetensors --alpha 0.3
        kiln merge a.safetensors tuned.safetensors base.safetensors -o ab.safetensors --method add-difference
    """
    from ..exporters.merging.block_weights import BlockWeights
    from ..exporters.merging.merge import CheckpointMerge, merge_checkpoints
    from ..exporters.merging.sums import Method

    if alpha is None:
        alpha = 1.0 if method == "add-difference" else 0.5
    blocks = BlockWeights.parse(block_weights) if block_weights else None
    spec = CheckpointMerge(models, output, Method(method, alpha, blocks), precision, overwrite)
    report = merge_checkpoints(spec, count_progress())
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
        return
    for network, count in report.merged.items():
        click.echo(f"{network}: {count} tensors merged", err=True)
    for why, count in report.copied.items():
        click.echo(f"copied from A: {count} tensors ({why})", err=True)
    for why, count in report.dropped.items():
        click.echo(f"left out: {count} tensors ({why})", err=True)
    click.echo(report.output)


def count_progress() -> Callable[[str, int, int], None]:
    """Shows how many tensors of a network are done, on a terminal."""
    if not sys.stderr.isatty():
        return lambda network, done, total: None

    def show(network: str, done: int, total: int) -> None:
        click.echo(f"\r{network:14}{done / total:5.0%}", nl=False, err=True)
        if done == total:
            click.echo("", err=True)

    return show
