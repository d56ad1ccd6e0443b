"""Records as tables: Markdown, CSV, JSON and SQL, all from one list of columns that follows from the
record.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from .forms import hints
from .record import Record

TABLE = "kiln_bench"
_SQL = {str: "TEXT", int: "INTEGER", float: "REAL", bool: "INTEGER"}
_COMPONENTS = ("text_encoder", "unet", "sampler", "vae_decoder")
_EFFECTIVE = ("backend", "version", "provider", "device", "precision", "threads")
# Always in the table of Markdown, whether or not rows differ in them.
_ALWAYS = ("label", "stats_image_median", "stats_image_interval_low", "stats_image_interval_high", "verdict")
# Never there: they differ in every row and tell a reader nothing.
_NEVER = ("id", "key", "run", "created", "command", "samples_seconds")


@dataclass(frozen=True)
class Column:
    """A column: its name, what SQL stores it as, and how it is had from a record. Times are seconds."""

    name: str
    kind: type
    of: Callable[[Record], Any]


@cache
def columns() -> tuple[Column, ...]:
    """Every scalar of the record by its path, joined by ``_``, then what lists and mappings come to.

    A field that is added to the record's dataclasses is a column from then on.
    """
    return (*_scalars(Record, (), lambda record: record), *_gathered())


def export_records(records: Sequence[Record], form: str) -> str:
    """The records as text, one row each, in the order given.

    Args:
        records: any number.
        form: ``md``, ``csv``, ``json`` or ``sql``.

    Raises:
        KeyError: another form.
    """
    return FORMS[form](rows_of(records))


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each record as one flat row; values are texts, numbers or None."""
    return [{column.name: column.of(record) for column in columns()} for record in records]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One header, one line for each row (RFC 4180, but lines end in a line feed); None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [column.name for column in columns()], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_json_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of objects; the whole records are in ``records.jsonl``."""
    return json.dumps(list(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_sql(rows: Sequence[Mapping[str, Any]]) -> str:
    """Statements that ``sqlite3 FILE < THIS`` loads; a record that is there already is replaced."""
    typed = ", ".join(
        f"{column.name} {_SQL[column.kind]}{' PRIMARY KEY' if column.name == 'id' else ''}"
        for column in columns()
    )
    names = ", ".join(column.name for column in columns())
    lines = [f"CREATE TABLE IF NOT EXISTS {TABLE} ({typed});", "BEGIN;"]
    for row in rows:
        values = ", ".join(_literal(row[column.name]) for column in columns())
        lines.append(f"INSERT OR REPLACE INTO {TABLE} ({names}) VALUES ({values});")
    return "\n".join([*lines, "COMMIT;", ""])


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of what differs between the rows, below a list of what is the same for all."""
    if not rows:
        return "No records.\n"
    names = [column.name for column in columns() if column.name not in _NEVER]
    differing = [name for name in names if name in _ALWAYS or len({str(row[name]) for row in rows}) > 1]
    same = [name for name in names if name not in differing and rows[0][name] not in (None, "")]
    # The label first: it is what a row is called.
    differing.sort(key=lambda name: name != "label")
    lines = [f"* {name}: {_cell(rows[0][name])}" for name in same]
    lines += ["", f"| {' | '.join(differing)} |", f"|{' --- |' * len(differing)}"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in differing)} |" for row in rows]
    return "\n".join(lines) + "\n"


FORMS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "json": to_json_rows,
    "sql": to_sql,
}


def _scalars(kind: type, path: tuple[str, ...], of: Callable[[Record], Any]) -> list[Column]:
    found: list[Column] = []
    for field in dataclasses.fields(kind):
        inner = _without_none(hints(kind)[field.name])
        at, get = (*path, field.name), _getter(of, field.name)
        if dataclasses.is_dataclass(inner):
            found += _scalars(typing.cast(type, inner), at, get)
        elif typing.get_origin(inner) is typing.Literal:
            found.append(Column("_".join(at), str, get))
        elif inner in _SQL:
            found.append(Column("_".join(at), inner, get))
        elif inner == tuple[float, float]:
            found += [
                Column("_".join((*at, end)), float, _item(get, i)) for i, end in enumerate(("low", "high"))
            ]
    return found


def _gathered() -> list[Column]:
    """What is a list or a mapping in the record and one value in a row."""
    effective = [Column(f"effective_{name}", str, partial(_effective, name)) for name in _EFFECTIVE]
    parts = [Column(f"component_{name}_median", float, partial(_median, name)) for name in _COMPONENTS]
    worst = [Column(f"worst_{metric}", float, partial(_worst, metric)) for metric in ("psnr_db", "ssim")]
    kinds = {"cpu": str, "threads": int, "memory_bytes": int, "system": str, "python": str}
    facts = [Column(f"environment_{name}", kind, partial(_fact, name)) for name, kind in kinds.items()]
    return [
        *effective,
        *parts,
        *worst,
        *facts,
        Column("environment_gpus", str, lambda r: _joined(_gpu_names(r))),
        Column("environment_packages", str, _versions),
        Column("prompts", int, lambda r: len(r.workload.prompts)),
        Column(
            "adapters", str, lambda r: _joined(f"{a.name}:{a.unet_strength:g}" for a in r.workload.adapters)
        ),
        Column("outliers", int, lambda r: len(r.stats.image.outliers) if r.stats.image else None),
        Column("failed_gates", int, lambda r: sum(not gate.passed for gate in r.parity.gates)),
        Column("reasons", str, lambda r: "; ".join(r.reasons)),
        Column("remarks", str, lambda r: "; ".join(r.remarks)),
        Column("command", str, lambda r: shlex.join(r.command)),
        Column("samples_seconds", str, lambda r: json.dumps([sample.seconds for sample in r.samples])),
    ]


def _getter(of: Callable[[Record], Any], name: str) -> Callable[[Record], Any]:
    def get(record: Record) -> Any:
        value = of(record)
        return None if value is None else getattr(value, name)

    return get


def _item(of: Callable[[Record], Any], index: int) -> Callable[[Record], Any]:
    def get(record: Record) -> Any:
        value = of(record)
        return None if value is None else value[index]

    return get


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _joined(values: typing.Iterable[Any]) -> str:
    return " + ".join(dict.fromkeys(str(value) for value in values))


def _effective(name: str, record: Record) -> str:
    return _joined(getattr(row, name) for row in record.effective.values())


def _fact(name: str, record: Record) -> Any:
    return record.environment.get(name)


def _median(component: str, record: Record) -> float | None:
    found = record.stats.components.get(component)
    return found.median if found else None


def _worst(metric: str, record: Record) -> float | None:
    return min((image.metrics[metric] for image in record.images if metric in image.metrics), default=None)


def _gpu_names(record: Record) -> list[str]:
    gpus = record.environment.get("gpus") or ()
    return [str(gpu.get("name")) if isinstance(gpu, Mapping) else str(gpu) for gpu in gpus]


def _versions(record: Record) -> str:
    packages = record.environment.get("packages") or {}
    return " ".join(f"{name}=={version}" for name, version in sorted(packages.items()))


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return repr(value)
    # A text with NUL would end the statement for SQLite; no text of a record needs one.
    return "'" + str(value).replace("'", "''").replace("\0", "\ufffd") + "'"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")
