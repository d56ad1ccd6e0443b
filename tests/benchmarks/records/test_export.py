"""One list of columns in four forms, each read by a reader that nobody here wrote."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kiln.benchmarks.records.export import columns, export_records, rows_of
from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.store import read_records

Make = Callable[..., Record]
NAMES = [column.name for column in columns()]


def awkward(record: Record) -> Record:
    return replace(record, label='it\'s "a", | b\nc; DROP TABLE kiln_bench;--', reasons=("é ü", "x, y"))


def test_columns_follow_from_the_record() -> None:
    assert len(NAMES) == len(set(NAMES))
    expected = {
        "id",
        "label",
        "tool_version",
        "workload_model_digest",
        "workload_cfg_scale",
        "requested_precision",
        "effective_provider",
        "phases_compile_cold",
        "stats_image_median",
        "stats_image_interval_low",
        "stats_image_p95",
        "stats_unet_step_median",
        "component_vae_decoder_median",
        "memory_rss_value",
        "memory_rss_method",
        "energy_joules_per_image",
        "noise_floor",
        "worst_psnr_db",
        "verdict",
        "reasons",
        "remarks",
        "samples_seconds",
    }
    assert expected <= set(NAMES)


def test_values_are_the_records(results: Path) -> None:
    record = read_records(results)[0]
    (row,) = rows_of([record])
    assert record.stats.image is not None
    assert row["stats_image_median"] == record.stats.image.median
    assert (row["stats_image_interval_low"], row["stats_image_interval_high"]) == record.stats.image.interval
    assert row["effective_backend"] == "openvino"
    assert row["worst_psnr_db"] == min(image.metrics["psnr_db"] for image in record.images)
    assert row["command"] == "kiln bench run quick --backend openvino"
    assert row["environment_packages"] == "numpy==2.4.6 openvino==2026.4.1"
    assert json.loads(row["samples_seconds"]) == [sample.seconds for sample in record.samples]


def test_a_record_without_figures_has_empty_cells(make_record: Make) -> None:
    (row,) = rows_of([make_record(timed=())])
    assert row["stats_image_median"] is None
    assert row["stats_image_interval_low"] is None
    assert row["memory_device_value"] is None


def test_csv_is_read_by_pythons_reader(results: Path) -> None:
    records = [awkward(record) for record in read_records(results)]
    found = list(csv.DictReader(io.StringIO(export_records(records, "csv"))))
    assert [list(row) for row in found] == [NAMES, NAMES]
    for row, expected in zip(found, rows_of(records), strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_json_is_the_same_rows(results: Path) -> None:
    records = read_records(results)
    assert json.loads(export_records(records, "json")) == rows_of(records)


def test_sql_is_loaded_by_sqlite(results: Path) -> None:
    records = [awkward(record) for record in read_records(results)]
    base = sqlite3.connect(":memory:")
    for _ in range(2):  # a second time replaces
        base.executescript(export_records(records, "sql"))
    base.row_factory = sqlite3.Row
    found = [dict(row) for row in base.execute("SELECT * FROM kiln_bench ORDER BY stats_image_median")]
    assert found == [
        {name: int(value) if isinstance(value, bool) else value for name, value in row.items()}
        for row in rows_of(records)
    ]
    (kinds,) = base.execute(
        "SELECT typeof(workload_steps), typeof(stats_image_sd), typeof(label) FROM kiln_bench LIMIT 1"
    )
    assert tuple(kinds) == ("integer", "real", "text")


def test_sql_is_loaded_by_the_sqlite_command(results: Path, tmp_path: Path) -> None:
    if shutil.which("sqlite3") is None:
        pytest.skip("the sqlite3 command is not here; test_sql_is_loaded_by_sqlite uses the library")
    text = export_records([awkward(record) for record in read_records(results)], "sql")
    subprocess.run(["sqlite3", str(tmp_path / "x.db")], input=text, text=True, check=True)
    assert sqlite3.connect(tmp_path / "x.db").execute("SELECT count(*) FROM kiln_bench").fetchone() == (2,)


def test_markdown_shows_what_differs_in_the_table_and_the_rest_above(results: Path) -> None:
    text = export_records(read_records(results), "md")
    above, _, table = text.partition("\n\n")
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| label | requested_name |")
    assert lines[2].startswith("| openvino fp32 | openvino |")
    assert len({line.count(" | ") for line in (lines[0], lines[2], lines[3])}) == 1
    assert "* workload_steps: 4" in above.splitlines()
    assert "workload_steps" not in table
    assert "stats_image_median" in lines[0]


def test_markdown_keeps_its_cells(make_record: Make) -> None:
    text = export_records([awkward(make_record())], "md")
    assert 'it\'s "a", \\| b c; DROP TABLE kiln_bench;--' in text.splitlines()[-1]
    assert export_records([], "md") == "No records.\n"
