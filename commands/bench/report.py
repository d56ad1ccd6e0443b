"""``kiln bench report``: records and their pictures as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default=Path("kiln-bench"))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File; RESULTS/report.html if not given.",
)
@click.option("--run", help="Only records of this run; all if not given.")
@click.option(
    "--baseline",
    metavar="LABEL",
    help="Label or id of the record that speeds are against; the first peer, else the first valid one.",
)
def report(results: Path, output: Path | None, run: str | None, baseline: str | None) -> None:
    """Write the report of RESULTS, a folder or a .jsonl file; kiln-bench if not given. Prints its path.

    The page is one file without any address of another: it can be mailed, archived and read offline.

    Example:

    \b
        kiln bench report
        kiln bench report results --baseline "openvino fp32" -o page.html
    """
    from ...benchmarks.html.build import write_report

    click.echo(write_report(results, output, run=run, baseline=baseline))
