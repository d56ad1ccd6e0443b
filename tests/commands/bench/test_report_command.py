"""``kiln bench report``: what it writes, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from kiln.cli import main


def test_no_results(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path)])
    assert done.exit_code == 2
    assert "does not exist; give a results folder of `kiln bench run -o`" in done.output


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("")
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no records; `kiln bench run -o" in done.output
    assert not (tmp_path / "report.html").exists()
