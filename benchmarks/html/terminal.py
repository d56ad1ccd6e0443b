"""The tables of the report in the terminal: eighty columns are enough, and a pipe gets the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records.record import Record
from .grouping import Entry, Group, group_records
from .parts import REST, shares
from .phases import NAMES
from .resources import KINDS
from .speed import speeds
from .text import LABEL_LIMIT, NONE, clean, number, seconds, share, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS = {"valid": "green", "noisy": "yellow", "invalid": "red"}
_SHORT = {
    "text_encoder": "text",
    "text_encoder_2": "text 2",
    "vae_decoder": "VAE",
    "unattributed": "rest",
    "unet": "UNet",
}
_PHASES = ("convert", "import", "open", "compile", "cached", "first")
_EQUAL_DB = 150.0  # what is recorded as the PSNR of equal pictures
_LEVELS = ("component", "latents", "image")


def print_records(records: Sequence[Record], console: Console, *, baseline: str | None = None) -> None:
    """Print summary, components, phases, memory and parity of each group of records.

    Args:
        records: none prints a line that says so.
        console: of rich; its width is kept to, and what it may colour.
        baseline: label or id of the record that speeds are given against.

    Raises:
        UsageError: no record has that label or id.
    """
    from rich.text import Text

    if not records:
        console.print("no records")
        return
    for group in group_records(records, baseline):
        console.print()
        weights = ", random weights: speed only" if group.random_weights else ""
        console.print(Text(f"{group.title}{weights}", style="bold"))
        tables = (_summary(group), _components(group), _phases(group), _memory(group), _parity(group))
        for table in tables:
            if table is not None:
                console.print(table)
        for entry in group.entries:
            style = _COLOURS.get(entry.record.verdict, "")
            for reason in entry.record.reasons:
                console.print(Text(f"{entry.number} {entry.label}: {clean(reason)}", style=style))
            for remark in entry.record.remarks:
                console.print(Text(f"{entry.number} {entry.label}: {clean(remark)}"))


def _summary(group: Group) -> Table:
    from rich.text import Text

    table = _table("time per image", "per image", "95% interval", "n", "speed", "verdict")
    for row in speeds(group).rows:
        speed = row.speed if row.speed_word in ("", "baseline") else f"{row.speed} {_short(row.speed_word)}"
        verdict = row.entry.record.verdict
        cells = [row.time, row.interval, str(row.count), speed.strip(f"{NONE} ") or NONE]
        _add(table, row.entry, cells, verdict, _COLOURS.get(verdict, ""))
    if group.baseline is not None:
        text = f"speed against {group.baseline.number} {group.baseline.label}; = is not significant"
        table.caption = Text(text)
    return table


def _components(group: Group) -> Table | None:
    found = {entry.number: dict(shares(entry)) for entry in group.entries}
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    if not names:
        return None
    names = [n for n in names if n != REST] + [REST] * (REST in names)
    table = _table("components", *(_SHORT.get(name, clean(name, 14)) for name in names))
    for entry in group.entries:
        parts, total = found[entry.number], entry.median
        cells = [_part(name, parts.get(name), total) for name in names]
        _add(table, entry, cells)
    return table


def _phases(group: Group) -> Table | None:
    values = {e.number: [getattr(e.record.phases, name) for name in NAMES] for e in group.entries}
    shown = [i for i in range(len(NAMES)) if any(row[i] is not None for row in values.values())]
    if not shown:
        return None
    table = _table("phases", *(_PHASES[i] for i in shown))
    for entry in group.entries:
        _add(table, entry, [seconds(values[entry.number][i]) for i in shown])
    return table


def _memory(group: Group) -> Table | None:
    amounts = {e.number: [getattr(e.record.memory, kind) for kind in KINDS] for e in group.entries}
    shown = [i for i in range(len(KINDS)) if any(row[i] is not None for row in amounts.values())]
    joules = [entry.record.energy.joules_per_image for entry in group.entries]
    if not shown and not any(j is not None for j in joules):
        return None
    energy = any(j is not None for j in joules)
    names = [list(KINDS.values())[i] for i in shown] + ["energy, by"] * energy
    table = _table("memory, peak", *names)
    for entry, spent in zip(group.entries, joules, strict=True):
        row = [amounts[entry.number][i] for i in shown]
        cells = [NONE if amount is None else size(amount.value) for amount in row]
        if energy:
            method = clean(entry.record.energy.method, 20)
            cells.append(NONE if spent is None else f"{number(spent)} J {method}")
        _add(table, entry, cells)
    return table


def _parity(group: Group) -> Table | None:
    """Gates passed of those judged, by level; the worst figures of the pictures."""
    if not any(entry.record.parity.gates for entry in group.entries):
        return None
    table = _table("parity, gates passed", *_LEVELS, "PSNR, least", "SSIM, least")
    for entry in group.entries:
        gates = entry.record.parity.gates
        cells = []
        for level in _LEVELS:
            judged = [g for g in gates if g.level == level and (g.limit is not None or not g.passed)]
            cells.append(f"{sum(g.passed for g in judged)} of {len(judged)}" if judged else NONE)
        for metric, unit in (("psnr_db", " dB"), ("ssim", "")):
            values = [image.metrics[metric] for image in entry.record.images if metric in image.metrics]
            equal = metric == "psnr_db" and values and min(values) >= _EQUAL_DB
            cells.append("equal" if equal else f"{number(min(values))}{unit}" if values else NONE)
        failed = any(not gate.passed for gate in gates)
        _add(table, entry, cells, style="red" if failed else "")
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column(title, overflow="fold")  # the one that gives way where it is narrow
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, entry: Entry, cells: Sequence[str], last: str | None = None, style: str = "") -> None:
    """A row; texts are no markup, whatever brackets a label holds."""
    from rich.text import Text

    name = clean(entry.label, LABEL_LIMIT) + (" (peer)" if entry.peer else "")
    row = [Text(str(entry.number)), Text(name), *(Text(cell) for cell in cells)]
    if last is not None:
        row.append(Text(last))
    table.add_row(*row, style=style)


def _part(name: str, value: float | None, total: float | None) -> str:
    """Seconds of a component, and of what is left over the share."""
    if value is None or not total:
        return NONE
    return share(value / total) if name == REST else seconds(value)


def _short(word: str) -> str:
    return {"not significant": "=", "not compared": ""}.get(word, "")
