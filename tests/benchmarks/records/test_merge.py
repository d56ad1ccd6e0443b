"""Folders brought together: nothing twice, nothing lost, conflicts named before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kiln.benchmarks.records.merge import merge_folders
from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.store import RECORDS, append_record, read_records
from kiln.benchmarks.records.verify import verify_folder
from kiln.errors import UsageError

Make = Callable[..., Record]


@pytest.fixture
def other(make_record: Make, tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    append_record(folder, make_record(folder=folder, run="20260102T000000Z-bbbbbbbb", levels=4))
    return folder


def test_records_and_pictures_are_brought_together(results: Path, other: Path, tmp_path: Path) -> None:
    found = merge_folders([results, other], tmp_path / "all")
    assert (len(found.added), found.known) == (3, 0)
    assert found.repeated == {read_records(other)[0].key: 2}
    assert verify_folder(tmp_path / "all").findings == ()
    ids = [record.id for record in read_records(tmp_path / "all")]
    assert ids == sorted([r.id for r in (*read_records(results), *read_records(other))])


def test_the_order_of_the_sources_makes_no_difference(results: Path, other: Path, tmp_path: Path) -> None:
    merge_folders([results, other], tmp_path / "a")
    merge_folders([other, results], tmp_path / "b")
    assert (tmp_path / "a" / RECORDS).read_bytes() == (tmp_path / "b" / RECORDS).read_bytes()


def test_merging_again_adds_nothing(results: Path, other: Path, tmp_path: Path) -> None:
    merge_folders([results, other], tmp_path / "all")
    before = (tmp_path / "all" / RECORDS).read_bytes()
    found = merge_folders([other, results], tmp_path / "all")
    assert (found.added, found.known, found.images) == ((), 3, 0)
    assert (tmp_path / "all" / RECORDS).read_bytes() == before


def test_lines_are_handed_on_word_for_word(results: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (results / RECORDS).read_text().splitlines()]
    # As an older Kiln might have written it: another spacing, and no field that has a default.
    lines[0].pop("command")
    text = json.dumps(lines[0], separators=(",", ":"))
    (results / RECORDS).write_text(f"{text}\n")
    merge_folders([results], tmp_path / "all")
    assert (tmp_path / "all" / RECORDS).read_text() == f"{text}\n"


def test_two_records_of_one_id_are_a_conflict(results: Path, make_record: Make, tmp_path: Path) -> None:
    first = read_records(results)[0]
    append_record(tmp_path / "forged", replace(first, label="faster", images=(), parity=make_record().parity))
    with pytest.raises(
        UsageError, match=f"nothing was merged: {first.id} of .* differs in label, parity, images"
    ):
        merge_folders([results, tmp_path / "forged"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_wrong_or_missing_picture_is_named(results: Path, tmp_path: Path) -> None:
    first = read_records(results)[0]
    (results / first.images[0].file).write_bytes(b"other")
    (results / first.images[1].file).unlink()
    with pytest.raises(UsageError, match=r"is not the picture that .* cannot be read: No such file"):
        merge_folders([results], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_torn_line_is_left_out_and_said(results: Path, tmp_path: Path) -> None:
    with (results / RECORDS).open("a") as file:
        file.write('{"id": "20')
    found = merge_folders([results], tmp_path / "all")
    assert len(found.added) == 2
    assert "line 3" in found.torn[0]
    assert verify_folder(tmp_path / "all").findings == ()
