"""The tables in the terminal: eighty columns, a pipe, and labels that look like markup."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kiln.benchmarks.html.terminal import print_records
from kiln.benchmarks.html.text import seconds


def printed(records, width: int = 80, **options) -> str:
    file = io.StringIO()
    print_records(records, Console(file=file, width=width, **options))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_all_tables_fit(six, width: int) -> None:
    text = printed(six.records, width)
    assert max(map(len, text.splitlines())) <= width
    for title in ("time per image", "components", "phases", "memory, peak", "parity, gates"):
        assert title.split()[0] in text
    medians = [seconds(r.stats.image.median) for r in six.records]
    for figure in (*medians, "12.4 s", "3.14 GB"):
        assert figure in text
    assert text.count("invalid") >= 1
    assert "the median lies in one of them" in " ".join(text.split())


def test_a_pipe_gets_no_escapes_and_a_terminal_colours(six) -> None:
    assert "\x1b" not in printed(six.records)
    assert "\x1b[" in printed(six.records, force_terminal=True, color_system="standard")


def test_labels_are_no_markup(six) -> None:
    record = replace(six.records[0], label="[red]x[/nope] \x1b[31m", reasons=("[bold]why[/]",))
    text = printed([record], 120)
    assert "[red]x[/nope] [31m" in text
    assert "[bold]why[/]" in text
    assert "\x1b" not in text


def test_none_is_said() -> None:
    assert printed([]) == "no records\n"
