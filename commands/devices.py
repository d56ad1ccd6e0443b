"""``kiln devices``: the backends and what they run on."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def devices(as_json: bool) -> None:
    """List the backends and what they can run on here, or why they cannot.

    Example:

    \b
        kiln devices
    """
    from ..backends.device_report import list_devices

    rows = [asdict(row) for row in list_devices()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        facts = ", ".join(row["precisions"]) if row["available"] else f"not available: {row['reason']}"
        click.echo(f"{row['backend']:12} {row['device'] or '-':6} {row['name'] or '-'}  {facts}")
