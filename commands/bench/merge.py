"""``kiln bench merge``: several results folders as one."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Results folder; may exist."
)
def merge(sources: tuple[Path, ...], output: Path) -> None:
    """Bring the records and pictures of SOURCES into one results folder.

    A record that is there already is left as it is; two different ones of one id are an error, and nothing
    is written.

    Example:

    \b
        kiln bench merge desktop laptop -o all
    """
    from ...benchmarks.records.merge import merge_folders

    found = merge_folders(sources, output)
    for text in found.torn:
        click.echo(f"warning: {text}", err=True)
    for key, count in found.repeated.items():
        click.echo(f"{key} was measured {count} times; all are kept", err=True)
    click.echo(
        f"{output}: {len(found.added)} records and {found.images} pictures added, {found.known} known already"
    )
