"""The findings for a person: what works first, then what to mend with the lines to type."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.text import Text

from .diagnosis import Diagnosis
from .finding import Finding, Verdict

_MARKS = {
    Verdict.FAILURE: ("failure", "bold red"),
    Verdict.WARNING: ("warning", "yellow"),
    Verdict.OK: ("ok", "green"),
    Verdict.NOT_APPLICABLE: ("-", "dim"),
}


# What the table of engines says already, when nothing is wrong with it.
_IN_TABLE = ("D-EP-LIVE", "D-NUM", "D-LOAD")
_INDENT = 8  # columns of the verdict; evidence and lines to type stand below the id
_ID = 15


def print_diagnosis(diagnosis: Diagnosis, console: Console, verbose: bool = False) -> None:
    """Print it. ``verbose`` also shows what is in order with its evidence, and what does not apply."""
    _print_engines(diagnosis, console)
    for verdict in (Verdict.FAILURE, Verdict.WARNING):
        for finding in diagnosis.findings:
            if finding.verdict is verdict:
                _print(finding, console, in_full=True)
    for finding in diagnosis.findings:
        if finding.verdict is Verdict.OK and (verbose or finding.id not in _IN_TABLE):
            _print(finding, console, in_full=verbose)
    for finding in diagnosis.findings:
        if finding.verdict is Verdict.NOT_APPLICABLE and verbose:
            _print(finding, console, in_full=True)
    _line(console, Text(f"\n{_summary(diagnosis)}"))


def _print_engines(diagnosis: Diagnosis, console: Console) -> None:
    if not diagnosis.engines:
        said = "No engine is installed." if diagnosis.live else "No engine was started."
        _line(console, Text(f"{said}\n"))
        return
    rows = [("backend", "engine", "works", "fp32", "half")]
    rows += [
        (r.target.backend, r.target.engine, "yes" if r.works else "no", r.fp32, r.half)
        for r in diagnosis.engines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        text = Text("  ".join(cells).rstrip(), style="bold" if index == 0 else "")
        text.highlight_regex(r"(?<= )yes(?= )", "green")
        text.highlight_regex(r"(?<= )no(?= )", "bold red")
        _line(console, text)
    _line(console, Text("fp32, half: cosine of the result and numpy's; 1 is equal\n", style="dim"))


def _print(finding: Finding, console: Console, in_full: bool) -> None:
    word, style = _MARKS[finding.verdict]
    before = _INDENT + _ID + 1
    first, *rest = _wrapped(finding.summary, console.width - before)
    head = Text(word.ljust(_INDENT), style=style)
    head.append(finding.id.ljust(_ID + 1), style="dim")
    head.append(first, style="")
    _line(console, head)
    for line in rest:
        _line(console, Text(" " * before + line))
    if not in_full:
        return
    for evidence in finding.evidence:
        for line in _wrapped(evidence, console.width - _INDENT):
            _line(console, Text(" " * _INDENT + line, style="dim"))
    for fix in finding.fix:
        _print_fix(fix, console)


def _print_fix(fix: str, console: Console) -> None:
    """A command after ``$``, in one line to copy; a sentence, which ends with a full stop, after ``>``."""
    if fix.endswith("...") or not fix.endswith("."):
        _line(console, Text(f"{' ' * _INDENT}$ {fix}", style="bold"))
        return
    for index, line in enumerate(_wrapped(fix, console.width - _INDENT - 2)):
        _line(console, Text(f"{' ' * _INDENT}{'> ' if index == 0 else '  '}{line}"))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of that width; a path or a word that is longer stays whole."""
    return textwrap.wrap(text, max(20, width), break_long_words=False, break_on_hyphens=False) or [""]


def _line(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _summary(diagnosis: Diagnosis) -> str:
    counts = {v: sum(f.verdict is v for f in diagnosis.findings) for v in Verdict}
    said = [
        f"{counts[v]} {v.value}{'s' if counts[v] != 1 else ''}" for v in (Verdict.FAILURE, Verdict.WARNING)
    ]
    if not diagnosis.live:
        return f"{', '.join(said)}; nothing was run."
    if not diagnosis.usable:
        return f"No backend works here. {', '.join(said)}."
    return f"Works: {', '.join(diagnosis.usable)}. {', '.join(said)}."
