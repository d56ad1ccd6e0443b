"""The report: records and their pictures in, one HTML file out that asks nobody for anything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import StorageError, UsageError
from ..records.compare import DEFAULT_FLOOR
from ..records.record import Record
from ..records.store import read_store
from . import details, drift, gallery, parts, phases, resources, samples, speed
from .grouping import Entry, Group, group_records
from .templating import inline, render, script_hash
from .text import clean
from .thumbs import AMPLIFY, Album, make_album

REPORT = "report.html"


@dataclass(frozen=True)
class Section:
    """A group with everything that is drawn of it."""

    group: Group
    anchor: str
    facts: tuple[tuple[str, str], ...]
    speeds: speed.Speeds
    parts: parts.Parts | None
    panels: tuple[samples.Panel, ...]
    drift: tuple[drift.Chart, ...]
    starts: phases.Starts | None
    memory: resources.MemoryTable | None
    energy: resources.EnergyTable
    gallery: tuple[gallery.PromptRow, ...]
    gates: tuple[details.GateTable, ...]
    settings: tuple[details.Settings, ...]


def write_report(
    folder: Path, output: Path | None = None, *, run: str | None = None, baseline: str | None = None
) -> Path:
    """Write the report of a results folder; the same records and pictures give the same bytes.

    Args:
        folder: a results folder, or a ``.jsonl`` file with ``images`` beside it.
        output: the file; ``report.html`` in the folder if not given.
        run: only records of this run.
        baseline: label or id of the record that speeds are given against.

    Returns:
        The file.

    Raises:
        UsageError: there are no records, or the baseline is not among them.
        StorageError: the file cannot be written.
    """
    stored = read_store(folder)
    records = [record for record in stored.records if run in (None, record.run)]
    if not records:
        known = ", ".join(dict.fromkeys(clean(r.run, 60) for r in stored.records))
        what = f"no record of run {run!r} (runs: {known})" if known else "no records"
        raise UsageError(f"{stored.path} holds {what}; `kiln bench run -o {stored.folder}` makes some")
    page = render_report(records, stored.folder, baseline=baseline)
    path = output or stored.folder / REPORT
    _write(path, page.encode("utf-8", "replace"))
    return path


def render_report(records: Sequence[Record], folder: Path, *, baseline: str | None = None) -> str:
    """The page.

    Args:
        records: one or more.
        folder: what the files of their pictures are relative to.
        baseline: label or id of the record that speeds are given against.

    Raises:
        UsageError: no record has that label or id.
    """
    groups = group_records(records, baseline)
    wanted = [item for group in groups for item in gallery.wanted_pictures(group)]
    album, side = make_album(folder, wanted)
    entries = [entry for group in groups for entry in group.entries]
    script = inline("report.js")
    return render(
        "report.html.j2",
        sections=[_section(group, number, album) for number, group in enumerate(groups, 1)],
        entries=entries,
        counts=speed.verdicts(entries),
        machines=details.machines(entries),
        machine_line=details.machine_line(entries[0].record),
        noise=details.noise_rows(entries),
        commands=details.commands(entries),
        title=_title(groups),
        tools=_tools(entries),
        measured=_measured(entries),
        phase_names=phases.NAMES,
        amplify=AMPLIFY,
        default_floor=DEFAULT_FLOOR,
        side=side if wanted else 0,
        style=inline("report.css"),
        script=script,
        script_hash=script_hash(script),
    )


def _section(group: Group, number: int, album: Album) -> Section:
    return Section(
        group=group,
        anchor=f"g{number}",
        facts=details.workload_facts(group),
        speeds=speed.speeds(group),
        parts=parts.parts(group),
        panels=samples.panels(group),
        drift=drift.drift(group),
        starts=phases.starts(group),
        memory=resources.memory_table(group),
        energy=resources.energy_table(group),
        gallery=gallery.gallery(group, album),
        gates=details.gate_tables(group),
        settings=details.settings(group),
    )


def _title(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(clean(g.workload.model.name, 40) for g in groups)
    return ", ".join(names)


def _tools(entries: Sequence[Entry]) -> str:
    found = dict.fromkeys(
        clean(t.version, 40) + (f" ({clean(t.commit, 16)})" if t.commit else "")
        for t in (entry.record.tool for entry in entries)
    )
    return ", ".join(found)


def _measured(entries: Sequence[Entry]) -> str:
    """The days, from the records and not from the clock: the same records give the same page."""
    days = sorted({clean(entry.record.created, 40)[:10] for entry in entries})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _write(path: Path, data: bytes) -> None:
    """Beside its name first, so that no half page is ever seen."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
