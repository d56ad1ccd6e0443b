"""``kiln cache``: what Kiln keeps to be faster next time, and how to get rid of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from ..cache import KINDS, cache_limit, cache_root, format_size, parse_age, parse_size
from ..errors import UsageError

if TYPE_CHECKING:
    from ..cache_store import Entry, Pruned

_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
_DIGEST_DIGITS = 10


@click.group()
def cache() -> None:
    """Show and remove what is cached: exported and compiled models, graphs, measurements.

    All of it can be made again. KILN_CACHE moves the folder. KILN_CACHE_LIMIT bounds it, for example 10GB; 0
    keeps nothing, none sets no limit; otherwise it is 20 GiB, or half of what a small disk has left. What was
    used least recently goes first, and nothing goes that a running process uses.

    Example:

    \b
        kiln cache list
        kiln cache prune --older-than 30d
    """


@cache.command("list")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only this; repeat for more.")
@_JSON
def list_cache(kinds: tuple[str, ...], as_json: bool) -> None:
    """List what is cached: what it belongs to, its size, and when it was last used.

    Example:

    \b
        kiln cache list
        kiln cache list --kind compiled --json
    """
    from ..cache_store import entries, is_in_use

    found = list(reversed(entries()))
    held = sum(entry.size_bytes for entry in found)
    limit = cache_limit(held)
    shown = [(entry, is_in_use(entry.path)) for entry in found if not kinds or entry.kind in kinds]
    if as_json:
        rows = [_row(entry) | {"in_use": used} for entry, used in shown]
        report = {"folder": str(cache_root()), "size_bytes": held, "limit_bytes": limit, "entries": rows}
        click.echo(json.dumps(report, indent=1, default=str))
        return
    for entry, used in shown:
        when = "in use" if used else _ago(time.time() - entry.last_used)
        click.echo(f"{entry.kind:12} {format_size(entry.size_bytes):>9}  {when:>9}  {belongs_to(entry)}")
    bound = "no limit" if limit is None else f"limit {format_size(limit)}"
    click.echo(f"{format_size(held)} in {len(found)} entries, {bound}: {cache_root()}")


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Remove all that is not in use.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only this; repeat for more.")
@click.option("--older-than", metavar="AGE", help="Remove what was not used for so long: 30d, 12h, 2w.")
@click.option("--limit", metavar="SIZE", help="Remove the least recently used down to this size: 5GB.")
@click.option("--dry-run", is_flag=True, help="Remove nothing, and say what would be removed.")
@_JSON
def prune(
    everything: bool,
    kinds: tuple[str, ...],
    older_than: str | None,
    limit: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what is cached; without options, what is above the limit and what killed processes left.

    Several conditions remove what meets any of them. --limit with --kind counts those kinds only.

    Example:

    \b
        kiln cache prune --older-than 30d --dry-run
        kiln cache prune --kind compiled --limit 5GB
        kiln cache prune --all
    """
    from ..cache_store import entries
    from ..cache_store import prune as run

    if everything and (older_than or limit):
        raise UsageError("--all leaves nothing for --older-than or --limit to choose; give one or the other")
    if kinds and not (everything or older_than or limit):
        raise UsageError("--kind says where to look, not what to remove; add --all, --older-than or --limit")
    age = parse_age(older_than) if older_than else None
    bound = parse_size(limit) if limit else None
    if not (everything or older_than or limit):
        bound = cache_limit(sum(entry.size_bytes for entry in entries()))
    done = run(kinds or KINDS, limit=bound, older_than=age, everything=everything, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(_pruned_row(done) | {"dry_run": dry_run}, indent=1, default=str))
    else:
        _print_pruned(done, dry_run)


def _print_pruned(done: Pruned, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for entry in done.removed:
        click.echo(f"{verb} {entry.kind:12} {format_size(entry.size_bytes):>9}  {belongs_to(entry)}")
    for entry in done.in_use:
        click.echo(
            f"kept, in use: {entry.kind} {format_size(entry.size_bytes)} {belongs_to(entry)}", err=True
        )
    freed = "would free" if dry_run else "freed"
    left = format_size(done.left_bytes)
    click.echo(f"{freed} {format_size(done.freed_bytes)} in {len(done.removed)} entries; {left} left")


def _pruned_row(done: Pruned) -> dict[str, Any]:
    return {
        "freed_bytes": done.freed_bytes,
        "left_bytes": done.left_bytes,
        "removed": [_row(entry) for entry in done.removed],
        "in_use": [_row(entry) for entry in done.in_use],
    }


def _row(entry: Entry) -> dict[str, Any]:
    facts = {} if entry.kind in ("bundles", "tuning") else dict(entry.facts)
    return {
        "kind": entry.kind,
        "path": str(entry.path),
        "belongs_to": belongs_to(entry),
        "size_bytes": entry.size_bytes,
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.last_used)),
        "facts": facts,
    }


def belongs_to(entry: Entry) -> str:
    """What an entry was made for, in words; its name where nothing was noted."""
    say = {"bundles": _bundle, "compiled": _compiled, "graphs": _graph, "tuning": _tuning}.get(entry.kind)
    if entry.kind == "verified":
        return "which large files were read whole"
    return (say(entry) if say else str(entry.facts.get("what", ""))) or entry.path.name


def _bundle(entry: Entry) -> str:
    adapters = entry.facts.get("adapters") or []
    names = [str(row["name"]) for row in adapters if isinstance(row, dict) and "name" in row]
    model = str(entry.facts.get("name", ""))
    return " + ".join([model, *names]) if model else ""


def _compiled(entry: Entry) -> str:
    facts, backend = entry.facts, entry.path.parent.name
    model = facts.get("bundle") or str(facts.get("digest", ""))[:_DIGEST_DIGITS]
    what = f"{model} {facts.get('component', '')}".strip() or entry.path.name[:_DIGEST_DIGITS]
    engine = f"{backend} {facts.get('engine', '')}".strip()
    shapes = facts.get("shapes")
    sizes = [list(shape) for shape in shapes.values() if shape] if isinstance(shapes, dict) else []
    return " · ".join([what, engine, *(["x".join(map(str, sizes[0]))] if sizes else [])])


def _graph(entry: Entry) -> str:
    component, _, digest = entry.path.name.removesuffix(".onnx.xz").rpartition("-")
    return f"{component} of the architecture {digest}" if component else ""


def _tuning(entry: Entry) -> str:
    return str(entry.facts.get("summary", ""))


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
