"""``kiln bench show|compare|verify|merge|export|bundle``: what is printed, and exit codes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.store import RECORDS, append_record, read_records
from kiln.cli import main

Make = Callable[..., Record]
Times = Callable[..., list[float]]
LATER = "20260102T000000Z-bbbbbbbb"


def kiln(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def before(make_record: Make, times: Times, tmp_path: Path) -> Path:
    append_record(tmp_path / "before", make_record(times(1.0, 0.01, 20, 1), floor=0.01))
    return tmp_path / "before"


@pytest.fixture
def after(make_record: Make, times: Times, tmp_path: Path) -> Callable[..., Path]:
    def make(slower: float, **changes: Any) -> Path:
        folder = tmp_path / f"after{slower}"
        append_record(folder, make_record(times(slower, 0.01, 20, 2), floor=0.01, run=LATER, **changes))
        return folder

    return make


@pytest.mark.parametrize(
    ("slower", "limit", "code", "said"),
    [
        (1.1, None, 0, "% slower"),
        (1.1, "5%", 1, "% slower"),
        (1.1, "20%", 0, "% slower"),
        (1.0, "5%", 0, "not significant"),
        (0.8, "5%", 0, "faster"),
    ],
)
def test_compare_answers_and_fails_if_asked_to(
    before: Path, after: Callable[..., Path], slower: float, limit: str | None, code: int, said: str
) -> None:
    found = kiln("compare", before, after(slower), *(["--fail-if-slower", limit] if limit else []))
    assert found.exit_code == code, found.output
    assert said in found.stdout
    assert "20 and 20 batches" in found.stdout
    assert "noise floor 1.0%\n" in found.stdout


def test_compare_as_json(before: Path, after: Callable[..., Path]) -> None:
    (row,) = json.loads(kiln("compare", before, after(1.1), "--json").stdout)
    assert row["answer"] == "slower"
    assert row["interval_95"][0] < row["ratio"] < row["interval_95"][1]
    assert row["test"] == "mann-whitney"


def test_compare_refuses_other_work_and_says_which(
    before: Path, after: Callable[..., Path], make_workload: Callable[..., Any]
) -> None:
    found = kiln("compare", before, after(1.0, load=make_workload(steps=5)))
    assert found.exit_code == 1
    assert "cannot be compared\n  steps: 4 and 5\n" in found.stdout
    assert "--force" not in kiln("compare", "--help").stdout


def test_compare_of_another_machine_answers_no_question_of_a_regression(
    before: Path, after: Callable[..., Path]
) -> None:
    other = after(1.0, environment={"cpu": "Other"})
    assert kiln("compare", before, other).exit_code == 0
    found = kiln("compare", before, other, "--fail-if-slower", "5%")
    assert found.exit_code == 1
    assert "another machine: cpu: Test CPU and Other" in found.stdout


def test_compare_of_two_records_by_name(results: Path) -> None:
    found = kiln("compare", "openvino fp32", "onnxruntime fp32", "-i", results)
    assert found.exit_code == 0
    assert found.stdout.startswith("openvino fp32 -> onnxruntime fp32, test@1: ")
    assert "slower" in found.stdout
    ids = [record.id for record in read_records(results)]
    assert "faster" in kiln("compare", ids[1], ids[0], "-i", results).stdout


def test_compare_of_the_last_two_runs(before: Path, after: Callable[..., Path], tmp_path: Path) -> None:
    assert kiln("merge", before, after(1.2), "-o", tmp_path / "all").exit_code == 0
    for arguments in ([tmp_path / "all"], ["-i", tmp_path / "all"]):
        found = kiln("compare", *arguments)
        assert found.exit_code == 0
        assert "slower" in found.stdout
    runs = [record.run for record in read_records(tmp_path / "all")]
    assert "faster" in kiln("compare", runs[1], runs[0], "-i", tmp_path / "all").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "openvino fp32"], "no record is called 'nothing'; there are 'openvino fp32'"),
        (["openvino fp32"], "compared with what?"),
        (["openvino fp32", "openvino fp32"], "are the same record"),
        ([], "was measured twice; name two of them ('openvino fp32', 'onnxruntime fp32')"),
        (["openvino fp32", "onnxruntime fp32", "--fail-if-slower", "five"], "'five' is no percentage"),
    ],
)
def test_compare_says_what_is_wrong(results: Path, arguments: list[str], said: str) -> None:
    found = kiln("compare", *arguments, "-i", results)
    assert found.exit_code == 2
    assert said in found.output


def test_compare_names_records_without_a_partner(before: Path, results: Path) -> None:
    found = kiln("compare", before, results)
    assert "only the candidate has onnxruntime fp32 of test@1" in found.stderr
    assert found.stdout.startswith("openvino fp32 -> openvino fp32")


def test_verify(results: Path) -> None:
    found = kiln("verify", results)
    assert (found.exit_code, found.stdout) == (0, "2 records, 6 pictures: all is as they say\n")
    text = (results / RECORDS).read_text()
    (results / RECORDS).write_text(text.replace('"verdict": "valid"', '"verdict": "noisy"', 1))
    one = read_records(results)[0].id
    found = kiln("verify", results)
    assert found.exit_code == 1
    assert found.stdout.startswith(
        f"{one}: the verdict is noisy, and valid follows from its noise, clean, and its other reasons: none\n"
    )
    assert json.loads(kiln("verify", results, "--json").stdout)["findings"][0]["record"] == one


@pytest.mark.parametrize("form", ["md", "csv", "json", "sql"])
def test_export(results: Path, tmp_path: Path, form: str) -> None:
    found = kiln("export", results, "-f", form)
    assert found.exit_code == 0
    assert "onnxruntime fp32" in found.stdout
    assert kiln("export", results, "-f", form, "-o", tmp_path / "x").exit_code == 0
    assert (tmp_path / "x").read_text() == found.stdout
    if form == "sql":
        sqlite3.connect(":memory:").executescript(found.stdout)


def test_bundle_and_verify_what_it_made(results: Path, tmp_path: Path) -> None:
    found = kiln("bundle", results, "-o", tmp_path / "submission")
    assert found.exit_code == 0, found.output
    assert kiln("verify", tmp_path / "submission").exit_code == 0
    again = kiln("bundle", results, "-o", tmp_path / "submission")
    assert again.exit_code == 2
    assert "is not empty" in again.output


def test_show_lists_ids_and_prints_whole_records(results: Path) -> None:
    found = kiln("show", results, "--ids")
    assert [line.split()[0] for line in found.stdout.splitlines()] == [r.id for r in read_records(results)]
    found = kiln("show", results, "onnxruntime fp32", "--json")
    assert found.stdout == (results / RECORDS).read_text().splitlines()[1] + "\n"


def test_show_prints_the_table(results: Path) -> None:
    pytest.importorskip("kiln.benchmarks.html.terminal")
    found = kiln("show", results)
    assert found.exit_code == 0
    assert "onnxruntime fp32" in found.stdout


def test_torn_lines_are_warned_of(results: Path) -> None:
    with (results / RECORDS).open("a") as file:
        file.write('{"id": "2')
    for command in (["show", results, "--ids"], ["export", results]):
        assert "warning: line 3 of" in kiln(*command).stderr


@pytest.mark.parametrize("command", ["show", "compare", "verify", "merge", "export", "bundle"])
def test_commands_have_help_with_an_example(command: str) -> None:
    found = kiln(command, "--help")
    assert found.exit_code == 0
    assert "Example:" in found.stdout


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    for command in (["show", tmp_path], ["verify", tmp_path], ["export", tmp_path], ["compare", tmp_path]):
        found = kiln(*command)
        assert found.exit_code == 2
        assert "does not exist; give a results folder" in found.output
