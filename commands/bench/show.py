"""``kiln bench show``: the records of a results folder as a table."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default=Path("kiln-bench"))
@click.argument("selectors", nargs=-1, metavar="[SELECTOR]...")
@click.option("--ids", is_flag=True, help="Print ids, labels and verdicts only.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole records, one JSON object a line.")
def show(results: Path, selectors: tuple[str, ...], ids: bool, as_json: bool) -> None:
    """Show the records in RESULTS, a folder or a .jsonl file; kiln-bench if not given.

    SELECTOR is a record's label, id, run or key, or the beginning of one of the last three.

    Example:

    \b
        kiln bench show
        kiln bench show results "openvino bf16" --json
    """
    from ...benchmarks.records.pairing import select
    from ...benchmarks.records.store import read_store

    stored = read_store(results)
    if stored.torn:
        click.echo(f"warning: {stored.torn}", err=True)
    named = {record.id for selector in selectors for record in select(stored.records, selector)}
    rows = list(zip(stored.records, stored.texts, strict=True))
    rows = [(record, text) for record, text in rows if not selectors or record.id in named]
    if as_json:
        for _, text in rows:
            click.echo(text.decode())
    elif ids:
        for record, _ in rows:
            click.echo(f"{record.id}  {record.verdict:7}  {record.workload.id}  {record.label}")
    else:
        from rich.console import Console

        from ...benchmarks.html.terminal import print_records

        print_records([record for record, _ in rows], Console())
