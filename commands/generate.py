"""``kiln generate``: images from a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import MODEL_HELP, adapters, block_presets, embedding_option, embedding_refs, lora_options

if TYPE_CHECKING:
    from ..exporters.embeddings.base import EmbeddingRef
    from ..runtime.events import ImageReady


@click.command()
@click.argument("prompt")
@click.option("-m", "--model", default="emoji", help=MODEL_HELP)
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
@lora_options
@click.option(
    "--lora-dir",
    type=click.Path(path_type=Path),
    help="Where <lora:name:strength> in the prompt is looked up, by the file's name or its ss_output_name. "
    "The whole tag is <lora:name:te:unet:rank:lbw=BLOCKS>; te=, unet= and dyn= may name its fields.",
)
@embedding_option
@click.option(
    "--embedding-dir",
    type=click.Path(path_type=Path),
    help="Textual inversion embeddings (.safetensors, .pt, .bin, .png): those whose file name, <token> or "
    "name in a picture stands in the prompt or in the negative prompt are used. Pictures without an "
    "embedding are passed over.",
)
@click.option(
    "--backend",
    default="auto",
    help="auto, or a name that kiln devices lists, such as openvino; with a device: torch:rocm.",
)
@click.option("--precision", default="auto", help="What to compute in: auto, fp32, bf16 or fp16.")
@click.option(
    "--tune/--no-tune",
    default=None,
    help="With --backend auto: measure now which backend is fastest, or never; by default when the run is "
    "long enough to repay it.",
)
@click.option(
    "--isolate",
    default="auto",
    help="Run the engine in a process of its own, which may crash: auto, always or never.",
)
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
    from ..exporters.resolve import prompt_adapters, resolve_model
    from ..runtime.events import ImageReady
    from ..runtime.pipeline import Pipeline
    from ..runtime.progress import TerminalProgress, clock
    from ..runtime.request import Request
    from ..runtime.settings import Settings

    text, tagged = prompt_adapters(prompt, options["lora_dir"], block_presets(options["lbw_presets"]))
    if "<lora:" in options["negative_prompt"]:
        click.echo(
            "warning: <lora:...> in the negative prompt is plain text; tags act in the prompt", err=True
        )
    fields = ("negative_prompt", "width", "height", "steps", "cfg_scale", "seed", "count", "batch_size")
    request = Request(
        text, typed_prompt=prompt, **{k: options[k] for k in (*fields, "sampler", "schedule", "rng")}
    ).with_seed()
    target = _Target(options["output"], text, request.count)
    settings = Settings(
        options["backend"],
        options["precision"],
        options["threads"],
        cache=not options["no_cache"],
        tune=options["tune"],
        isolate=options["isolate"],
    )
    ready = clock()
    with TerminalProgress(quiet=options["quiet"], verbose=options["verbose"]) as progress:
        refs = (*adapters(options["loras"], options["lbw_presets"]), *tagged)
        embeddings = _embeddings(options, text)
        resolved = resolve_model(options["model"], refs, embeddings=embeddings)
        with Pipeline.open(resolved.bundle, settings) as pipeline:
            for event in pipeline.generate(request, last=True):
                progress.show(event)
                if isinstance(event, ImageReady):
                    _report_image(target.save(event), event, options["as_json"])
    if options["verbose"]:
        click.echo(f"start to first import {ready:.2f} s, all {clock():.2f} s", err=True)


def _embeddings(options: Mapping[str, Any], prompt: str) -> tuple[EmbeddingRef, ...]:
    """Those of ``--embedding``, and those of ``--embedding-dir`` that a prompt names."""
    given = embedding_refs(options["embeddings"])
    if options["embedding_dir"] is None:
        return given
    from ..exporters.embeddings.folder import embeddings_named
    from ..runtime.tokenizer import names_in

    prompts = f"{prompt}\n{options['negative_prompt']}"
    found = embeddings_named(options["embedding_dir"], prompts, lambda name: names_in(prompts, name))
    paths = {ref.path.resolve() for ref in given}
    return (*given, *(ref for ref in found if ref.path.resolve() not in paths))


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
        from ..runtime.images import save_png

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
    click.echo(
        json.dumps(row | {"parameters": record.parameters, "in_force": engines, "choice": record.choice})
    )
