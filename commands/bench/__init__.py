"""``kiln bench``: measure, compare and publish; each sub-command is a file of this folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import click


class _Lazy(click.Group):
    """Imports a sub-command when it is asked for: a file of this folder with one command of the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        found = getattr(module, cmd_name)
        assert isinstance(found, click.Command)
        return found


@click.group(cls=_Lazy)
def bench() -> None:
    """Measure how fast models run, and how near the pictures are to the reference's.

    Example:

    \b
        kiln bench run quick
        kiln bench run standard --backend openvino --backend onnxruntime
        kiln bench show
    """
