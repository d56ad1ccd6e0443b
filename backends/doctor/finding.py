"""What a check found: a verdict, the evidence for it, and what to type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended. ``not applicable``: the thing it looks at is not on this machine."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    ``summary`` is one sentence; ``evidence`` what was seen, paths and values; ``fix`` the lines to type,
    each a shell command or a sentence that ends with a full stop.
    """

    id: str
    verdict: Verdict
    summary: str
    evidence: tuple[str, ...] = ()
    fix: tuple[str, ...] = ()


def ok(id: str, summary: str, *evidence: str) -> Finding:
    """A check that found what it hoped for."""
    return Finding(id, Verdict.OK, summary, evidence)


def absent(id: str, summary: str, *evidence: str) -> Finding:
    """A check that found nothing to look at."""
    return Finding(id, Verdict.NOT_APPLICABLE, summary, evidence)


def warning(id: str, summary: str, evidence: Iterable[str] = (), fix: Iterable[str] = ()) -> Finding:
    """Something that costs speed or exactness, or that may go wrong."""
    return Finding(id, Verdict.WARNING, summary, tuple(evidence), tuple(fix))


def failure(id: str, summary: str, evidence: Iterable[str] = (), fix: Iterable[str] = ()) -> Finding:
    """Something that keeps a device or an engine from working."""
    return Finding(id, Verdict.FAILURE, summary, tuple(evidence), tuple(fix))
