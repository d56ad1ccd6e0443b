"""What would be installed is what is in the checkout, and the root files agree with each other."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
NOT_SHIPPED = {"build", "dist", "docs", "tests", "tools", "training"}
MAX_DATA_BYTES = 50 * 1000**2

# setuptools' own answer to what a wheel would hold, without building one.
LIST_WHEEL = """
import json, sys
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
print(json.dumps([[path, command.build_lib] for path in command.get_outputs(include_bytecode=0)]))
"""


def wheel_files(root: Path) -> set[str]:
    """The files a wheel of ``root`` would hold, relative to the package ``kiln``."""
    command = [sys.executable, "-W", "ignore", "-c", LIST_WHEEL]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).relative_to(Path(library, "kiln")).as_posix() for path, library in rows}


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    return wheel_files(ROOT)


def files_below(folder: Path) -> list[Path]:
    """All files but hidden ones and Python's caches, below folders that are not hidden either."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        found += [Path(parent, f) for f in files if not f.startswith(".") and not f.endswith(".pyc")]
    return found


def packages_below(root: Path) -> set[str]:
    """Every folder of a checkout that holds code to ship, as a dotted name."""
    relative = [p.parent.relative_to(root).parts for p in files_below(root) if p.suffix == ".py"]
    return {".".join(("kiln", *parts)) for parts in relative if not (parts and parts[0] in NOT_SHIPPED)}


def source_files(root: Path) -> set[str]:
    """Everything in a checkout that must be in the wheel: root modules, all of the packages, the models."""
    found = [*root.glob("*.py"), root / "py.typed", *files_below(root / "models")]
    for name in {p.split(".")[1] for p in PACKAGES if "." in p}:
        found += files_below(root / name)
    return {p.relative_to(root).as_posix() for p in found}


def test_package_list_is_complete() -> None:
    assert sorted(packages_below(ROOT)) == sorted(PACKAGES)
    assert all(ROOT.joinpath(*p.split(".")[1:], "__init__.py").is_file() for p in PACKAGES)


def test_wheel_holds_every_module_and_data_file_and_nothing_else(shipped: set[str]) -> None:
    expected = source_files(ROOT)
    assert sorted(expected - shipped) == []
    assert sorted(shipped - expected) == []


def test_a_forgotten_package_and_a_forgotten_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "README.md").touch()
    (tmp_path / "py.typed").touch()
    for package in [*PACKAGES, "kiln.runtime.forgotten"]:
        folder = tmp_path.joinpath(*package.split(".")[1:])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text('__version__ = "0.0"\n')
    (tmp_path / "runtime/table.json").touch()
    assert packages_below(tmp_path) - set(PACKAGES) == {"kiln.runtime.forgotten"}
    missing = source_files(tmp_path) - wheel_files(tmp_path)
    assert missing == {"runtime/table.json", "runtime/forgotten/__init__.py"}


def test_package_data_is_under_50_mb(shipped: set[str]) -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in shipped if not name.endswith(".py")}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) < MAX_DATA_BYTES, f"{sum(sizes.values()):,} bytes, the largest: {largest}"


def test_every_module_has_a_docstring(shipped: set[str]) -> None:
    modules = sorted(name for name in shipped if name.endswith(".py"))
    without = [name for name in modules if not ast.get_docstring(ast.parse((ROOT / name).read_text()))]
    assert without == []


def test_root_module_holds_a_docstring_and_the_version_only() -> None:
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr, ast.Assign]


def test_tests_are_no_packages() -> None:
    # With an __init__.py in it, pytest would import tests/ as part of a package named after the clone.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_entry_point_is_there() -> None:
    (command,) = entry_points(group="console_scripts", name="kiln")
    assert callable(command.load())


def readme_commands(readme: str) -> list[str]:
    """The lines of all shell blocks of the README, in order."""
    return [
        line for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()
    ]


def test_ci_runs_the_commands_the_readme_opens_with() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -E '([^']+)' README\.md", script)
    found = [[line for line in readme.splitlines() if re.search(p, line)] for p in patterns]
    assert found == [[line] for line in readme_commands(readme)[:2]]
    assert all("&&" in command and "\n" not in command for (command,) in found)


def test_ci_script_can_be_run() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def locked() -> dict[str, str]:
    """Name -> version of the lock file; every line must pin one."""
    lines = [line for line in (ROOT / "requirements-test.lock").read_text().splitlines() if line[:1] != "#"]
    pins = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def wanted(*extras: str) -> list[Requirement]:
    """The requirements of the project with ``extras``, with references to its own extras resolved."""
    project = PROJECT["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            own = requirement.name == project["name"]
            found += wanted(*requirement.extras) if own else [requirement]
    return found


def test_lock_satisfies_what_the_project_asks_for() -> None:
    pins = locked()
    unmet = [str(r) for r in wanted("cpu", "test") if pins.get(canonicalize_name(r.name)) not in r.specifier]
    assert unmet == []


def test_lock_pins_what_every_machine_can_install() -> None:
    pins = locked()
    assert "+" not in pins["torch"]  # a local version such as +cpu exists on some indexes only
    assert [name for name in pins if name.startswith("onnxruntime")] == ["onnxruntime"]


def test_files_name_no_machine_and_no_index() -> None:
    folders = ["work", "opt", "root", "home", "mnt"]
    hosts = ["pypi.org", "pythonhosted.org", "download.pytorch.org"]
    vendors = "(?!rocm|amdgpu|intel)"  # where their packages put themselves on every machine
    unwanted = re.compile(
        "|".join([rf"(?<![\w.])/{f}/{vendors}" for f in folders] + [re.escape(h) for h in hosts])
    )
    offenders = []
    for path in [*files_below(ROOT), *files_below(ROOT / ".ci"), ROOT / ".gitignore"]:
        inside = path.relative_to(ROOT).parts
        if (
            inside[0] in {"build", "dist"}
            or inside[0].endswith(".egg-info")
            or path == Path(__file__).resolve()
        ):
            continue
        found = unwanted.search(path.read_bytes().decode("latin-1")) if path.stat().st_size < 1e6 else None
        if found:
            offenders.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert offenders == []
