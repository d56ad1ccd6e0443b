"""Which package checks which family and dialect, as docs/adapters.md says it; the tests are what is asked.

    python tests/exporters/adapters/oracle_table.py        writes the tables of docs/adapters.md anew

A test module that compares with a package says in ``CHECKED`` which cases of cases.py it does that for.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"
# Test module -> the package that it compares with.
MODULES = {
    "test_against_lycoris": "lycoris",
    "test_against_peft": "PEFT",
    "test_against_peft_parts": "PEFT",
    "test_against_peft_settings": "PEFT",
    "test_against_invokeai": "InvokeAI",
    "test_against_torch": "torch",
    "test_against_scipy": "SciPy",
}
NETWORKS = "test_against_lycoris_networks"
DISAGREEMENTS = "test_known_disagreements"


def load(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"kiln_tests_oracles_{name}", HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_ROWS = load("oracle_rows")
FAMILIES, DIALECTS = _ROWS.FAMILIES, _ROWS.DIALECTS


def packages() -> dict[str, list[str]]:
    """Case -> the packages that check it, in the order of ``MODULES``."""
    found: dict[str, list[str]] = {}
    for module, package in MODULES.items():
        for case in load(module).CHECKED:
            if package not in found.setdefault(case, []):
                found[case].append(package)
    return found


def tests_of(module: str) -> dict[str, str]:
    """Names of the tests of a module, and the first line of what each says of itself."""
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return {
        node.name: (ast.get_docstring(node) or "").split("\n")[0]
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def words(test: str) -> str:
    """What the name of a test says."""
    return test.removeprefix("test_").replace("_", " ")


def family_table(checked: Mapping[str, Sequence[str]]) -> str:
    """Rows of families by form."""
    lines = ["| family | form | checked against | what no package says |", "|---|---|---|---|"]
    for family in FAMILIES:
        for index, case in enumerate(family.cases):
            title = family.title if index == 0 else ""
            names = ", ".join(["float64 reference", *checked.get(case, ())])
            lines.append(f"| {title} | {case} | {names} | {family.unsaid.get(case, '')} |")
    return "\n".join(lines)


def dialect_table() -> str:
    """Rows of dialects."""
    lines = ["| dialect | a key | checked against |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {d.title} | {d.example} | {d.oracle} |" for d in DIALECTS)])


def disagreement_list() -> str:
    """Where packages are wrong, as the tests that show it say, with the families that it concerns."""
    concerned: dict[str, list[str]] = {}
    for family in FAMILIES:
        for name in family.disagreements:
            concerned.setdefault(name, []).append(family.title)
    lines = []
    for name, text in tests_of(DISAGREEMENTS).items():
        families = f" ({'; '.join(concerned[name])})" if name in concerned else ""
        lines.append(f"* **{words(name)}**{families}." + (f" {text}" if text else ""))
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its generated parts made anew."""
    parts = {
        "families": family_table(packages()),
        "dialects": dialect_table(),
        "disagreements": disagreement_list(),
    }
    for name, text in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
