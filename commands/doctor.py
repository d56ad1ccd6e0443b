"""``kiln doctor``: examine the machine and say what to type."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..backends.doctor.system import System


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--sysroot",
    type=click.Path(path_type=Path),
    help="Examine the files of another machine below this folder; no engine is started.",
)
@click.option("--timeout", type=float, default=120.0, help="Seconds an engine may take for one run.")
@click.option("-v", "--verbose", is_flag=True, help="Show what is in order as well, with its evidence.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, sysroot: Path | None, timeout: float, verbose: bool) -> None:
    """Examine this machine: what is there, what works, what is missing, and the line to type.

    Runs a small network on every engine and device it finds, each in a process of its own, and compares the
    numbers with numpy's. Exit code 0: all in order; 1: something to mend; 2: no backend works.

    Example:

    \b
        kiln doctor
        kiln doctor --json
    """
    from ..backends.doctor.diagnosis import diagnose

    system = _system(sysroot, timeout)
    diagnosis = diagnose(system, _Progress())
    if as_json:
        click.echo(json.dumps(diagnosis.as_document(), indent=1))
    else:
        from rich.console import Console

        from ..backends.doctor.text import print_diagnosis

        print_diagnosis(diagnosis, Console(highlight=False), verbose)
    ctx.exit(diagnosis.exit_code)


def _system(sysroot: Path | None, timeout: float) -> System:
    from ..backends.doctor.here import sysroot_system, this_system
    from ..errors import UsageError

    if not timeout > 0:
        raise UsageError(f"a timeout of {timeout:g} seconds cannot be kept; expected more than 0")
    return sysroot_system(sysroot) if sysroot is not None else this_system(timeout)


class _Progress:
    """One line on a terminal's stderr that says what is being looked at, and is wiped at the end."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            click.echo(f"\r\x1b[2K{text[:70]}", nl=False, err=True)
