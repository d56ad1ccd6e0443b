"""Shared by the tests of the doctor: a machine made of small files, and what a diagnosis should say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kiln.backends.doctor.diagnosis import Diagnosis
from kiln.backends.doctor.finding import Finding, Verdict


@pytest.fixture
def machine(helper: Callable[[str], Any], tmp_path: Path) -> Any:
    """A computer with a processor, memory and a disk, and nothing else; its methods add to it."""
    return helper("backends/doctor/machine").Machine(tmp_path / "root")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's CASES, one test for each, by name; see ``machine_case``."""
    if "machine_case" in metafunc.fixturenames:
        cases = metafunc.module.CASES
        metafunc.parametrize("machine_case", cases, ids=[case[0] for case in cases], indirect=True)


@pytest.fixture
def machine_case(request: pytest.FixtureRequest, machine: Any) -> Callable[[], None]:
    """Builds a machine, diagnoses it, and compares with everything that the case says.

    A case is ``(name, build, troubles, usable, exit_code)``; the last two may be left out. ``troubles`` names
    every warning and failure that comes, by id: one more or one less fails. Its text, parts of it divided by
    ``|``, stands in the finding, in its sentence, evidence or lines to type; ``!`` before it says that it is
    a failure. ``usable`` is a backend that works, or ``""`` if none does.
    """
    _, build, troubles, *rest = request.param
    return lambda: judge(build(machine).diagnose(), troubles, *rest)


def judge(
    diagnosis: Diagnosis, troubles: dict[str, str], usable: str | None = None, exit_code: int | None = None
) -> None:
    """Compare a diagnosis with all that a case says."""
    bad = [f for f in diagnosis.findings if f.verdict in (Verdict.WARNING, Verdict.FAILURE)]
    assert {f.id for f in bad} == set(troubles), [(f.id, text_of(f)) for f in bad]
    for finding in bad:
        wanted = troubles[finding.id]
        assert (finding.verdict is Verdict.FAILURE) is wanted.startswith("!"), text_of(finding)
        parts = wanted.removeprefix("!").split("|")
        assert [part for part in parts if part not in text_of(finding)] == [], text_of(finding)
        assert finding.fix, text_of(finding)
    if usable is not None:
        assert usable in diagnosis.usable if usable else diagnosis.usable == ()
    assert diagnosis.exit_code == (exit_code if exit_code is not None else bool(bad))


@pytest.fixture(name="judge")
def judge_fixture() -> Callable[..., None]:
    return judge


def text_of(finding: Finding) -> str:
    return "\n".join([finding.summary, *finding.evidence, *finding.fix])
