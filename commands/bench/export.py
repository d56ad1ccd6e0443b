"""``kiln bench export``: the records as a table of another form."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default=Path("kiln-bench"))
@click.option(
    "-f", "--format", "form", type=click.Choice(["md", "csv", "json", "sql"]), default="md", show_default=True
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Standard output if not given."
)
def export(results: Path, form: str, output: Path | None) -> None:
    """Print the records in RESULTS as Markdown, CSV, JSON or SQL, all with the same columns; times are
    seconds.

    Markdown has a table of what differs between the records, below a list of what does not.

    Example:

    \b
        kiln bench export > results.md
        kiln bench export results -f sql | sqlite3 results.db
    """
    from ...benchmarks.records.export import export_records
    from ...benchmarks.records.merge import write_file
    from ...benchmarks.records.store import read_store

    stored = read_store(results)
    if stored.torn:
        click.echo(f"warning: {stored.torn}", err=True)
    text = export_records(stored.records, form)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_file(output, text.encode())
