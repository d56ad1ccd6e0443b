"""The command line: parse, build a dataclass, call one function, print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kiln import __version__
from kiln.errors import KilnError, UsageError

if TYPE_CHECKING:
    from kiln.exporters.adapters.base import AdapterRef
    from kiln.exporters.export import ExportReport
    from kiln.runtime.events import ImageReady

_MODEL_HELP = "A bundle, a .safetensors or .ckpt file, a diffusers folder, or a bundled model."
_LORA_HELP = "An adapter: FILE, FILE:STRENGTH or FILE:UNET:TEXT_ENCODER. Repeat for more."


class _Group(click.Group):
    """Prints Kiln's errors as one line, with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KilnError as exc:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {' '.join(str(exc).split())}", err=True)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="kiln")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Bake LoRAs into Stable Diffusion, export it as ONNX, and run it on the hardware there is.

    Example:

    \b
        kiln generate "red apple" -o apple.png
        kiln export model.safetensors -o mymodel --lora style.safetensors:0.8
    """


def _lora_options(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--lora", "loras", multiple=True, metavar="FILE:STRENGTH", help=_LORA_HELP)(command)


@main.command()
@click.argument("prompt")
@click.option("-m", "--model", default="emoji", help=_MODEL_HELP)
@click.option("-n", "--negative-prompt", default="", help="What the image should not show.")
@click.option("-W", "--width", type=int, help="Pixels, a multiple of 8; the model's own size if not given.")
@click.option("-H", "--height", type=int, help="Pixels, a multiple of 8; the model's own size if not given.")
@click.option("--steps", type=int, default=20, help="Denoising steps.")
@click.option(
    "--cfg-scale",
    type=float,
    help="Guidance; the model's own, else 7. 1 leaves the negative prompt out and is twice as fast.",
)
@click.option("-s", "--seed", type=int, help="Seed of the first image; drawn if not given.")
@click.option("-b", "--count", type=int, default=1, help="Number of images; image i uses seed + i.")
@click.option("--batch-size", type=int, default=1, help="Images denoised together.")
@click.option("--sampler", default="euler", help="euler, euler_a, ddim or dpmpp_2m.")
@click.option("--schedule", default="normal", help="normal or karras.")
@click.option("--rng", default="cpu", help="Whose noise to reproduce: torch's on the cpu, or on cuda.")
@_lora_options
@click.option(
    "--lora-dir",
    type=click.Path(path_type=Path),
    help="Where <lora:name:strength> in the prompt is looked up.",
)
@click.option(
    "--backend",
    default="auto",
    help="auto, openvino, onnxruntime, torch or null; with a device: openvino:CPU.",
)
@click.option("--precision", default="auto", help="What to compute in: auto, fp32, bf16 or fp16.")
@click.option("--threads", type=int, default=0, help="CPU threads; 0 lets the engine choose.")
@click.option("--no-cache", is_flag=True, help="Neither read nor write compiled models.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A .png file, or a folder for several images."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Print how long each phase took.")
def generate(prompt: str, **options: Any) -> None:
    """Draw images from a prompt.

    Example:

    \b
        kiln generate "red apple" -o apple.png
        kiln generate "a castle at dawn" -m model.safetensors --lora style.safetensors:0.7 -W 768 -b 4 -o out/
    """
    from kiln.exporters.resolve import prompt_adapters, resolve_model
    from kiln.runtime.events import ImageReady
    from kiln.runtime.pipeline import Pipeline, Settings
    from kiln.runtime.progress import TerminalProgress, clock
    from kiln.runtime.request import Request

    text, tagged = prompt_adapters(prompt, options["lora_dir"])
    fields = ("negative_prompt", "width", "height", "steps", "cfg_scale", "seed", "count", "batch_size")
    request = Request(text, **{k: options[k] for k in (*fields, "sampler", "schedule", "rng")}).with_seed()
    target = _Target(options["output"], text, request.count)
    settings = Settings(
        options["backend"], options["precision"], options["threads"], cache=not options["no_cache"]
    )
    ready = clock()
    with TerminalProgress(quiet=options["quiet"], verbose=options["verbose"]) as progress:
        resolved = resolve_model(options["model"], (*_adapters(options["loras"]), *tagged))
        with Pipeline.open(resolved.bundle, settings) as pipeline:
            for event in pipeline.generate(request):
                progress.show(event)
                if isinstance(event, ImageReady):
                    _report_image(target.save(event), event, options["as_json"])
    if options["verbose"]:
        click.echo(f"start to first import {ready:.2f} s, all {clock():.2f} s", err=True)


class _Target:
    """Where images go, settled and checked before anything is computed."""

    def __init__(self, output: Path | None, prompt: str, count: int) -> None:
        single = output is not None and output.suffix.lower() == ".png"
        if output is not None and not single and output.suffix and not output.is_dir():
            raise UsageError(f"cannot write {output.suffix} files; expected -o NAME.png or a folder")
        self.file = output if single else None
        self.folder = output.parent if output and single else output or Path()
        self.stem = (
            output.stem
            if output and single
            else re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "image"
        )
        self.count = count
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file; expected a folder for the images")

    def save(self, ready: ImageReady) -> Path:
        from kiln.runtime.images import save_png

        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.file.name if self.file and self.count == 1 else f"{self.stem}-{ready.record.seed}.png"
        path = self.folder / name
        save_png(ready.image, path, ready.record.parameters)
        return path


def _report_image(path: Path, ready: ImageReady, as_json: bool) -> None:
    if not as_json:
        click.echo(path)
        return
    record = ready.record
    engines = {component: asdict(in_force) for component, in_force in record.in_force.items()}
    row = {"path": str(path), "seed": record.seed, "width": record.width, "height": record.height}
    click.echo(json.dumps(row | {"parameters": record.parameters, "in_force": engines}))


def _adapters(texts: tuple[str, ...]) -> tuple[AdapterRef, ...]:
    if not texts:
        return ()
    from kiln.exporters.resolve import locate_adapter

    return tuple(locate_adapter(text) for text in texts)


@main.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle."
)
@_lora_options
@click.option(
    "--precision",
    default="auto",
    help="Type weights are stored in: auto (the checkpoint's own), fp32, fp16, bf16.",
)
@click.option("--variant", help="Which weights of a diffusers folder: fp16 for *.fp16.safetensors.")
@click.option("--ema", is_flag=True, help="Take the EMA weights of a single file that has both.")
@click.option("--vae", type=click.Path(path_type=Path), help="Take the VAE from this file or folder.")
@click.option(
    "--text-encoder", type=click.Path(path_type=Path), help="Take the text encoder from this file or folder."
)
@click.option("--cfg-scale", type=float, help="Guidance that generate uses for this model unless told.")
@click.option("--forget-source", is_flag=True, help="Do not write the checkpoint's path into the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(model: str, output: Path, loras: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Make a bundle from a checkpoint, with adapters baked in.

    Example:

    \b
        kiln export model.safetensors -o mymodel --precision fp16
        kiln export model.safetensors -o styled --lora style.safetensors:0.8 --lora face.safetensors:0.5:0
    """
    from kiln.exporters.export import ExportSpec
    from kiln.exporters.export import export as run
    from kiln.exporters.resolve import locate_model

    names = ("variant", "ema", "vae", "text_encoder", "overwrite", "cfg_scale")
    spec = ExportSpec(
        locate_model(model),
        output,
        _adapters(loras),
        storage=options["precision"],
        remember_source=not options["forget_source"],
        **{name: options[name] for name in names},
    )
    _report_bundle(run(spec, _byte_progress()), as_json)


@main.command()
@click.argument("bundle")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle."
)
@_lora_options
@click.option("--overwrite", is_flag=True, help="Replace a bundle of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bake(bundle: str, output: Path, loras: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Make a bundle with other adapters from one that exists: seconds, because only weights are written.

    Example:

    \b
        kiln bake mymodel -o styled --lora style.safetensors:0.8
    """
    from kiln.bundle import open_bundle
    from kiln.exporters.export import bake as run
    from kiln.exporters.resolve import locate_model

    opened = open_bundle(locate_model(bundle))
    report = run(opened, output, _adapters(loras), overwrite=overwrite, progress=_byte_progress())
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
        for key in adapter.unmatched_keys[:5]:
            click.echo(f"  not applied: {key}", err=True)
        if len(adapter.unmatched_keys) > 5:
            click.echo(f"  and {len(adapter.unmatched_keys) - 5} more", err=True)
    click.echo(report.output)


@main.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: str, as_json: bool) -> None:
    """Say what a bundle, a checkpoint or an adapter is: family, networks, types, sizes, adapters.

    Example:

    \b
        kiln inspect model.safetensors
        kiln inspect style.safetensors --json
    """
    from kiln.exporters.inspection import inspect_path
    from kiln.exporters.resolve import locate_model

    report = inspect_path(locate_model(path))
    if as_json:
        click.echo(json.dumps(report, default=str, indent=1))
        return
    _print_tree(report)


def _print_tree(value: dict[str, Any], indent: int = 0) -> None:
    for key, item in value.items():
        rows = item if isinstance(item, list) and item and isinstance(item[0], dict) else None
        if isinstance(item, dict) or rows:
            click.echo(f"{'  ' * indent}{key}")
            for row in rows or [item]:
                _print_tree(row, indent + 1)
        else:
            click.echo(f"{'  ' * indent}{key:{max(1, 24 - 2 * indent)}} {_fact(key, item)}")


def _fact(key: str, value: Any) -> str:
    """A value of the report as a person reads it."""
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, list):
        more = f" and {len(value) - 5} more" if len(value) > 5 else ""
        return f"{', '.join(map(str, value[:5]))}{more}" or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def devices(as_json: bool) -> None:
    """List the backends and what they can run on here, or why they cannot.

    Example:

    \b
        kiln devices
    """
    from kiln.backends.device_report import list_devices

    rows = [asdict(row) for row in list_devices()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        facts = ", ".join(row["precisions"]) if row["available"] else f"not available: {row['reason']}"
        click.echo(f"{row['backend']:12} {row['device'] or '-':6} {row['name'] or '-'}  {facts}")


if __name__ == "__main__":
    main()
