"""``kiln bench run`` and ``workloads``: what they refuse, and one real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kiln.benchmarks.records.store import read_records
from kiln.cli import main
from kiln.commands.bench import bench


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_every_file_is_a_command_with_help_and_an_example() -> None:
    names = bench.list_commands(None)  # type: ignore[arg-type]
    assert {"run", "workloads"} <= set(names)
    for name in names:
        command = bench.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.name == name
        assert "Example:" in str(command.help)
    assert bench.get_command(None, "nothing") is None  # type: ignore[arg-type]


def test_workloads_are_listed() -> None:
    result = run("workloads", "--json")
    assert result.exit_code == 0
    assert {"quick", "standard", "full", "random"} == {row["name"] for row in json.loads(result.stdout)}
    assert "quick@1" in run("workloads").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nope",), "there is no workload 'nope'; expected quick"),
        (("full",), "add -m MODEL"),
        (("quick", "--backend", "nope"), "there is no backend 'nope'"),
        (("quick", "--size", "7"), "width 7 is not a multiple of 8"),
        (("quick", "--precision", "int3"), "unknown precision 'int3'"),
        (("quick", "--peer", "nobody"), "unknown peer 'nobody'"),
        (("quick", "--resume", "--fresh"), "give one or the other"),
        (("quick", "--resume"), "holds no interrupted run"),
        (("random", "-m", "emoji"), "random weights that it makes itself"),
    ],
)
def test_what_cannot_be_is_a_usage_error_and_leaves_nothing(
    arguments: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    result = run("run", *arguments, "-o", str(folder))
    assert result.exit_code == 2
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "records.jsonl").exists()


def test_a_real_run_writes_a_record_that_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["kiln", "bench", "run", "quick", "--lora=/srv/somebody/style.safetensors:1"]
    )
    few: tuple[Any, ...] = ("--min-images", "2", "--min-seconds", "0", "--steps", "2")
    result = run("run", "quick", "--backend", "null", *few, "--no-parity", "--no-report", "-o", str(tmp_path))
    (record,) = read_records(tmp_path)
    # A machine that is busy with something else makes the row invalid, and only that may.
    assert result.exit_code == (1 if record.noise.verdict == "invalid" else 0), record.reasons
    assert record.requested.name == "null"
    assert len(record.samples) == 2
    assert record.stats.unattributed is not None
    assert record.phases.compile_cold is not None
    assert record.phases.load_cached is None  # the null backend has nothing to cache
    assert record.phases.imports is not None
    assert len(record.images) == 4
    assert record.memory.rss is not None
    assert "parity not checked: --no-parity" in record.reasons
    assert "somebody" not in json.dumps(record.command)
    assert record.command[-1] == "--lora=style.safetensors:1"
