"""``kiln bench workloads``: what can be measured."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def workloads(as_json: bool) -> None:
    """List the workloads that ship, with what they draw.

    Example:

    \b
        kiln bench workloads
    """
    from ...benchmarks.harness.workloads import workloads as shipped

    found = shipped().values()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(workload) for workload in found], indent=1))
        return
    for workload in found:
        size = f"{workload.width}x{workload.height}" if workload.width else "own size"
        what = f"{len(workload.prompts)} prompts, {size}, {workload.steps} steps, batch {workload.batch}"
        click.echo(f"{workload.id:12} {workload.model or 'your model':12} {what}")
        click.echo(f"{'':12} {workload.summary}")
