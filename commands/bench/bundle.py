"""``kiln bench bundle``: results in a form that somebody else can verify."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default=Path("kiln-bench"))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder that does not exist yet."
)
def bundle(results: Path, output: Path) -> None:
    """Make a folder of RESULTS to hand to others: records, pictures, commands, versions, and how to verify
    it.

    What does not verify is refused, and so is anything that names this machine, its user or a folder of it.

    Example:

    \b
        kiln bench bundle results -o submission
        kiln bench verify submission
    """
    from ...benchmarks.records.submission import write_submission

    files = write_submission(results, output)
    click.echo(f"{output}: {len(files)} files; `kiln bench verify {output}` checks them")
