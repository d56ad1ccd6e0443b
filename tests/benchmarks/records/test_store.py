"""Appending and reading: whole lines, locks, torn lines, numbers of lines in errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kiln.benchmarks.records.forms import RecordError, to_json
from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.store import RECORDS, append_lines, append_record, read_records, read_store
from kiln.errors import StorageError, UsageError

Make = Callable[..., Record]
# Appends one record twenty times, in a process of its own.
APPEND = """
import sys
from pathlib import Path
from kiln.benchmarks.records.store import append_lines
text = Path(sys.argv[2]).read_bytes()
for _ in range(20):
    append_lines(Path(sys.argv[1]), [text])
"""


def test_what_is_appended_is_read(make_record: Make, tmp_path: Path) -> None:
    folder = tmp_path / "new/results"
    records = [make_record(run=f"2026010{i}T000000Z-aaaaaaaa") for i in (1, 2, 3)]
    for record in records:
        assert append_record(folder, record) == folder / RECORDS
    assert read_records(folder) == tuple(records)
    assert read_records(folder / RECORDS) == tuple(records)
    assert read_store(folder).torn is None
    assert read_store(folder).texts == tuple(to_json(record).encode() for record in records)


@pytest.mark.parametrize("kept", [1, 40, 700, -1, -2])
def test_a_torn_last_line_is_said_and_the_rest_read(make_record: Make, tmp_path: Path, kept: int) -> None:
    first = make_record()
    append_record(tmp_path, first)
    whole = to_json(make_record(run="20260102T000000Z-aaaaaaaa")).encode()
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(whole[:kept])
    found = read_store(tmp_path)
    assert found.records == (first,)
    assert found.torn is not None
    assert f"line 2 of {tmp_path / RECORDS} was not written to its end" in found.torn


def test_an_append_after_a_torn_line_loses_nothing(make_record: Make, tmp_path: Path) -> None:
    first, second = make_record(), make_record(run="20260102T000000Z-aaaaaaaa")
    append_record(tmp_path, first)
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(to_json(second).encode()[:500])
    append_record(tmp_path, second)
    found = read_store(tmp_path)
    assert found.records == (first, second)
    assert found.torn is not None
    assert "line 2 of" in found.torn


def test_every_place_to_tear_a_line_is_seen_as_torn(make_record: Make, tmp_path: Path) -> None:
    text = to_json(make_record(label='a "quoted" {brace} \\ é')).encode()
    path = tmp_path / RECORDS
    for kept in range(1, len(text), 97):
        path.write_bytes(text[:kept])
        assert read_store(tmp_path).torn is not None, kept


@pytest.mark.parametrize("line", [b"nonsense", b'{"a": 1}', b"[]", b'{"a": 1]}', b'{"id": "\xff"}'])
def test_a_line_that_is_no_record_is_an_error_with_its_number(
    make_record: Make, tmp_path: Path, line: bytes
) -> None:
    append_record(tmp_path, make_record())
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(RecordError, match=r"line 3 of .*records\.jsonl: "):
        read_records(tmp_path)


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; give a results folder"):
        read_records(tmp_path)


def test_a_value_that_json_lacks_leaves_the_file_as_it_was(make_record: Make, tmp_path: Path) -> None:
    append_record(tmp_path, make_record())
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(RecordError, match="is inf"):
        append_record(tmp_path, make_record(environment={"x": float("inf")}))
    assert (tmp_path / RECORDS).read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_was(
    make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(tmp_path, make_record())
    before = (tmp_path / RECORDS).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        append_record(tmp_path, make_record(run="x"))
    assert (tmp_path / RECORDS).read_bytes() == before


def test_a_record_is_on_the_disk_when_append_returns(
    make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), real(number))[1]
    )
    path = append_record(tmp_path, make_record())
    assert synced == [path.stat().st_size]


def test_processes_and_threads_append_whole_lines(make_record: Make, tmp_path: Path) -> None:
    text = to_json(make_record()).encode()
    (tmp_path / "text").write_bytes(text)
    command = [sys.executable, "-c", APPEND, str(tmp_path / "out"), str(tmp_path / "text")]
    children = [subprocess.Popen(command) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda: [append_lines(tmp_path / "out", [text]) for _ in range(20)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait() for child in children] == [0, 0]
    assert (tmp_path / "out" / RECORDS).read_bytes() == (text + b"\n") * 80
