"""docs/adapters.md says what the tests do: every case, every package, every dialect, every disagreement."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("lycoris")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location(
        "kiln_tests_adapters_oracle_table", Path(__file__).parent / "oracle_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checked(table):
    return table.packages()


def test_every_case_is_in_one_row(table, cases):
    listed = [case for family in table.FAMILIES for case in family.cases]
    assert sorted(listed) == sorted(cases.CASES)


def test_what_is_checked_is_a_case(checked, cases):
    assert set(checked) <= set(cases.CASES)


def with_fewer_than_two(table, checked):
    return [case for family in table.FAMILIES for case in family.cases if len(checked.get(case, ())) < 2]


def test_every_case_has_two_packages(table, checked):
    assert with_fewer_than_two(table, checked) == []
    assert with_fewer_than_two(table, checked | {"CP": ["lycoris"]}) == ["CP"]


def test_what_no_package_says_is_said_of_a_case_of_the_family(table):
    for family in table.FAMILIES:
        assert set(family.unsaid) <= set(family.cases), family.title


def test_the_tests_of_the_dialects_exist(table):
    for dialect in table.DIALECTS:
        for test in dialect.tests:
            module, _, name = test.partition("::")
            assert name in table.tests_of(module), test


def test_every_disagreement_that_a_family_names_has_a_test(table):
    known = set(table.tests_of(table.DISAGREEMENTS))
    named = {name for family in table.FAMILIES for name in family.disagreements}
    assert named <= known


def test_the_page_is_up_to_date(table):
    page = table.PAGE.read_text(encoding="utf-8")
    message = "run python tests/exporters/adapters/oracle_table.py"
    assert table.render(page) == page, message
    counts = {
        "19 kinds of network": len(table.load(table.NETWORKS).FAMILIES),
        "19 configurations": len(table.load("test_against_peft").CONFIGS)
        + len(table.load("test_against_diffusers").PEFT_CONFIGS),
    }
    for words, count in counts.items():
        assert words.split()[0] == str(count), f"{words}: {count}"
        assert words in page


def test_a_page_that_lacks_a_package_is_seen(table):
    page = table.PAGE.read_text(encoding="utf-8")
    assert (
        table.render(page.replace("lycoris, PEFT", "lycoris", 1))
        == page
        != page.replace("lycoris, PEFT", "lycoris", 1)
    )
