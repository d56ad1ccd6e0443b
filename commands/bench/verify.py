"""``kiln bench verify``: whether results are what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default=Path("kiln-bench"))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(results: Path, as_json: bool) -> None:
    """Compute every figure in RESULTS again from its samples, and every digest; exit code 1 if anything
    differs.

    RESULTS is a results folder or what `kiln bench bundle` made of one.

    Example:

    \b
        kiln bench verify
        kiln bench verify submission
    """
    from ...benchmarks.records.verify import verify_folder

    found = verify_folder(results)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        for finding in found.findings:
            click.echo(str(finding))
        said = f"{len(found.findings)} differ from what is said" if found.findings else "all is as they say"
        click.echo(f"{found.records} records, {found.images} pictures: {said}")
    if found.findings:
        click.get_current_context().exit(1)
