"""The command line: the group, its errors, and the commands, which lie in ``commands``."""

from __future__ import annotations

from typing import Any

import click

from kiln import __version__
from kiln.commands.bench import bench
from kiln.commands.cache import cache
from kiln.commands.devices import devices
from kiln.commands.doctor import doctor
from kiln.commands.export import bake, export
from kiln.commands.generate import generate
from kiln.commands.inspect import inspect
from kiln.commands.lora import lora
from kiln.commands.merge import merge
from kiln.errors import KilnError


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


for _command in (generate, export, bake, inspect, lora, merge, devices, doctor, cache, bench):
    main.add_command(_command)


if __name__ == "__main__":
    main()
