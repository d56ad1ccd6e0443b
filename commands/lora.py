"""``kiln lora``: describe, extract, merge and convert adapter files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .inspect import print_tree
from .merge import count_progress
from .options import MODEL_HELP, adapters

if TYPE_CHECKING:
    from ..exporters.lora_tools.extract import ExtractReport
    from ..exporters.lora_tools.merge import MergeReport

_SHOWN = 5
_OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write."
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what has this name.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")


@click.group()
def lora() -> None:
    """Describe, extract, merge and convert adapters: LoRA and its kin.

    Example:

    \b
        kiln lora inspect style.safetensors
    """


@lora.command("inspect")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-m", "--model", metavar="MODEL", help=f"Say what would be applied to it. {MODEL_HELP}")
@_JSON
def inspect_lora(path: Path, model: str | None, as_json: bool) -> None:
    """Say what an adapter is: family, dialect, ranks, layers, trigger words, how it was trained.

    Example:

    \b
        kiln lora inspect style.safetensors
        kiln lora inspect style.safetensors --model emoji --json
    """
    from ..exporters.lora_tools.describe import describe
    from ..exporters.resolve import locate_adapter

    located = path if path.exists() else locate_adapter(str(path)).path
    found = [one.as_dict() for one in describe(located, model)]
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, default=str, indent=1))
        return
    for one in found:
        tags, fit = one.pop("tags"), one.get("fit")
        one["tags"] = [f"{tag} ({count})" for tag, count in tags.items()]
        if fit:
            reasons = fit.pop("reasons")
            fit["refused"] = fit["refused"] or False
            fit["not_applied"] = [f"{key}: {why}" for key, why in reasons.items()]
        print_tree(
            {key: value for key, value in one.items() if value not in ({}, [], None) or key == "family"}
        )


@lora.command()
@click.argument("tuned")
@click.argument("base")
@_OUTPUT
@click.option("--rank", type=int, help="Rank of linear layers and convolutions of one pixel.")
@click.option(
    "--energy", type=float, metavar="PART", help="Instead: the least rank that keeps this part, such as 0.95."
)
@click.option(
    "--conv-rank",
    type=int,
    help="Rank of the other convolutions. Without it --rank leaves them out, and --energy holds for them "
    "too; 0 leaves them out.",
)
@click.option("--precision", default="fp16", show_default=True, help="Type of the factors: fp16, bf16, fp32.")
@click.option("--differences", is_flag=True, help="Store differences of biases and norms too, as they are.")
@click.option("--exact", is_flag=True, help="The best factors of large layers too; takes minutes.")
@_OVERWRITE
@_JSON
def extract(
    tuned: str,
    base: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    conv_rank: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Extract the LoRA that leads from the checkpoint BASE to TUNED.

    Example:

    \b
        kiln lora extract tuned.safetensors base.safetensors -o lora.safetensors --rank 32
        kiln lora extract tuned.safetensors base.safetensors -o lora.safetensors --energy 0.95 --conv-rank 16
    """
    from ..exporters.lora_tools.extract import ExtractSpec
    from ..exporters.lora_tools.extract import extract as run
    from ..exporters.lora_tools.factors import Budget
    from ..exporters.resolve import locate_model

    budget = Budget(rank, energy)
    conv = None if energy is None else budget
    if conv_rank is not None:
        conv = Budget(rank=conv_rank) if conv_rank else None
    spec = ExtractSpec(locate_model(tuned), locate_model(base), output, budget, conv, **options)
    _report_extract(run(spec, count_progress()), as_json)


def _report_extract(report: ExtractReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
        return
    by_energy = sorted((one for one in report.modules if one.rank), key=lambda one: one.energy)
    click.echo(
        f"{len(report.modules)} modules, {report.energy:.2%} of the difference kept (energy)", err=True
    )
    for one in by_energy[:_SHOWN]:
        click.echo(f"  {one.energy:.2%} at rank {one.rank}: {one.network}.{one.module}", err=True)
    if len(by_energy) > _SHOWN:
        click.echo(f"  and {len(by_energy) - _SHOWN} that keep at least as much; see --json", err=True)
    if report.left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.left_out.items())
        click.echo(f"left out: {kinds} ({report.left_out_energy:.2%} of the energy)", err=True)
    if report.vae_differs:
        click.echo("the VAEs differ, which no LoRA holds; use the one of TUNED", err=True)
    click.echo(report.output)


@lora.command("merge")
@click.argument("loras", nargs=-1, required=True, metavar="FILE:STRENGTH...")
@_OUTPUT
@click.option("--rank", type=int, help="Cut every layer to this rank; what that costs is said.")
@click.option(
    "-m", "--model", metavar="MODEL", help="The base, for families that depend on its weights, such as DoRA."
)
@click.option(
    "--precision",
    default="auto",
    help="Type of the factors: auto (their own if they are only joined, else fp32), fp32, fp16, bf16.",
)
@_OVERWRITE
@_JSON
def merge_loras(
    loras: tuple[str, ...],
    output: Path,
    rank: int | None,
    model: str | None,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge adapters into one that does what all of them do at their strengths.

    Example:

    \b
        kiln lora merge style.safetensors:0.8 face.safetensors:0.5 -o both.safetensors
        kiln lora merge style.safetensors:0.8 face.safetensors:-0.3 -o both.safetensors --rank 32
    """
    from ..exporters.lora_tools.merge import MergeSpec
    from ..exporters.lora_tools.merge import merge as run

    _report_merge(run(MergeSpec(adapters(loras), output, rank, model, precision, overwrite)), as_json)


def _report_merge(report: MergeReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
        return
    count = report.exact + len(report.energies)
    click.echo(f"{count} layers, {report.exact} of them exact; stored in {report.precision}", err=True)
    if report.energies:
        click.echo(f"{report.energy:.4%} of the energy kept in all; the least in", err=True)
        for label, energy in sorted(report.energies.items(), key=lambda item: item[1])[:_SHOWN]:
            click.echo(f"  {energy:.4%}: {label}", err=True)
    for key, why in list(report.unmatched.items())[:_SHOWN]:
        click.echo(f"not merged: {key}: {why}", err=True)
    if len(report.unmatched) > _SHOWN:
        click.echo(f"and {len(report.unmatched) - _SHOWN} more", err=True)
    click.echo(report.output)


@lora.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@_OUTPUT
@click.option(
    "--to",
    required=True,
    help="kohya (also for A1111 and ComfyUI), diffusers (0.34 and newer), peft (a folder, or one for each "
    "network), or safetensors (the same names in another container).",
)
@click.option("-m", "--model", metavar="MODEL", help="Look up names of layers in this model.")
@_OVERWRITE
@_JSON
def convert(path: Path, output: Path, to: str, model: str | None, overwrite: bool, as_json: bool) -> None:
    """Write an adapter in another dialect, without loss, or say what that dialect cannot say.

    Example:

    \b
        kiln lora convert style.safetensors -o style-diffusers.safetensors --to diffusers
        kiln lora convert old.pt -o old.safetensors --to safetensors
    """
    from ..exporters.lora_tools.convert import ConvertSpec
    from ..exporters.lora_tools.convert import convert as run
    from ..exporters.resolve import locate_adapter

    located = path if path.exists() else locate_adapter(str(path)).path
    report = run(ConvertSpec(located, output, to, model, overwrite))
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
        return
    counts = [f"{count} modules in the {network or 'file'}" for network, count in report.modules.items()]
    click.echo(f"{', '.join(counts)}, {report.tensors} tensors", err=True)
    click.echo(report.output)
