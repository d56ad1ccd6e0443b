"""``kiln export`` and ``kiln bake``: make bundles."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import adapters, embedding_option, embedding_refs, lora_options

if TYPE_CHECKING:
    from ..exporters.export import ExportReport
    from ..exporters.quantization.produce import Int8Options


def _int8_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what concerns int8 bundles only."""
    for option in (
        click.option("--no-gate", is_flag=True, help="int8: do not compare with fp32."),
        click.option("--min-parity", type=float, metavar="DB", help="int8: least PSNR against fp32, in dB."),
        click.option(
            "--calibration-prompt",
            "calibration_prompts",
            multiple=True,
            metavar="TEXT",
            help="int8-full: what to draw to calibrate, in place of Kiln's own. Repeat for more.",
        ),
        click.option(
            "--most-kept",
            type=click.FloatRange(0, 1),
            metavar="SHARE",
            help="int8-full: how much of the UNet's multiplications may stay in higher precision where int8 "
            "hurts, 0 to 1. [default: 0.1]",
        ),
        click.option("--recalibrate", is_flag=True, help="int8-full: measure anew, adapters and all."),
        click.option(
            "--calibration",
            type=click.Path(path_type=Path, dir_okay=False),
            help="int8-full: a calibration.json of another bundle of this checkpoint.",
        ),
    ):
        command = option(command)
    return command


def _int8(options: dict[str, Any], storage: str) -> Int8Options | None:
    """What the options say of int8, None where nothing is stored in it; those of another type are refused."""
    from ..exporters.quantization.produce import Int8Options

    full = ("calibration", "recalibrate", "calibration_prompts", "most_kept")
    for needed, names in (("int8-full", full), ("int8", ("no_gate", "min_parity"))):
        # A share of 0 is one that was given.
        given = [n for n in names if not (options[n] is None or options[n] is False or options[n] == ())]
        if given and not storage.startswith(needed):
            option = given[0].removesuffix("s").replace("_", "-")
            raise click.UsageError(
                f"--{option} is for {needed}, and the precision of this bundle is {storage}"
            )
    if not storage.startswith("int8"):
        return None
    prompts = options["calibration_prompts"]
    return Int8Options(
        calibration=options["calibration"],
        recalibrate=options["recalibrate"],
        most_kept=options["most_kept"],
        gate=not options["no_gate"],
        min_parity=options["min_parity"],
        **({"prompts": prompts} if prompts else {}),
    )


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle."
)
@lora_options
@embedding_option
@click.option(
    "--precision",
    default="auto",
    help="Type weights are stored in: auto (the checkpoint's own), fp32, fp16, bf16, int8; int8-full has the "
    "UNet and the VAE's decoder compute in int8 too.",
)
@click.option("--variant", help="Which weights of a diffusers folder: fp16 for *.fp16.safetensors.")
@click.option("--ema", is_flag=True, help="Take the EMA weights of a single file that has both.")
@click.option("--vae", type=click.Path(path_type=Path), help="Take the VAE from this file or folder.")
@click.option(
    "--text-encoder", type=click.Path(path_type=Path), help="Take the text encoder from this file or folder."
)
@click.option("--cfg-scale", type=float, help="Guidance that generate uses for this model unless told.")
@_int8_options
@click.option("--forget-source", is_flag=True, help="Do not write the checkpoint's path into the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(model: str, output: Path, loras: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Make a bundle from a checkpoint, with adapters baked in.

    A bundle of int8 is compared with fp32 before it appears, and refused when it is too far from it.

    Example:

    \b
        kiln export model.safetensors -o mymodel --precision fp16
        kiln export model.safetensors -o styled --lora style.safetensors:0.8 --lora face.safetensors:0.5:0
        kiln export model.safetensors -o outlines --lora style.safetensors:0.8:lbw=OUTALL
        kiln export model.safetensors -o small --precision int8
    """
    from ..exporters.export import ExportSpec
    from ..exporters.export import export as run
    from ..exporters.resolve import locate_model

    names = ("variant", "ema", "vae", "text_encoder", "overwrite", "cfg_scale")
    spec = ExportSpec(
        locate_model(model),
        output,
        adapters(loras, options["lbw_presets"]),
        storage=options["precision"],
        remember_source=not options["forget_source"],
        int8=_int8(options, options["precision"]),
        embeddings=embedding_refs(options["embeddings"]),
        **{name: options[name] for name in names},
    )
    _report_bundle(run(spec, _byte_progress()), as_json)


@click.command()
@click.argument("bundle")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle."
)
@lora_options
@embedding_option
@_int8_options
@click.option("--overwrite", is_flag=True, help="Replace a bundle of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bake(
    bundle: str, output: Path, loras: tuple[str, ...], overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Make a bundle with other adapters from one that exists: seconds, because only weights are written.

    Embeddings are added to those inside; with --embedding alone the adapters inside stay too.

    A bundle of int8 is quantized anew from its checkpoint, and compared with fp32, which takes longer.

    Example:

    \b
        kiln bake mymodel -o styled --lora style.safetensors:0.8
        kiln bake mymodel -o careful --embedding EasyNegative.safetensors
    """
    from ..bundle import open_bundle
    from ..exporters.export import add_tokens
    from ..exporters.export import bake as run
    from ..exporters.resolve import locate_model

    opened = open_bundle(locate_model(bundle))
    int8 = _int8(options, str(opened.manifest.get("storage")))
    refs = adapters(loras, options["lbw_presets"])
    tokens = embedding_refs(options["embeddings"])
    if tokens and not refs:
        report = add_tokens(opened, output, tokens, overwrite=overwrite)
    else:
        report = run(
            opened, output, refs, overwrite=overwrite, progress=_byte_progress(), int8=int8, embeddings=tokens
        )
    _report_bundle(report, as_json)


def _byte_progress() -> Callable[[str, int, int], None]:
    if not sys.stderr.isatty():
        return lambda component, done, total: None

    def show(component: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        click.echo(f"\r{component:14}{done / total:5.0%}", nl=False, err=True)
        click.echo(end, nl=False, err=True)

    return show


def _report_bundle(report: ExportReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
        return
    for adapter in report.adapters:
        matched = ", ".join(f"{count} in the {network}" for network, count in adapter.matched_modules.items())
        click.echo(f"{adapter.path.name}: {matched or 'strength 0'}", err=True)
        if adapter.changes:
            sizes = sorted(adapter.changes.values())
            middle, most = sizes[len(sizes) // 2], sizes[-1]
            click.echo(f"  changes its weights by {middle:.2%} (median), {most:.2%} at most", err=True)
        for key in adapter.unmatched_keys[:5]:
            click.echo(f"  not applied: {key}: {adapter.reasons.get(key, 'no such layer')}", err=True)
        if len(adapter.unmatched_keys) > 5:
            click.echo(f"  and {len(adapter.unmatched_keys) - 5} more", err=True)
        for warning in adapter.warnings:
            click.echo(f"  warning: {warning}", err=True)
    for token, count in report.embeddings.items():
        click.echo(f"token {token}: {count} vector{'s' if count > 1 else ''}", err=True)
    if report.int8:
        click.echo(f"against fp32: {json.dumps(report.int8)}", err=True)
    click.echo(report.output)
