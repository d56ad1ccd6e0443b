"""``kiln inspect``: say what a file is."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: str, as_json: bool) -> None:
    """Say what a bundle, a checkpoint, an adapter or an embedding is: family, networks, types, sizes.

    Example:

    \b
        kiln inspect model.safetensors
        kiln inspect style.safetensors --json
    """
    from ..exporters.inspection import inspect_path
    from ..exporters.resolve import locate_model

    report = inspect_path(locate_model(path))
    if as_json:
        click.echo(json.dumps(report, default=str, indent=1))
        return
    print_tree(report)


def print_tree(value: dict[str, Any], indent: int = 0) -> None:
    for key, item in value.items():
        rows = item if isinstance(item, list) and item and isinstance(item[0], dict) else None
        if key == "blocks":
            click.echo(f"{'  ' * indent}{key:{max(1, 24 - 2 * indent)}} {_blocks(item)}")
        elif isinstance(item, dict) or rows:
            click.echo(f"{'  ' * indent}{key}")
            for row in rows or [item]:
                print_tree(row, indent + 1)
        else:
            click.echo(f"{'  ' * indent}{key:{max(1, 24 - 2 * indent)}} {_fact(key, item)}")


def _blocks(strengths: dict[str, float]) -> str:
    """Block strengths, those that are equal and stand together as one: ``BASE 1, IN00-IN11 0, ...``."""
    runs: list[tuple[str, str, float]] = []
    for name, value in strengths.items():
        if runs and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], name, value)
        else:
            runs.append((name, name, value))
    return ", ".join(f"{a if a == b else f'{a}-{b}'} {value:g}" for a, b, value in runs)


def _fact(key: str, value: Any) -> str:
    """A value of the report as a person reads it."""
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, list):
        more = f" and {len(value) - 5} more" if len(value) > 5 else ""
        return f"{', '.join(map(str, value[:5]))}{more}" or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
